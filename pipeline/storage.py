"""One small face for local disks and S3: list, read ranges, write if absent, replace if unchanged.

Writes are atomic: a name exists with its whole content or not at all. A version is S3's etag, or size and time of
change on a disk. Retries with backoff are boto3's own.
Not covered: http(s), and any format.
"""

import contextlib
import fcntl
import glob
import io
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import boto3
import botocore.config
import botocore.exceptions

from pipeline.errors import ShardChangedError, StorageError
from pipeline.spec import StorageSpec

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class ObjectInfo:
    """A file or object as a listing shows it."""

    url: str
    version: str
    size: int


class Store(Protocol):
    """Where shards are read from and parts are written to."""

    def list(self, url: str) -> Iterator[ObjectInfo]:
        """All objects under a prefix or folder, matching a glob, or the one object; sorted by URL."""
        ...

    def open(self, url: str, version: str | None = None) -> BinaryIO:
        """A seekable reader; raises ShardChangedError if the object is gone or no longer of this version."""
        ...

    def read(self, url: str, version: str | None = None) -> bytes: ...

    def stat(self, url: str) -> ObjectInfo | None:
        """None when there is no such object."""
        ...

    def put_if_absent(self, url: str, data: bytes) -> bool:
        """Write in one step; False, and nothing changed, when the name is taken."""
        ...

    def put(self, url: str, data: bytes) -> None:
        """Write in one step, over whatever was there."""
        ...

    def replace(self, url: str, data: bytes, version: str) -> bool:
        """Overwrite in one step; False, and nothing changed, when the object is not of this version."""
        ...

    def delete(self, url: str) -> None: ...


def open_store(url: str, spec: StorageSpec, timeout_s: float = TIMEOUT_S) -> Store:
    """The store that a URL belongs to; `timeout_s` bounds one connection or one read, which boto3 tries again."""
    return S3Store(spec, timeout_s) if url.startswith("s3://") else LocalStore()


def join_url(base: str, *names: str) -> str:
    """`base/name/name`, for paths and URLs alike."""
    return "/".join([base.rstrip("/"), *names])


def absolute_url(url: str) -> str:
    """A local path made absolute, with a trailing slash kept; URLs stay as they are."""
    if url.startswith("s3://"):
        return url
    path = os.path.abspath(os.path.expanduser(url.removeprefix("file://")))
    return path + "/" if url.endswith("/") and path != "/" else path


def is_glob(url: str) -> bool:
    return any(char in url for char in "*?[")


class LocalStore:
    """Files on a disk that all nodes share (or on the only node)."""

    def list(self, url: str) -> Iterator[ObjectInfo]:
        path = absolute_url(url)
        if os.path.isdir(path):
            yield from self._walk(path.rstrip("/") or "/")
        elif os.path.exists(path):
            yield self._info(path)
        elif is_glob(path):
            for name in sorted(glob.glob(path, recursive=True)):
                if os.path.isfile(name):
                    yield self._info(name)

    def _walk(self, folder: str) -> Iterator[ObjectInfo]:
        # A file sorts among the folder's sub-folders as it would in a flat listing of S3 keys.
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name + ("/" if entry.is_dir() else ""))
        for entry in entries:
            if entry.is_dir():
                yield from self._walk(entry.path)
            elif entry.is_file():
                with contextlib.suppress(FileNotFoundError):  # it may vanish while we list
                    yield self._info(entry.path)

    def _info(self, path: str) -> ObjectInfo:
        status = os.stat(path)
        return ObjectInfo(path, f"{status.st_size}-{status.st_mtime_ns}", status.st_size)

    def open(self, url: str, version: str | None = None) -> BinaryIO:
        try:
            if version is not None and self._info(absolute_url(url)).version != version:
                raise ShardChangedError(f"{url} changed after the job was planned; run the job again to plan it anew.")
            return open(absolute_url(url), "rb")
        except (
            FileNotFoundError,
            NotADirectoryError,
            ValueError,
        ) as error:  # ValueError: no file has a null in its name
            raise ShardChangedError(f"{url!r} is not there." if "\0" in url else f"{url} is gone.") from error
        except OSError as error:
            raise StorageError(f"{url} cannot be read: {error.strerror}.") from error

    def read(self, url: str, version: str | None = None) -> bytes:
        with self.open(url, version) as file:
            return file.read()

    def stat(self, url: str) -> ObjectInfo | None:
        try:
            status = os.stat(absolute_url(url))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return self._info(absolute_url(url)) if stat.S_ISREG(status.st_mode) else None

    def put_if_absent(self, url: str, data: bytes) -> bool:
        path = absolute_url(url)
        with self._complete_file(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
        return True

    def put(self, url: str, data: bytes) -> None:
        path = absolute_url(url)
        with self._complete_file(path, data) as temporary:
            os.replace(temporary, path)

    def replace(self, url: str, data: bytes, version: str) -> bool:
        path = absolute_url(url)
        with self._complete_file(path, data) as temporary, _locked(os.path.dirname(path)):
            current = self.stat(path)
            if current is None or current.version != version:
                return False
            os.replace(temporary, path)
        return True

    @contextlib.contextmanager
    def _complete_file(self, path: str, data: bytes) -> Iterator[str]:
        """A temporary file beside `path`'s folder with all of `data` safely on the disk; removed in the end."""
        folder = os.path.dirname(path)
        try:
            os.makedirs(folder, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=folder)
        except OSError as error:
            raise StorageError(f"{folder} cannot be written: {error.strerror}.") from error
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            yield temporary
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}.") from error
        finally:
            Path(temporary).unlink(missing_ok=True)

    def delete(self, url: str) -> None:
        Path(absolute_url(url)).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Hold the folder's lock: a disk has no compare-and-swap."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@lru_cache(maxsize=8)
