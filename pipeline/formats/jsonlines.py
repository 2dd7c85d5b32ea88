"""Rows of a JSON Lines file, plain, gzip or zstd, one at a time and in flat memory.

Every line that is not blank gives one row, whatever it holds: an object, or the reason why it is none. A stream that
breaks gives one last row that says where. A row's index and offset do not depend on where the reading began.
Not covered: which columns a row must have, and loss that leaves no trace (a plain file cut between two lines, a
compressed one cut between two members or frames).
"""

import codecs
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipeline.errors import SampleError, is_of_machine

REQUEST_BYTES = 4 << 20
"""How much is asked of the file at a time: each read of an object in a bucket is one request."""
BLOCK_BYTES = 128 << 10
"""How much is unpacked at a time. The block in which a zstd stream breaks is lost whole."""
BLANKS = b" \t\r"
COMPRESSIONS = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}


@dataclass(frozen=True)
class JsonRow:
    """One line that is not blank."""

    index: int
    """Its number in the file, from 0; blank lines do not count."""
    offset: int
    """Where its line begins in the unpacked stream: reading can start again here."""
    row: dict[str, Any] | SampleError | None
    """None: not wanted, so not parsed. That a stream broke is told even so."""


def compression_of(url: str) -> str | None:
    """What a name's ending says: gzip, zstd or nothing."""
    name = url.lower()
    return next((kind for ending, kind in COMPRESSIONS.items() if name.endswith(ending)), None)


def _all_rows(index: int) -> bool:
    return True


def iter_json_rows(
    file: BinaryIO,
    compression: str | None = None,
    wanted: Callable[[int], bool] = _all_rows,
    first_index: int = 0,
    first_offset: int = 0,
    max_line_bytes: int = 33_554_432,
) -> Iterator[JsonRow]:
    """Rows from the one with this index and offset on. The file must be seekable, and stays open.

    A compressed file is unpacked from its beginning, to find the offset. The store's own errors go through.
    """
    index = first_index
    lines = _split_lines(_read_blocks(file, compression, first_offset), first_offset, max_line_bytes)
    for number, (offset, line) in enumerate(lines, 1):
        if isinstance(line, SampleError):
            yield JsonRow(index, offset, line)
            return
        if offset == 0 and line is not None:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line is not None and not line.strip(BLANKS):
            continue
        place = f"Row {index} (counted from 0)" if first_offset else f"Line {number}"
        yield JsonRow(index, offset, _parse_line(line, place, max_line_bytes) if wanted(index) else None)
        index += 1


def _parse_line(line: bytes | None, place: str, max_line_bytes: int) -> dict[str, Any] | SampleError:
    if line is None:
        return SampleError("row_too_long", f"{place} has more than {max_line_bytes} bytes, the limit.")
    try:
        value = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return SampleError("row_invalid", f"{place} is not valid UTF-8 at byte {error.start} of the line.")
    except ValueError as error:
        return SampleError("row_invalid", f"{place} is not valid JSON: {error}.")
    if not isinstance(value, dict):
        return SampleError("row_invalid", f"{place} is not a JSON object but {_kind_of(value)}.")
    return value


def _kind_of(value: Any) -> str:
    kinds = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


class _RefusedNumberError(ValueError):
    pass


def _refuse_constant(name: str) -> float:
    raise _RefusedNumberError(f"{name} is no JSON number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _RefusedNumberError(f"the number {digits:.40} is too large")
    return value


_decoder = json.JSONDecoder(parse_float=_finite_float, parse_constant=_refuse_constant)


def parse_json(text: str) -> Any:
    """One JSON value by the letter of the standard, without NaN and infinities; raises ValueError, in few words.

    Of a key that stands twice, the last counts. A lone surrogate, written as an escape, stays in its string.
    """
    try:
        return _decoder.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg.removesuffix(' at')} at character {error.pos}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except _RefusedNumberError:
        raise
    except ValueError as error:  # Python's limit on the digits of an integer
        raise ValueError("an integer has too many digits") from error


def _split_lines(
    blocks: Iterator[bytes | SampleError], offset: int, max_line_bytes: int
) -> Iterator[tuple[int, bytes | SampleError | None]]:
    """(offset, line without its end); None for a line that is too long, of which never more than the limit is held.

    A broken stream's error stands where the line began that was being read.
    """
    parts: list[bytes] = []
    size = 0
    for block in blocks:
        if isinstance(block, SampleError):
            yield offset, block
            return
        *ended, rest = block.split(b"\n")
        for piece in ended:
            size += len(piece)
            yield offset, b"".join([*parts, piece]) if size <= max_line_bytes else None
            offset += size + 1
            parts, size = [], 0
        size += len(rest)
        parts.append(rest)
        if size > max_line_bytes:
            parts = []
    if size:
        yield offset, b"".join(parts) if size <= max_line_bytes else None


def _read_blocks(file: BinaryIO, compression: str | None, first_offset: int) -> Iterator[bytes | SampleError]:
    """The unpacked stream from this offset on, in pieces; an error is the last of them."""
    position = 0 if compression else first_offset
    read = _open_reader(file, compression, position)
    while True:
        try:
            block = read(BLOCK_BYTES)
        except (EOFError, OSError, zlib.error) as error:
            if is_of_machine(error):
                raise
            reason = f"what follows byte {position} of the unpacked stream cannot be read: {error}"
            yield SampleError("shard_damaged", f"The {compression} file is damaged; {reason}.")
            return
        if not block:
            return
        position += len(block)
        if position > first_offset:
            yield block[max(0, len(block) - (position - first_offset)) :]


def _open_reader(file: BinaryIO, compression: str | None, position: int) -> Callable[[int], bytes]:
    file.seek(position)
    source = io.BufferedReader(_Borrowed(file), REQUEST_BYTES)
    if compression is None:
        return source.read
    if compression not in COMPRESSIONS.values():
        raise ValueError(f"{compression} is no compression that is read here")
    if not source.peek(1):  # both libraries take no bytes for an empty stream, but even that has a header
        return _refuse_empty
    if compression == "gzip":
        return gzip.GzipFile(fileobj=source).read1  # read1 gives all that stands before a break, read does not
    stream = pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd")
    return cast(Callable[[int], bytes], stream.read)


def _refuse_empty(size: int) -> bytes:
    raise EOFError("it has no bytes at all")


class _Borrowed(io.RawIOBase):
    """A file that stays open when gzip and Arrow close what they were given."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
