"""Which format an input has: by the names of its files, and where those say nothing, by a file's first bytes.

Images beside shards of another format are what those name; two other formats side by side are a question for the user.
"""

import io
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import PurePosixPath
from typing import get_args

import pyarrow as pa
from PIL import Image

from pipeline.errors import JobError, SpecError
from pipeline.formats.contract import Format
from pipeline.images import FORMATS as IMAGE_FORMATS
from pipeline.spec import InputFormat, JobSpec
from pipeline.storage import ObjectInfo, open_store

INPUT_FORMATS: dict[str, InputFormat] = {name: name for name in get_args(InputFormat)}
FILES_LOOKED_AT = 1000
FILES_SNIFFED = 16
FIRST_BYTES = 64 << 10


def detect_format(
    job: JobSpec, formats: Mapping[str, Format], files: Iterable[ObjectInfo]
) -> tuple[InputFormat, str, bool]:
    """The format of these files, why, and whether only their bytes told; raises SpecError if nothing tells."""
    looked_at = list(islice(files, FILES_LOOKED_AT))
    counts: Counter[str] = Counter()
    for info in looked_at:
        if (name := format_of_name(info.url, formats)) is not None:
            counts[name] += 1
    shards = [name for name in counts if name != "images"]
    if len(shards) > 1:
        found = " and ".join(f"{counts[name]} files of {name}" for name in sorted(shards))
        raise SpecError(f"input.format: the input holds {found}; say which is meant, or name the files more closely.")
    if counts:
        name = shards[0] if shards else "images"
        num_others = len(looked_at) - counts[name]
        why = f"{counts[name]} files are named so" + (f", {num_others} are not" if num_others else "")
        more = f", of the first {FILES_LOOKED_AT}" if len(looked_at) == FILES_LOOKED_AT else ""
        return INPUT_FORMATS[name], why + more, False
    for info in looked_at[:FILES_SNIFFED]:
        if (sniffed := format_of_bytes(_first_bytes(job, info))) is not None:
            return sniffed, f"by the first bytes of {info.url}", True
    where = ", ".join(job.input.urls)
    if not looked_at:
        raise SpecError(f"input.url: no files at {where}; it must be a file, a folder or prefix, or a glob.")
    raise SpecError(
        f"input.url: no file at {where} is Parquet, a tar, JSONL or an image, by its name or its first bytes."
    )


def format_of_name(url: str, formats: Mapping[str, Format]) -> str | None:
    """By the endings of a name; hidden files have none."""
    name = PurePosixPath(url).name.lower()
    if name.startswith((".", "_")):
        return None
    return next((known for known, one in formats.items() if endings_of(url) & one.extensions), None)


def endings_of(url: str) -> frozenset[str]:
    """`{".gz", ".tar.gz"}` of `a.tar.gz`, in lower case."""
    suffixes = PurePosixPath(url.lower()).suffixes
    return frozenset({"".join(suffixes[-1:]), "".join(suffixes[-2:])})


def _first_bytes(job: JobSpec, info: ObjectInfo) -> bytes:
    try:
        with open_store(info.url, job.storage).open(info.url) as file:
            return file.read(FIRST_BYTES)
    except (JobError, OSError) as error:
        raise SpecError(f"input.url: {error}") from error


def format_of_bytes(data: bytes) -> InputFormat | None:
    """By magic numbers, inside gzip and zstd too."""
    if data[:4] == b"PAR1":
        return "parquet"
    inner = _unpack(data)
    if inner[257:262] == b"ustar":
        return "webdataset"
    if inner.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{":
        return "jsonl"
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS):
            return "images"
    except Exception:  # Pillow raises almost anything on bytes that are no image; then they are none
        return None


def _unpack(data: bytes) -> bytes:
    try:
        if data[:2] == b"\x1f\x8b":
            return zlib.decompressobj(wbits=31).decompress(data, 4096)
        if data[:4] == b"\x28\xb5\x2f\xfd":
            return bytes(pa.CompressedInputStream(pa.BufferReader(data), "zstd").read(4096))
    except (zlib.error, OSError, pa.ArrowException):
        return b""
    return data