def _s3_client(spec: StorageSpec, timeout_s: float) -> Any:
    config = botocore.config.Config(
        retries={"mode": "standard", "max_attempts": 8},
        connect_timeout=timeout_s,
        read_timeout=timeout_s,
        max_pool_connections=32,
        # Stores other than AWS's reject the checksum trailers that boto3 sends by default.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.client("s3", endpoint_url=spec.endpoint_url, region_name=spec.region, config=config)


class S3Store:
    """Any store that speaks S3 and honours `If-None-Match: *` (others lose only the guard against races)."""

    def __init__(self, spec: StorageSpec, timeout_s: float = TIMEOUT_S) -> None:
        self.client = _s3_client(spec, timeout_s)

    def list(self, url: str) -> Iterator[ObjectInfo]:
        bucket, key = split_s3(url)
        if key and not key.endswith("/") and (one := self.stat(url)) is not None:
            yield one
            return
        prefix = key[: min(key.index(char) for char in "*?[" if char in key)] if is_glob(url) else key
        if not is_glob(url) and prefix and not prefix.endswith("/"):
            prefix += "/"
        pattern = glob_to_regex(key)
        with _told(url):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                for item in page.get("Contents", ()):
                    if item["Key"].endswith("/") or (is_glob(url) and not pattern.fullmatch(item["Key"])):
                        continue
                    yield ObjectInfo(f"s3://{bucket}/{item['Key']}", item["ETag"].strip('"'), item["Size"])

    def open(self, url: str, version: str | None = None) -> BinaryIO:
        info = self.stat(url)
        if info is None:
            raise ShardChangedError(f"{url} is gone.")
        if version is not None and info.version != version:
            raise ShardChangedError(f"{url} changed after the job was planned; run the job again to plan it anew.")
        return cast(BinaryIO, _S3Reader(self.client, info))

    def read(self, url: str, version: str | None = None) -> bytes:
        return self.open(url, version).read()

    def stat(self, url: str) -> ObjectInfo | None:
        bucket, key = split_s3(url)
        with _told(url):
            try:
                head = self.client.head_object(Bucket=bucket, Key=key)
            except botocore.exceptions.ClientError as error:
                if _status(error) == 404:
                    return None
                raise
        return ObjectInfo(url, head["ETag"].strip('"'), head["ContentLength"])

    def put_if_absent(self, url: str, data: bytes) -> bool:
        return self._put_if(url, data, IfNoneMatch="*")

    def put(self, url: str, data: bytes) -> None:
        bucket, key = split_s3(url)
        with _told(url):
            self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def replace(self, url: str, data: bytes, version: str) -> bool:
        return self._put_if(url, data, IfMatch=f'"{version}"')

    def _put_if(self, url: str, data: bytes, **condition: str) -> bool:
        bucket, key = split_s3(url)
        with _told(url):
            try:
                self.client.put_object(Bucket=bucket, Key=key, Body=data, **condition)
            except botocore.exceptions.ClientError as error:
                if _status(error) == 412 or _code(error) == "NoSuchKey":
                    return False
                raise
        return True

    def delete(self, url: str) -> None:
        bucket, key = split_s3(url)
        with _told(url):
            self.client.delete_object(Bucket=bucket, Key=key)


class _S3Reader(io.RawIOBase):
    """Range reads of one object, each tied to the version that was opened."""

    def __init__(self, client: Any, info: ObjectInfo) -> None:
        self._client, self._info, self._position = client, info, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._info.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readall(self) -> bytes:
        return self.read(max(0, self._info.size - self._position))  # in one request, not in io's small steps

    def readinto(self, buffer: Any) -> int:
        start, stop = self._position, min(self._position + len(buffer), self._info.size)
        if start >= stop:
            return 0
        bucket, key = split_s3(self._info.url)
        with _told(self._info.url):
            try:
                response = self._client.get_object(
                    Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", IfMatch=f'"{self._info.version}"'
                )
                data = response["Body"].read()
            except botocore.exceptions.ClientError as error:
                if _status(error) in (404, 412):
                    raise ShardChangedError(f"{self._info.url} changed or vanished while it was read.") from error
                raise
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def split_s3(url: str) -> tuple[str, str]:
    """`s3://bucket/key` as (bucket, key)."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


def glob_root(url: str) -> str:
    """The folder above the first wildcard; a URL without one is its own root, without a slash at the end."""
    if not is_glob(url) or os.path.exists(url):
        return url.rstrip("/") or "/"
    first = min(url.index(char) for char in "*?[" if char in url)
    return url[:first].rpartition("/")[0] or "/"


def glob_to_regex(pattern: str) -> re.Pattern[str]:
    """As `glob` on a disk: `*`, `?`, `[...]` stay in one level and pass hidden names over; `**` spans levels."""
    *folders, last = pattern.split("/")
    pieces = [HIDDEN_FREE_LEVELS if name == "**" else _level_to_regex(name) + "/" for name in folders]
    pieces.append(HIDDEN_FREE_LEVELS + r"(?!\.)[^/]+" if last == "**" else _level_to_regex(last))
    return re.compile("".join(pieces), re.DOTALL)


HIDDEN_FREE_LEVELS = r"(?:(?!\.)[^/]+/)*"


def _level_to_regex(name: str) -> str:
    pieces = {"*": "[^/]*", "?": "[^/]"}
    tokens = re.findall(r"\*+|\?|\[!?\]?[^\]]*\]|.", name, re.DOTALL)
    body = "".join(pieces.get(token[:1] if token[0] == "*" else token) or _set_or_literal(token) for token in tokens)
    return (r"(?!\.)" if name[:1] in ("*", "?", "[") else "") + body


def _set_or_literal(token: str) -> str:
    if len(token) < 3 or token[0] != "[" or token[-1] != "]":
        return re.escape(token)
    inside = token[2:-1] if token[1] == "!" else token[1:-1]
    inside = re.sub(r"([\\\[\]^&~|])", r"\\\1", inside)
    try:
        re.compile(f"[{inside}]")
    except re.error:
        return "(?!)"  # such as [z-a]: matches nothing
    return f"(?!/)[{'^' if token[1] == '!' else ''}{inside}]"


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """Turn boto3's errors into one sentence that names the object; no header, no credential."""
    try:
        yield
    except botocore.exceptions.NoCredentialsError as error:
        raise StorageError(
            f"{url}: no S3 credentials found where boto3 looks (AWS_ACCESS_KEY_ID, a profile, a role)."
        ) from error
    except botocore.exceptions.ClientError as error:
        raise StorageError(f"{url}: the store answered {_code(error)} ({_status(error)}).") from error
    except botocore.exceptions.BotoCoreError as error:
        raise StorageError(f"{url}: the store cannot be reached ({type(error).__name__}).") from error


def _status(error: botocore.exceptions.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: botocore.exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "an error"))
