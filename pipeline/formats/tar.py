"""WebDataset tars as a stream of samples: consecutive files with one key, in the tar's order.

Damage is never silent: each range of bytes that cannot be read comes out as a gap in its place, and reading goes on at
the next header. `tarfile` parses each header; the walk from header to header is ours, for `TarFile` ends quietly at a
broken header or a cut, and takes a store's errors for the tar's. A sample whose own file is cut becomes the gap; one
that stands beside a gap may lack the files that the gap took. Reading from the `offset` of any sample or gap gives the
same rest.

A key is the path up to the first dot of the base name, an extension what follows the dot; a file without a dot has the
extension "". An extension that the sample has already starts another sample with the same key. A link or device is a
refused member. Passed over: folders, base names that start with a dot, `__MACOSX` folders, and what stands in or is
named `__like_this__`, as in WebDataset. A tar ends in a block of zeros: without one it may be cut, which is a gap too.

Not covered: damage within data or long names, for which a tar has no checksum. A gzip has one at its end: if it is
wrong, the gap at the end is all that says so. Zeros over whole files look like the seam of two tars. Behind lost or
added bytes, if not whole blocks of 512, all is a gap. Where the header of a tar within the tar is broken, the inner
files show through. Sparse files are gaps, global pax headers are ignored.
"""

import gzip
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import BinaryIO

from pipeline.errors import SampleError

BLOCK = tarfile.BLOCKSIZE
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENSIONS = (*PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
"""Kinds of headers that stand before a file's own."""
MAX_EXTENSION_BYTES = 1_048_576
"""Linux takes no path of more than 4,096 bytes; extended attributes stand here too."""
MAX_SIZE = 10**18
"""More than any file has; below it, positions fit 64 bits."""
PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=\n]+)=")
GZIP_STEP_BYTES = 131_072


@dataclass(frozen=True)
class TarSample:
    """Consecutive members with one key, or a gap, which has `damage`, no key and no members."""

    index: int
    """Number in the tar; gaps count too."""
    key: str
    offset: int
    """Byte of the (uncompressed) tar at which its first header stands: reading can start again there."""
    members: Mapping[str, bytes | SampleError] | None
    """By extension, in lower case, in the tar's order; None when not wanted or damaged."""
    damage: str | None = None
    """One sentence: what cannot be read, from which byte to which."""


@dataclass(frozen=True)
class _Member:
    """A file in the tar; `offset` is its first header, pax and long names included."""

    name: str
    kind: bytes
    offset: int
    data_offset: int
    size: int

    @property
    def end(self) -> int:
        return self.data_offset + padded(self.size)


@dataclass(frozen=True)
class _Unreadable:
    """Not a header, or one that cannot be trusted; `end` is where to look for the next."""

    why: str
    end: int


@dataclass(frozen=True)
class _Gap:
    offset: int
    damage: str


class _PlainTape:
    """An uncompressed tar: bytes by offset, fewer where it ends."""

    fault: str | None = None

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.end = file.seek(0, os.SEEK_END)

    def read(self, offset: int, num_bytes: int) -> bytes:
        num_bytes = min(num_bytes, self.end - offset)
        if num_bytes <= 0:
            return b""
        self._file.seek(offset)
        data = self._file.read(num_bytes)
        while len(data) < num_bytes and (more := self._file.read(num_bytes - len(data))):
            data += more
        return data

    def reaches(self, offset: int) -> bool:
        return offset <= self.end


