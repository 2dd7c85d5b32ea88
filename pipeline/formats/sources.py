"""What a column says about an image: the bytes themselves, or where they are.

A name is a path relative to its shard's folder, a URL (`s3://`, `http://`, `https://`, `file://`, `data:`) or, in a
shard on a disk, any path of that disk. A shard that comes from elsewhere cannot name files of the reading machine.
Not covered: fetching.
"""

import base64
import binascii
import posixpath
from collections.abc import Sequence
from typing import Any

from pipeline.errors import SampleError
from pipeline.formats.contract import ImageRef, ImageSource
from pipeline.storage import split_s3


def to_sources(values: Sequence[Any], shard_url: str) -> tuple[ImageSource, ...]:
    """The images of one sample, from the values of its image columns; a list holds several."""
    sources: list[ImageSource] = []
    for value in values:
        if isinstance(value, list):
            sources += [to_source(one, shard_url) for one in value]
        else:
            sources.append(to_source(value, shard_url))
    return tuple(sources)


def to_source(value: Any, shard_url: str) -> ImageSource:
    """One value: bytes, `{bytes, path}` as Hugging Face datasets write it, or a name."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return find_named(value, shard_url)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    return SampleError("image_name_invalid", f"The image is a {type(value).__name__}, not a name or bytes.")


def find_named(name: str, shard_url: str) -> ImageSource:
    """Where a name points to, seen from its shard."""
    scheme = name.partition(":")[0].lower() if ":" in name.partition("/")[0] else ""
    if scheme == "data":
        return _decode_data_url(name)
    if scheme in ("http", "https", "s3"):
        return ImageRef(name)
    if scheme and "://" in name and scheme != "file":
        return _refused(name, "is no s3://, http://, https:// or file:// URL")
    path = name[len("file://") :] if scheme == "file" else name
    if path.startswith("/"):
        if shard_url.startswith("s3://"):
            return _refused(name, "names a file of this machine, but its shard is not on it")
        return ImageRef(posixpath.normpath(path))
    return _find_relative(path, shard_url)


def _find_relative(path: str, shard_url: str) -> ImageSource:
    if not shard_url.startswith("s3://"):
        return ImageRef(posixpath.normpath(posixpath.join(posixpath.dirname(shard_url), path)))
    bucket, key = split_s3(shard_url)
    joined = posixpath.normpath(posixpath.join("/", posixpath.dirname(key), path))
    if posixpath.normpath(posixpath.join(posixpath.dirname(key), path)).startswith(".."):
        return _refused(path, "leads out of its bucket")
    return ImageRef(f"s3://{bucket}{joined}")


def _decode_data_url(name: str) -> ImageSource:
    kind, comma, body = name.partition(",")
    try:
        if comma and kind.endswith(";base64"):
            return base64.b64decode(body, validate=True)
    except binascii.Error:
        pass  # said below, as for every other data URL that holds no base64
    return SampleError("image_name_invalid", "The image's data: URL does not hold base64.")


def _refused(name: str, why: str) -> SampleError:
    return SampleError("image_path_refused", f"The image path {name.partition('?')[0][:200]!r} {why}.")
