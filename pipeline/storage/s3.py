"""Objects in any store that speaks S3, through boto3 and its retries; what those leave out, tenacity tries again."""

import contextlib
import email.utils
import io
import socket
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any, BinaryIO, cast

import boto3
import botocore.config
import botocore.exceptions
import botocore.session
import botocore.utils
import tenacity
from boto3.s3.transfer import TransferConfig

from pipeline.errors import ShardChangedError, SpecError, StorageError, StoreUnavailableError
from pipeline.spec import StorageSpec
from pipeline.storage.contract import ObjectInfo
from pipeline.storage.urls import glob_to_regex, is_glob, split_s3

TIMEOUT_S = 30.0
OF_ONE_OBJECT = (403, 404, 405, 412, 416)
"""HTTP statuses that may concern one object alone."""
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
"""Answers to credentials that were good before; a new client finds out whether there are others by now."""
SKEWED = "RequestTimeTooSkewed"
OF_ALL_OBJECTS = (*EXPIRED, SKEWED, "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch")
UPLOAD = TransferConfig(multipart_threshold=16 << 20, multipart_chunksize=8 << 20, max_concurrency=4)
"""Of files; boto3 holds up to ten pieces in memory, and makes them larger where there would be more than 10,000."""


@lru_cache(maxsize=8)
def _s3_client(spec: StorageSpec, timeout_s: float, uploads_if_absent: bool = False) -> Any:
    """A client; boto3's uploads of files take no condition, so one with `uploads_if_absent` adds it to each of them."""
    config = botocore.config.Config(
        retries={"mode": "standard", "max_attempts": 8},
        connect_timeout=timeout_s,
        read_timeout=timeout_s,
        max_pool_connections=32,
        # Stores other than AWS's reject the checksum trailers that boto3 sends by default.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client = _make_session().client("s3", endpoint_url=spec.endpoint_url, region_name=spec.region, config=config)
    client.meta.events.register("after-call.s3", partial(_note_answer, client.meta.endpoint_url))
    if uploads_if_absent:
        client.meta.events.register("provide-client-params.s3.CompleteMultipartUpload", _add_if_absent)
    return client


def _make_session() -> boto3.Session:
    """One of its own, for a session keeps the credentials that it found first; its times are read by a fast parser."""
    session = botocore.session.get_session()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_time)
    return boto3.Session(botocore_session=session)


def _parse_time(value: Any) -> Any:
    """Botocore's own way with an ISO 8601 time takes three quarters of a listing's processor time."""
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return botocore.utils.parse_timestamp(value)


_answered: set[str] = set()
"""Endpoints that have answered this process: one that does not now is ill, and no mistake in the spec."""


def _note_answer(endpoint_url: str, http_response: Any, **_: Any) -> None:
    if http_response.status_code < HTTPStatus.BAD_REQUEST:
        _answered.add(endpoint_url)


def _add_if_absent(params: dict[str, Any], **_: Any) -> None:
    params["IfNoneMatch"] = "*"