class _GzipTape:
    """A gzipped tar: forward only. Read in equal steps, so that damage hides the same bytes wherever reading starts."""

    def __init__(self, file: BinaryIO) -> None:
        file.seek(0)
        self._gzip = gzip.GzipFile(fileobj=file, mode="rb")
        self._step = b""
        self._used = 0
        self.end = 0  # of what was read
        self.fault: str | None = None

    def read(self, offset: int, num_bytes: int) -> bytes:
        return b"".join(self._pieces(num_bytes)) if self.reaches(offset) else b""

    def reaches(self, offset: int) -> bool:
        for _ in self._pieces(offset - self.end):
            pass
        return offset <= self.end

    def _pieces(self, num_bytes: int) -> Iterator[bytes]:
        while num_bytes > 0 and (self._used < len(self._step) or self._take_step()):
            piece = self._step[self._used : self._used + num_bytes]
            self._used += len(piece)
            self.end += len(piece)
            num_bytes -= len(piece)
            yield piece

    def _take_step(self) -> bool:
        if self.fault is None:
            try:
                # Unlike `read`, it gives all that stands before the damage (but for what one step unpacks).
                self._step, self._used = self._gzip.read1(GZIP_STEP_BYTES), 0
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:  # other OSErrors are the store's
                self._step, self.fault = b"", f"gzip breaks off ({error})"
        return len(self._step) > self._used


_Tape = _PlainTape | _GzipTape


def iter_tar_samples(
    file: BinaryIO,
    wanted: Callable[[int], bool] = lambda index: True,
    first_index: int = 0,
    first_offset: int = 0,
    max_member_bytes: int = 33_554_432,
    compressed: bool = False,
) -> Iterator[TarSample]:
    """Samples and gaps from `first_offset` on, one in memory at a time; what is not `wanted` is not read."""
    tape = _GzipTape(file) if compressed else _PlainTape(file)
    numbers = count(first_index)
    sample: TarSample | None = None
    values: dict[str, bytes | SampleError] = {}
    for entry in _walk(tape, first_offset):
        key, extension = ("", "") if isinstance(entry, _Gap) else split_name(entry.name)
        if sample is not None and (isinstance(entry, _Gap) or sample.key != key or extension in values):
            yield sample
            sample = None
        if isinstance(entry, _Gap):
            yield TarSample(next(numbers), "", entry.offset, None, entry.damage)
            continue
        if sample is None:
            number, values = next(numbers), {}
            sample = TarSample(number, key, entry.offset, values if wanted(number) else None)
        value = _read_value(tape, entry, sample.members is not None, max_member_bytes)
        if value is None:
            damage = _damage(sample.offset, tape.end, f"{tape.fault or 'the tar ends'} within {_shown(entry.name)}")
            yield TarSample(sample.index, "", sample.offset, None, damage)
            return
        values[extension] = value
    if sample is not None:
        yield sample


def _read_value(tape: _Tape, member: _Member, wanted: bool, max_bytes: int) -> bytes | SampleError | None:
    """None when the tar ends within the data; empty when not wanted."""
    if member.kind not in tarfile.REGULAR_TYPES:
        message = f"{_shown(member.name)} is a link, a device or another special file, which is not read."
        return SampleError("member_refused", message)
    if wanted and member.size <= max_bytes:
        data = tape.read(member.data_offset, member.size)
        return data if len(data) == member.size else None
    if not tape.reaches(member.data_offset + member.size):
        return None
    message = f"{_shown(member.name)} has {member.size} bytes, the limit is {max_bytes}."
    return SampleError("image_too_many_bytes", message) if wanted else b""


def _walk(tape: _Tape, position: int) -> Iterator[_Member | _Gap]:
    """All members and gaps; nothing of a member's data is read here."""
    start: int | None = None
    why, ended = "", False
    while block := tape.read(position, BLOCK):
        if block.count(0) == len(block):
            ended = ended or len(block) == BLOCK
            position += len(block)
            continue
        ended = False
        if start is not None and block[257:262] != b"ustar":  # data now and then passes for a header without magic
            position += BLOCK
            continue
        found = _read_member(tape, position, block)
        if isinstance(found, _Unreadable):
            start, why = (position, found.why) if start is None else (start, why)
        else:
            if start is not None:
                yield _Gap(start, _damage(start, position, why))
                start = None
            if found.kind != tarfile.DIRTYPE and not _is_passed_over(found.name):
                yield found
        position = found.end
    if start is not None:
        yield _Gap(start, _damage(start, tape.end, tape.fault or why))
    elif tape.fault is not None:
        yield _Gap(tape.end, f"The tar cannot be read from byte {tape.end} on: {tape.fault}.")
    elif not ended:
        yield _Gap(tape.end, f"The tar ends at byte {tape.end} without the zeros that end a tar: it may be cut there.")


