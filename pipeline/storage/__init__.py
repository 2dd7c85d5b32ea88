"""One small face for local disks and S3: list, read ranges, write if absent, replace if unchanged.

Writes are atomic: a name exists with its whole content or not at all. A version is S3's etag, or size and time of
change on a disk.
Not covered: http(s), and any format.
"""

import io
from typing import BinaryIO, cast

from pipeline.spec import StorageSpec
from pipeline.storage.contract import ObjectInfo, Store
from pipeline.storage.local import LocalStore
from pipeline.storage.s3 import TIMEOUT_S, S3Store
from pipeline.storage.urls import absolute_url, glob_root, glob_to_regex, is_glob, join_url, split_s3

__all__ = [
    "LocalStore",
    "ObjectInfo",
    "S3Store",
    "Store",
    "absolute_url",
    "glob_root",
    "glob_to_regex",
    "is_glob",
    "join_url",
    "open_buffered",
    "open_store",
    "split_s3",
]


def open_store(url: str, spec: StorageSpec, timeout_s: float = TIMEOUT_S) -> Store:
    """The store that a URL belongs to; `timeout_s` bounds one connection or one read, which boto3 tries again."""
    return S3Store(spec, timeout_s) if url.startswith("s3://") else LocalStore()


STREAM_BUFFER_BYTES = 8 << 20
"""Of one request, where an object is read from its beginning to its end."""


def open_buffered(url: str, spec: StorageSpec, version: str | None = None, timeout_s: float = TIMEOUT_S) -> BinaryIO:
    """A seekable reader for streams: it asks a remote store for megabytes at a time. Raises as `Store.open`."""
    file = open_store(url, spec, timeout_s).open(url, version)
    if isinstance(file, io.BufferedReader):
        return file
    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, file), STREAM_BUFFER_BYTES))