class S3Store:
    """Any store that speaks S3 and honours `If-None-Match: *` (others lose only the guard against races)."""

    def __init__(self, spec: StorageSpec, timeout_s: float = TIMEOUT_S) -> None:
        self._settings = (spec, timeout_s)
        try:
            _s3_client(*self._settings)
        except (ValueError, botocore.exceptions.BotoCoreError) as error:
            raise SpecError(f"storage: no S3 client can be made with these settings: {error}") from error

    @property
    def client(self) -> Any:
        """The present one: it is made anew when its credentials have expired."""
        return _s3_client(*self._settings)

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
            with _told(url):
                page = self._patiently(lambda: self.client.list_objects_v2(Bucket=bucket, Prefix=prefix, **more))  # noqa: B023
            yield from page.get("Contents", ())
            if not page.get("IsTruncated"):
                return
            before, more = more, {"ContinuationToken": page.get("NextContinuationToken", "")}
            if more["ContinuationToken"] in ("", before.get("ContinuationToken")):
                raise StoreUnavailableError(f"{url}: the store's listing does not go on where it says it does.")

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """Outlast an outage, unless the store never answered this process: then the spec may be wrong."""
        return _outlast(call) if self.client.meta.endpoint_url in _answered else call()

    def open(self, url: str, version: str | None = None) -> BinaryIO:
        with _told(url):
            info = _outlast(self._head, url)
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
        with _told(url):
            found: ObjectInfo | None = self._patiently(partial(self._head, url))
        return found

    def _head(self, url: str) -> ObjectInfo | None:
        bucket, key = split_s3(url)
        client = self.client
        try:
            head = client.head_object(Bucket=bucket, Key=key)
        except botocore.exceptions.ClientError as error:
            if _status(error) == 404:
                return None
            if _status(error) in (400, 403):  # an answer to HEAD has no body, and its code is lost
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
            client = _s3_client(*self._settings, uploads_if_absent=True)
            client.upload_fileobj(file, bucket, key, Config=UPLOAD)  # aborts what it cannot complete

        return _unless_taken(url, upload)

    def put(self, url: str, data: bytes) -> None:
        bucket, key = split_s3(url)
        with _told(url):
            _outlast(lambda: self.client.put_object(Bucket=bucket, Key=key, Body=data))

    def replace(self, url: str, data: bytes, version: str) -> bool:
        return self._put_if(url, data, IfMatch=f'"{version}"')

    def _put_if(self, url: str, data: bytes, **condition: str) -> bool:
        bucket, key = split_s3(url)
        return _unless_taken(url, lambda: self.client.put_object(Bucket=bucket, Key=key, Body=data, **condition))

    def delete(self, url: str) -> None:
        bucket, key = split_s3(url)
        with _told(url):
            self._patiently(lambda: self.client.delete_object(Bucket=bucket, Key=key))

    def get_range(self, info: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of this version; one try beyond boto3's own."""
        bucket, key = split_s3(info.url)
        wanted = {"Range": f"bytes={start}-{stop - 1}", "IfMatch": f'"{info.version}"'}
        data: bytes = self.client.get_object(Bucket=bucket, Key=key, **wanted)["Body"].read()
        return data


def _unless_taken(url: str, write: Callable[[], object]) -> bool:
    """Write under a condition; False when it does not hold."""
    with _told(url):
        try:
            _outlast(_again, write)
        except botocore.exceptions.ClientError as error:
            if _status(error) == 412 or _code(error) == "NoSuchKey":
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
        with _told(self._info.url):
            try:
                data: bytes = _outlast(_again, self._store.get_range, self._info, start, stop)
            except botocore.exceptions.ClientError as error:
                if _status(error) in (404, 412):
                    raise ShardChangedError(f"{self._info.url} changed or vanished while it was read.") from error
                raise
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _is_passing(error: BaseException) -> bool:
    """A lost race of conditional writes, which S3 asks to repeat, or a connection lost while a body was read."""
    if isinstance(error, botocore.exceptions.ClientError):
        # NoSuchUpload: an upload whose end was answered on a connection that broke; the next try finds the name taken.
        return _status(error) == 409 or _code(error) == "NoSuchUpload"
    return isinstance(error, BODY_ERRORS)


BODY_ERRORS = (
    botocore.exceptions.ResponseStreamingError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.ReadTimeoutError,
)

_again = tenacity.Retrying(
    retry=tenacity.retry_if_exception(_is_passing),
    wait=tenacity.wait_random_exponential(0.2, max=5),
    stop=tenacity.stop_after_attempt(6) | tenacity.stop_after_delay(60),  # boto3 has tried for longer by then
    reraise=True,
)
"""Calls a function until it succeeds, up to six times within a minute."""

CREDENTIAL_ERRORS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.MetadataRetrievalError,
    botocore.exceptions.ConfigParseError,
)
_renewals: set[float] = set()
"""When this process's credentials had expired: since then, that there are none may be a file that is being written."""
OUTAGE_S = 300.0
OUTAGE_STATUSES = (429, 500, 502, 503, 504)
OUTAGE_ERRORS = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
)


def _is_outage(error: BaseException) -> bool:
    """The store is throttling, or not well: what boto3 has tried for some 10 to 60 seconds may succeed in a minute.

    So may credentials that have expired, and a clock that is wrong.
    """
    if isinstance(error, botocore.exceptions.ClientError):
        return _status(error) in OUTAGE_STATUSES or _code(error) in (*EXPIRED, SKEWED)
    return isinstance(error, OUTAGE_ERRORS) or (bool(_renewals) and isinstance(error, CREDENTIAL_ERRORS))


def _renew(state: tenacity.RetryCallState) -> None:
    """Let the next try look for credentials anew, if they are what is wrong."""
    error = state.outcome.exception() if state.outcome else None
    has_expired = isinstance(error, botocore.exceptions.ClientError) and _code(error) in EXPIRED
    if has_expired or isinstance(error, CREDENTIAL_ERRORS):
        _renewals.add(time.monotonic())
        _s3_client.cache_clear()


_outlast = tenacity.Retrying(
    retry=tenacity.retry_if_exception(_is_outage),
    before_sleep=_renew,
    wait=tenacity.wait_random_exponential(2, max=30),
    stop=tenacity.stop_after_delay(OUTAGE_S),
    reraise=True,
)
"""Calls a function until the store is well again."""


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """Turn boto3's errors into one sentence that names the object; no header, no credential."""
    try:
        yield
    except botocore.exceptions.NoCredentialsError as error:
        raise StoreUnavailableError(
            f"{url}: no S3 credentials found where boto3 looks (AWS_ACCESS_KEY_ID, a profile, a role)."
        ) from error
    except botocore.exceptions.ClientError as error:
        is_of_one = _status(error) in OF_ONE_OBJECT and _code(error) not in OF_ALL_OBJECTS
        kind = StorageError if is_of_one else StoreUnavailableError
        told = f"{url}: the store answered {_code(error)} ({_status(error)})"
        raise kind(told + (f": {_tell_skew(error)}" if _code(error) == SKEWED else ".")) from error
    except botocore.exceptions.BotoCoreError as error:
        raise StoreUnavailableError(f"{url}: the store cannot be reached ({type(error).__name__}).") from error


def _status(error: botocore.exceptions.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _tell_skew(error: botocore.exceptions.ClientError) -> str:
    """How wrong this machine's clock is, by the store's."""
    date = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    here = f"{socket.gethostname()}'s clock"
    try:
        ahead_s = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return f"{here} differs from the store's. Set it by NTP."
    return f"{here} is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the store's. Set it by NTP."


def _code(error: botocore.exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "an error"))
