"""What a column says about an image: the bytes themselves, or where they are.

A name is a path relative to its shard's folder, a URL (`s3://`, `http://`, `https://`, `file://`, `data:`) or, in a
shard on a disk, any path of that disk. A shard that comes from elsewhere cannot name files of the reading machine.
Not covered: fetching.
"""

import base64
import posixpath
import re
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
    return tuple(sources) or (None,)  # lists that are all empty: nobody asks about no image


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
    if name[:5].lower() == "data:":
        return _decode_data_url(name)
    found = SCHEME.match(name)
    scheme = (found[1] or "file").lower() if found else ""
    if scheme in ("http", "https"):
        return ImageRef(name)
    if scheme not in ("", "file", "s3"):
        return _refused(name, "is no s3://, http://, https:// or file:// URL")
    path = name[found.end() :] if found else name
    if scheme == "s3":
        bucket, _, key = path.partition("/")
        return _find_object(bucket, key.split("/"), name)
    if not shard_url.startswith("s3://"):
        return ImageRef(posixpath.normpath(posixpath.join(posixpath.dirname(shard_url), path)))
    if path.startswith("/"):
        return _refused(name, "names a file of this machine, but its shard is not on it")
    bucket, key = split_s3(shard_url)
    return _find_object(bucket, [*key.split("/")[:-1], *path.split("/")], name)


SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|file:(?=/)", re.IGNORECASE)
BUCKET = re.compile(r"[A-Za-z0-9._-]+")
NO_KEY = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
MAX_KEY_BYTES = 1024
"""Of S3. What a store refuses as a name must not reach it: its answer is that of a store that refuses everything."""


def _find_object(bucket: str, levels: Sequence[str], name: str) -> ImageSource:
    path: list[str] = []
    for level in levels:
        if level == ".." and not path:
            return _refused(name, "leads out of its bucket")
        if level == "..":
            path.pop()
        elif level != ".":
            path.append(level)
    key = "/".join(path)
    if not BUCKET.fullmatch(bucket) or not key or NO_KEY.search(key) or len(key.encode()) > MAX_KEY_BYTES:
        return SampleError("image_name_invalid", f"The image path {_shown(name)} names no object of a bucket.")
    return ImageRef(f"s3://{bucket}/{key}")


def _decode_data_url(name: str) -> ImageSource:
    kind, comma, body = name.partition(",")
    try:
        if comma and kind.endswith(";base64"):
            return base64.b64decode(body, validate=True)
    except ValueError:
        pass  # said below, as for every other data URL that holds no base64
    return SampleError("image_name_invalid", "The image's data: URL does not hold base64.")


def _refused(name: str, why: str) -> SampleError:
    return SampleError("image_path_refused", f"The image path {_shown(name)} {why}.")


def _shown(name: str) -> str:
    """Without a query and a user, which may be secrets."""
    return repr(re.sub(r"//[^/]*@", "//", name.partition("?")[0])[:200])
