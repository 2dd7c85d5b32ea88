"""Loose image files in folders: the path is the id, and a text or JSON file of the same name is its columns.

A folder has no ranges that stay, for a new file would shift all that follow. Its files are grouped where a hash of
their names says so, so that a new file changes one chunk.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipeline.errors import JobError, SampleError, ShardChangedError, StoreUnavailableError
from pipeline.formats.contract import Head, ImageRef, Listing, Note, Sample, Span, Wanted
from pipeline.formats.loose import HEAD_ROWS, keep_row, make_head, row_passes
from pipeline.images import EXTENSIONS
from pipeline.records import Chunk, Shard, valid_text
from pipeline.spec import JobSpec
from pipeline.storage import open_store

SIDE_CARS = (".txt", ".json")
MAX_SIDE_CAR_BYTES = 16 << 20
FETCHES_AT_ONCE = 8
Member = tuple[tuple[str, str], ...]


class ImagesFormat:
    """See the module."""

    extensions = EXTENSIONS
    companions = frozenset(SIDE_CARS)

    def look(self, job: JobSpec, listings: Iterable[Listing]) -> Head:
        """As the contract says."""
        rows = []
        for listing in islice(listings, HEAD_ROWS):
            try:
                rows.append(_columns_of(job, listing.root, _member(listing)))
            except SampleError:
                continue  # such a sample becomes an error row; it says nothing about the others
        return make_head(job, rows, job.input.urls[0])

    def cut(self, job: JobSpec, listings: Iterator[Listing], head: Head, note: Note) -> Iterator[Chunk | Shard]:
        """As the contract says."""
        for folder, files in groupby(listings, key=lambda listing: listing.root):
            yield from _group_files(folder, map(_member, files), job.output.chunk_rows)

    def read(self, job: JobSpec, span: Span, schema: pa.Schema, wanted: Wanted) -> Iterator[Sample]:
        """As the contract says."""

        def to_sample(index: int) -> Sample:
            return _to_sample(job, span, index, schema) if wanted(index) else Sample(index, None)

        with ThreadPoolExecutor(FETCHES_AT_ONCE) as pool:
            yield from pool.map(to_sample, range(len(span.members)))


FORMAT = ImagesFormat()


def _member(listing: Listing) -> Member:
    return tuple((info.url, info.version) for info in (listing.info, *listing.companions))


def _group_files(folder: str, members: Iterator[Member], chunk_rows: int) -> Iterator[Chunk]:
    group: list[Member] = []
    for member in members:
        group.append(member)
        if len(group) == chunk_rows or _ends_group(member[0][0], chunk_rows):
            yield Chunk(folder, "", 0, len(group), tuple(group))
            group = []
    if group:
        yield Chunk(folder, "", 0, len(group), tuple(group))


def _ends_group(url: str, chunk_rows: int) -> bool:
    """True for about two names in `chunk_rows`, whatever their neighbours."""
    digest = hashlib.sha256(url.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8]) % max(2, chunk_rows // 2) == 0


def _to_sample(job: JobSpec, span: Span, index: int, schema: pa.Schema) -> Sample:
    member = span.members[index]
    path = _path_of(job, span.shard.url, member)
    columns: dict[str, Any] = {"id": path, "path": path}
    try:
        columns = _columns_of(job, span.shard.url, member)
        passes = row_passes(job, columns, schema)
        kept = keep_row(columns, job.output.keep_columns, schema) if passes else None
    except SampleError as error:
        return Sample(index, path, columns, error=error)
    return Sample(index, path, columns, (ImageRef(*member[0]),), kept=kept, passes=passes)


def _path_of(job: JobSpec, folder: str, member: Member) -> str:
    """The path below the folder; with several inputs the whole URL, for two folders may hold the same names."""
    url = member[0][0]
    if len(job.input.urls) == 1:
        url = url.removeprefix(folder.rstrip("/") + "/") if url != folder else url.rpartition("/")[2]
    return valid_text(url)  # a file name need not be UTF-8


def _columns_of(job: JobSpec, folder: str, member: Member) -> dict[str, Any]:
    """`id` and `path`, `txt`, and `json` as a whole and each of its fields; raises SampleError."""
    path = _path_of(job, folder, member)
    columns: dict[str, Any] = {"id": path, "path": path}
    for url, version in member[1:]:
        data = _read_side_car(job, url, version)
        if PurePosixPath(url).suffix.lower() == ".txt":
            columns["txt"] = data.decode("utf-8", "replace")
            continue
        try:
            columns["json"] = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise SampleError("row_invalid", f"{valid_text(url)} is not JSON: {error}.") from error
        if isinstance(columns["json"], dict):
            columns = {**columns["json"], **columns}
    return columns


def _read_side_car(job: JobSpec, url: str, version: str) -> bytes:
    try:
        with open_store(url, job.storage, job.limits.fetch_timeout_s).open(url, version) as file:
            data = file.read(MAX_SIDE_CAR_BYTES + 1)
    except StoreUnavailableError:  # no fault of this file: the job stops, and resumes when the store is back
        raise
    except (ShardChangedError, JobError, OSError) as error:
        raise SampleError("row_unreadable", f"{error}") from error
    if len(data) > MAX_SIDE_CAR_BYTES:
        raise SampleError("row_too_long", f"{valid_text(url)} has more than {MAX_SIDE_CAR_BYTES} bytes.")
    return data