def _read_member(tape: _Tape, offset: int, block: bytes) -> _Member | _Unreadable:
    """The member whose first block is this one; pax headers and GNU's long names are joined to it."""
    records: dict[bytes, bytes] = {}
    position, fault = offset, ""
    while (info := _parse_header(block)) is not None:
        position += BLOCK
        if info.type not in EXTENSIONS:
            return _join_member(info, records, offset, position, fault)
        try:
            payload = tape.read(position, min(info.size, MAX_EXTENSION_BYTES + 1))
            records = _parse_extension(info.type, payload) | records  # as in tarfile, the first of several counts
        except ValueError as error:
            fault = fault or f"the header at byte {position - BLOCK} cannot be used, for {error}"
        position += padded(info.size)
        block = tape.read(position, BLOCK)
    place = "the tar ends within a header" if len(block) < BLOCK else f"no header of a file stands at byte {position}"
    return _Unreadable(fault or place, position + BLOCK)


def _parse_header(block: bytes) -> tarfile.TarInfo | None:
    """None where its checksum or a number in it is wrong.

    Older Pythons take sizes below zero, which lead back (CVE-2025-8194), and all take a checksum of 0, which data can
    match (python/cpython#130577).
    """
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return info if 0 <= info.size < MAX_SIZE and info.chksum > 0 else None


def _parse_extension(kind: bytes, payload: bytes) -> dict[bytes, bytes]:
    """Pax records, or a long name as one; raises ValueError. `TarFile` drops broken records without a word."""
    if len(payload) > MAX_EXTENSION_BYTES:
        raise ValueError(f"it has more than {MAX_EXTENSION_BYTES} bytes")
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {b"path": payload.partition(b"\0")[0]}
    records: dict[bytes, bytes] = {}
    position = 0 if kind in PAX else len(payload)
    while position < len(payload):
        match = PAX_RECORD.match(payload, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(payload) or payload[end - 1] != ord("\n"):
            raise ValueError("its records do not fit")
        if match[2].startswith(b"GNU.sparse."):
            raise ValueError("it is of a sparse file, which is not read")
        if match[2] in (b"path", b"size"):
            records[match[2]] = payload[match.end() : end - 1]
        position = end
    return records


def _join_member(
    info: tarfile.TarInfo, records: dict[bytes, bytes], offset: int, data_offset: int, fault: str
) -> _Member | _Unreadable:
    name = (records.get(b"path") or b"").decode("utf-8", "surrogateescape") or info.name
    size = records.get(b"size") or str(info.size).encode()
    if info.type == tarfile.GNUTYPE_SPARSE:
        fault = fault or f"{_shown(name)} is a sparse file, which is not read"
    if not re.fullmatch(rb"\d{1,18}", size):
        size, fault = b"0", fault or f"{_shown(name)} has no size"
    if not name:
        fault = fault or f"the file at byte {offset} has no name"
    has_data = info.type in tarfile.REGULAR_TYPES or info.type not in tarfile.SUPPORTED_TYPES
    member = _Member(name, info.type, offset, data_offset, int(size) if has_data else 0)
    return _Unreadable(fault, member.end) if fault else member


def split_name(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _is_passed_over(name: str) -> bool:
    first, *_ = parts = name.split("/")
    return parts[-1].startswith(".") or "__MACOSX" in parts or (first.startswith("__") and first.endswith("__"))


def padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _damage(start: int, end: int, why: str) -> str:
    return f"Bytes {start} to {end} of the tar cannot be read: {why}; the samples beside them may lack files."


def _shown(name: str) -> str:
    return repr(name if len(name) <= 200 else "..." + name[-200:])
