"""Files on a disk. Writes are complete temporary files that are linked or renamed into place."""

import contextlib
import fcntl
import glob
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import ShardChangedError, StorageError
from pipeline.storage.contract import ObjectInfo
from pipeline.storage.urls import absolute_url, is_glob

COPY_BYTES = 1 << 20


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

    def open_listed(self, info: ObjectInfo) -> BinaryIO:
        return self.open(info.url, info.version)

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
        return self.put_file_if_absent(url, io.BytesIO(data))

    def put_file_if_absent(self, url: str, file: BinaryIO) -> bool:
        path = absolute_url(url)
        file.seek(0)
        with self._complete_file(path, file) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
        return True

    def put(self, url: str, data: bytes) -> None:
        path = absolute_url(url)
        with self._complete_file(path, io.BytesIO(data)) as temporary:
            os.replace(temporary, path)

    def replace(self, url: str, data: bytes, version: str) -> bool:
        path = absolute_url(url)
        with self._complete_file(path, io.BytesIO(data)) as temporary, _locked(path):
            current = self.stat(path)
            if current is None or current.version != version:
                return False
            os.replace(temporary, path)
        return True

    @contextlib.contextmanager
    def _complete_file(self, path: str, source: BinaryIO) -> Iterator[str]:
        """A temporary file in `path`'s folder with all of `source` safely on the disk; removed in the end."""
        folder = os.path.dirname(path)
        try:
            os.makedirs(folder, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=folder)
        except OSError as error:
            raise StorageError(f"{folder} cannot be written: {error.strerror}.") from error
        try:
            with os.fdopen(handle, "wb") as file:
                shutil.copyfileobj(source, file, COPY_BYTES)
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
def _locked(path: str) -> Iterator[None]:
    """Hold the lock of the file that `path` is now, if it is: a disk has no compare-and-swap.

    Who waited for the lock of a file that was replaced meanwhile finds another version at `path`. NFS locks only what
    is open for writing.
    """
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
