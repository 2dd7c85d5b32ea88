"""Objects in any store that speaks S3, through boto3 and its retries; what those leave out, tenacity tries again."""

import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO, cast

import botocore.exceptions
import urllib3.exceptions
from boto3.s3.transfer import TransferConfig

from pipeline.errors import ShardChangedError, SpecError, StoreUnavailableError
from pipeline.spec import StorageSpec
from pipeline.storage.contract import ObjectInfo
from pipeline.storage.s3_client import answered_endpoints, s3_client
from pipeline.storage.s3_errors import again, again_long, code_of, outlast, outlast_long, status_of, told
from pipeline.storage.urls import glob_to_regex, is_glob, split_s3

TIMEOUT_S = 30.0
UPLOAD = TransferConfig(multipart_threshold=16 << 20, multipart_chunksize=8 << 20, max_concurrency=4)
"""Of files; boto3 holds up to ten pieces in memory, and makes them larger where there would be more than 10,000."""


class S3Store:
    """Any store that speaks S3 and honours `If-None-Match: *` (others lose only the guard against races)."""

    def __init__(self, spec: StorageSpec, timeout_s: float = TIMEOUT_S) -> None:
        self._settings = (spec, timeout_s)
        try:
            s3_client(*self._settings)
        except (ValueError, botocore.exceptions.BotoCoreError) as error:
            raise SpecError(f"storage: no S3 client can be made with these settings: {error}") from error

    @property
    def client(self) -> Any:
        """The present one: it is made anew when its credentials have expired."""
        return s3_client(*self._settings)

    def list(self, url: str) -> Iterator[ObjectInfo]:
        bucket, key = split_s3(url)
        if key and not key.endswith("/") and (one := self.stat(url)) is not None:
            yield one
            return
        prefix = key[: min(key.index(char) for char in "*?[" if char in key)] if is_glob(url) else key
        if not is_glob(url) and prefix and not prefix.endswith("/"):
            prefix += "/"
        pattern = glob_to_regex(key)
        for item in self._list_keys(url, bucket, prefix):
            if item["Key"].endswith("/") or (is_glob(url) and not pattern.fullmatch(item["Key"])):
                continue
            yield ObjectInfo(f"s3://{bucket}/{item['Key']}", item["ETag"].strip('"'), item["Size"])

    def _list_keys(self, url: str, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
        more: dict[str, str] = {}
        while True:
            with told(url):
                page = self._patiently(lambda: self.client.list_objects_v2(Bucket=bucket, Prefix=prefix, **more))  # noqa: B023
            yield from page.get("Contents", ())
            if not page.get("IsTruncated"):
                return
            before, more = more, {"ContinuationToken": page.get("NextContinuationToken", "")}
            if more["ContinuationToken"] in ("", before.get("ContinuationToken")):
                raise StoreUnavailableError(f"{url}: the store's listing does not go on where it says it does.")

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """Outlast an outage, unless the store never answered this process: then the spec may be wrong."""
        return outlast(call) if self.client.meta.endpoint_url in answered_endpoints else call()

    def open(self, url: str, version: str | None = None) -> BinaryIO:
        with told(url):
            info = outlast(self._head, url)
        if info is None:
            raise ShardChangedError(f"{url} is gone.")
        if version is not None and info.version != version:
            raise ShardChangedError(f"{url} changed after the job was planned; run the job again to plan it anew.")
        return self.open_listed(info)

    def open_listed(self, info: ObjectInfo) -> BinaryIO:
        return cast(BinaryIO, _S3Reader(self, info))

    def read(self, url: str, version: str | None = None) -> bytes:
        return self.open(url, version).read()

    def stat(self, url: str) -> ObjectInfo | None:
        with told(url):
            found: ObjectInfo | None = self._patiently(partial(self._head, url))
        return found

    def _head(self, url: str) -> ObjectInfo | None:
        bucket, key = split_s3(url)
        client = self.client
        try:
            head = client.head_object(Bucket=bucket, Key=key)
        except botocore.exceptions.ClientError as error:
            if status_of(error) == 404:
                return None
            if status_of(error) in (400, 403):  # an answer to HEAD has no body, and its code is lost
                client.get_object(Bucket=bucket, Key=key, Range="bytes=0-0")["Body"].close()
            raise
        return ObjectInfo(url, head["ETag"].strip('"'), head["ContentLength"])

    def put_if_absent(self, url: str, data: bytes) -> bool:
        return self._put_if(url, data, IfNoneMatch="*")

    def put_file_if_absent(self, url: str, file: BinaryIO) -> bool:
        if file.seek(0, io.SEEK_END) < UPLOAD.multipart_threshold:
            file.seek(0)
            return self.put_if_absent(url, file.read())
        bucket, key = split_s3(url)

        def upload() -> None:
            file.seek(0)
            client = s3_client(*self._settings, uploads_if_absent=True)
            client.upload_fileobj(file, bucket, key, Config=UPLOAD)  # aborts what it cannot complete

        return _unless_taken(url, lambda: outlast_long(again_long, upload))

    def put(self, url: str, data: bytes) -> None:
        bucket, key = split_s3(url)
        with told(url):
            outlast(lambda: self.client.put_object(Bucket=bucket, Key=key, Body=data))

    def replace(self, url: str, data: bytes, version: str) -> bool:
        return self._put_if(url, data, IfMatch=f'"{version}"')

    def _put_if(self, url: str, data: bytes, **condition: str) -> bool:
        bucket, key = split_s3(url)

        def put() -> None:
            self.client.put_object(Bucket=bucket, Key=key, Body=data, **condition)

        return _unless_taken(url, lambda: outlast(again, put))

    def delete(self, url: str) -> None:
        bucket, key = split_s3(url)
        with told(url):
            self._patiently(lambda: self.client.delete_object(Bucket=bucket, Key=key))

    def get_range(self, info: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of this version; one try beyond boto3's own."""
        bucket, key = split_s3(info.url)
        wanted = {"Range": f"bytes={start}-{stop - 1}", "IfMatch": f'"{info.version}"'}
        body = self.client.get_object(Bucket=bucket, Key=key, **wanted)["Body"]
        try:
            data: bytes = body.read()
        except urllib3.exceptions.HTTPError as error:  # botocore lets some pass as they are, those of TLS for instance
            raise botocore.exceptions.ResponseStreamingError(error=error) from error
        return data


def _unless_taken(url: str, write: Callable[[], object]) -> bool:
    """Write under a condition; False when it does not hold."""
    with told(url):
        try:
            write()
        except botocore.exceptions.ClientError as error:
            if status_of(error) == 412 or code_of(error) == "NoSuchKey":
                return False
            raise
    return True


class _S3Reader(io.RawIOBase):
    """Range reads of one object, each tied to the version that was opened."""

    def __init__(self, store: S3Store, info: ObjectInfo) -> None:
        self._store, self._info, self._position = store, info, 0

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
        with told(self._info.url):
            try:
                data: bytes = outlast(again, self._store.get_range, self._info, start, stop)
            except botocore.exceptions.ClientError as error:
                if status_of(error) in (404, 412):
                    raise ShardChangedError(f"{self._info.url} changed or vanished while it was read.") from error
                raise
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
