"""Parquet shards. Chunks follow row groups: whole ones while they fit, pieces of one that is larger than a chunk.

Only the columns that the job needs are read, a few rows at a time and page by page, so that a row group of any size
costs no more memory than a small one. A row group that cannot be read gives an error for each of its rows.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from pipeline.errors import (
    JobError,
    SampleError,
    ShardChangedError,
    SpecError,
    StoreUnavailableError,
    is_of_machine,
)
from pipeline.formats.contract import Head, Listing, Note, Sample, Span, Wanted, check_filter, damaged
from pipeline.formats.sources import to_sources
from pipeline.records import Anchor, Chunk, Shard
from pipeline.spec import JobSpec
from pipeline.storage import open_store

FOOTERS_AT_ONCE = 16
ROWS_AT_ONCE = 16
"""Rows whose images are held as they were read."""
PAGE_BUFFER_BYTES = 1 << 20
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""The last for names of columns that are not UTF-8."""


class ParquetFormat:
    """See the module."""

    extensions = frozenset({".parquet", ".pq"})
    companions: frozenset[str] = frozenset()

    def look(self, job: JobSpec, listings: Iterable[Listing]) -> Head:
        """As the contract says; raises SpecError if no shard at all can be read. Those without rows say nothing."""
        first: Exception | None = None
        for listing in listings:
            try:
                schema, sizes, _ = _read_footer(job, listing)
            except UNREADABLE as error:
                first = first or SpecError(f"input.url: {listing.info.url} is not a readable Parquet file: {error}")
                continue
            if sum(sizes):
                check_columns(job, listing.info.url, schema)
                return Head(_typed_columns(job, schema))
        raise first or SpecError(f"input.url: the input {', '.join(job.input.urls)} has no rows.")

    def cut(self, job: JobSpec, listings: Iterator[Listing], head: Head, note: Note) -> Iterator[Chunk | Shard]:
        """As the contract says. Row groups that `input.where` rules out by their statistics are no part of the plan."""
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            while batch := list(islice(listings, 256)):  # a bounded number of footers at a time
                for listing, footer in zip(batch, pool.map(lambda one: _try_footer(job, one), batch), strict=True):
                    yield from _cut_shard(job, listing, footer, head)

    def read(self, job: JobSpec, span: Span, schema: pa.Schema, wanted: Wanted) -> Iterator[Sample]:
        """As the contract says."""
        store = open_store(span.shard.url, job.storage, job.limits.fetch_timeout_s)
        with store.open(span.shard.url, span.shard.version) as file:
            shard = pq.ParquetFile(file, pre_buffer=False, buffer_size=PAGE_BUFFER_BYTES)
            names = columns_to_read(job, set(shard.schema_arrow.names))
            row = span.anchor.sample
            for group in range(span.anchor.position, shard.metadata.num_row_groups):
                if span.stop is not None and row >= span.stop:
                    return
                rows = shard.metadata.row_group(group).num_rows
                yield from _read_group(job, span, shard, group, row, names, wanted)
                row += rows


FORMAT = ParquetFormat()


def cut_row_groups(sizes: Iterable[int], chunk_rows: int) -> Iterator[tuple[int, int, Anchor, range]]:
    """(start, stop, anchor, row groups) of each chunk, from the row groups' sizes."""
    start = row = first = 0  # what is gathered: rows from `start` to `row`, row groups from `first` on
    group = -1
    for group, size in enumerate(sizes):
        if row > start and row - start + size > chunk_rows:
            yield start, row, Anchor(start, first), range(first, group)
            start, first = row, group
        row += size
        if row - start > chunk_rows:  # one row group, larger than a chunk
            for piece in range(start, row, chunk_rows):
                yield piece, min(piece + chunk_rows, row), Anchor(start, first), range(first, group + 1)
            start, first = row, group + 1
    if row > start:
        yield start, row, Anchor(start, first), range(first, group + 1)


def check_columns(job: JobSpec, shard: str, schema: pa.Schema) -> None:
    """Every column that the spec names must be there and, for images, be of a kind that can be read."""
    columns = job.input.columns
    wanted = dict.fromkeys(columns.images, "input.columns.image")
    if columns.id is not None and ("id" in columns.model_fields_set or columns.id in schema.names):
        wanted[columns.id] = "input.columns.id"
    wanted |= {name: f"prompts.{prompt.id}" for prompt in job.spec_prompts for name in sorted(prompt.columns)}
    wanted |= dict.fromkeys(sorted(job.input.filter_columns), "input.where")
    wanted |= dict.fromkeys(job.output.keep_columns, "output.keep_columns")
    for name, key in wanted.items():
        if name not in schema.names:
            raise SpecError(f"{key}: {shard} has no column {name!r}; it has {', '.join(schema.names)}.")
        if schema.names.count(name) > 1:
            raise SpecError(f"{key}: {shard} has several columns {name!r}.")
    for name in columns.images:
        if not _holds_images(schema.field(name).type):
            raise SpecError(
                f"input.columns.image: column {name!r} of {shard} is {schema.field(name).type}; "
                "it must hold bytes, a path or URL, a struct of bytes and path, or a list of one of these."
            )
    check_filter(job, shard, schema)


def _holds_images(kind: pa.DataType) -> bool:
    types = pa.types
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    if any(is_kind(kind) for is_kind in lists):
        kind = kind.value_type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        return any(kind.get_field_index(name) >= 0 for name in ("bytes", "path"))
    return any(
        is_kind(kind)
        for is_kind in (
            types.is_binary,
            types.is_large_binary,
            types.is_fixed_size_binary,
            types.is_binary_view,
            types.is_string,
            types.is_large_string,
            types.is_string_view,
        )
    )


def _typed_columns(job: JobSpec, schema: pa.Schema) -> pa.Schema:
    names = [*job.output.keep_columns, *sorted(job.input.filter_columns - set(job.output.keep_columns))]
    return pa.schema([pa.field(name, schema.field(name).type, metadata=schema.field(name).metadata) for name in names])


def _read_footer(job: JobSpec, listing: Listing) -> tuple[pa.Schema, list[int], frozenset[int] | None]:
    """Schema, sizes of the row groups, and which of them `input.where` may hold for (None: all)."""
    try:
        with open_store(listing.info.url, job.storage).open(listing.info.url) as file:
            footer = pq.ParquetFile(file)
            sizes = [footer.metadata.row_group(group).num_rows for group in range(footer.metadata.num_row_groups)]
            possible = None if job.input.filter is None else _possible_groups(file, job.input.filter)
            return footer.schema_arrow, sizes, possible
    except StoreUnavailableError as error:
        raise SpecError(f"input.url: {error}") from error
    except JobError as error:
        raise OSError(str(error)) from error
    except OSError as error:
        if is_of_machine(error):
            raise SpecError(f"input.url: {listing.info.url} cannot be read: {error.strerror}.") from error
        raise


def _possible_groups(file: BinaryIO, where: pc.Expression) -> frozenset[int] | None:
    try:
        fragment = pads.ParquetFileFormat().make_fragment(pa.PythonFile(file, "r"))
        return frozenset(group.id for group in fragment.subset(filter=where).row_groups)
    except (pa.ArrowException, NotImplementedError):  # `check_columns` says why it does not fit
        return None


def _try_footer(job: JobSpec, listing: Listing) -> tuple[pa.Schema, list[int], frozenset[int] | None] | str:
    try:
        return _read_footer(job, listing)
    except UNREADABLE as error:
        return f"{listing.info.url} is not a readable Parquet file: {' '.join(str(error).split())[:300]}"


def _cut_shard(job: JobSpec, listing: Listing, footer: Any, head: Head) -> Iterator[Chunk]:
    if isinstance(footer, str):
        yield listing.shard.chunk(0, 1, damage=footer)
        return
    schema, sizes, possible = footer
    if not sum(sizes):
        return  # writers do not know the types of columns without a value
    check_columns(job, listing.info.url, schema)
    for expected in head.schema:
        if schema.field(expected.name).type != expected.type:
            raise SpecError(
                f"{'output.keep_columns' if expected.name in job.output.keep_columns else 'input.where'}: column "
                f"{expected.name!r} is {expected.type} in the first shard and {schema.field(expected.name).type} "
                f"in {listing.info.url}."
            )
    for start, stop, anchor, groups in cut_row_groups(sizes, job.output.chunk_rows):
        if possible is None or not possible.isdisjoint(groups):
            yield listing.shard.chunk(start, stop, anchor=anchor)


def columns_to_read(job: JobSpec, names: set[str]) -> list[str]:
    """The columns that must be read from a shard: nothing else is."""
    columns = job.input.columns
    wanted = {*columns.images, *job.output.keep_columns, *job.input.filter_columns}
    wanted = wanted.union(*(prompt.columns for prompt in job.spec_prompts))
    if columns.id is not None and columns.id in names:
        wanted.add(columns.id)
    return sorted(wanted)


def _read_group(
    job: JobSpec, span: Span, shard: pq.ParquetFile, group: int, first_row: int, names: list[str], wanted: Wanted
) -> Iterator[Sample]:
    """One row group's samples; what cannot be read of it comes as errors."""
    row, end = first_row, first_row + shard.metadata.row_group(group).num_rows
    stop = end if span.stop is None else min(end, span.stop)
    while row < stop and not wanted(row):
        yield Sample(row, None)
        row += 1
    if row == stop:
        return
    row = first_row
    try:
        for batch in shard.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=names, use_threads=False):
            for sample in _batch_samples(job, span, batch, row, wanted):
                if sample.index >= stop:
                    return
                yield sample
            row += batch.num_rows
        if row < stop:  # Arrow gives fewer rows than the footer says, where a page is damaged in its head
            raise OSError(f"it ends after {row - first_row} of its {end - first_row} rows")
    except ShardChangedError:
        raise
    except UNREADABLE as error:
        if is_of_machine(error):
            raise
        told = " ".join(str(error).split())[:300]
        why = f"{span.shard.url}: row group {group} cannot be read from row {row} on: {told}"
        yield from (damaged(index, why, group) for index in range(row, stop))


def _batch_samples(job: JobSpec, span: Span, batch: pa.RecordBatch, first_row: int, wanted: Wanted) -> Iterator[Sample]:
    passes = _passing(job, batch)
    for n in range(batch.num_rows):
        if not (wanted(first_row + n) and passes[n]):
            yield Sample(first_row + n, None, passes=passes[n])
            continue
        try:
            yield _to_sample(job, span, batch.slice(n, 1), first_row + n)
        except (ValueError, OverflowError, pa.ArrowException) as error:  # text that is no UTF-8, a time beyond Python's
            message = f"Row {first_row + n} of {span.shard.url} holds a value that cannot be read: {error}."
            yield Sample(first_row + n, None, error=SampleError("row_invalid", message))


def _to_sample(job: JobSpec, span: Span, row: pa.RecordBatch, index: int) -> Sample:
    columns = job.input.columns
    names = sorted(frozenset().union(*(prompt.columns for prompt in job.spec_prompts)))
    sample_id = row.column(columns.id)[0].as_py() if columns.id in row.schema.names else None
    kept = pa.Table.from_batches([row.select(job.output.keep_columns)])
    kept.validate(full=True)  # a part with text that is no UTF-8 is one that others cannot read
    return Sample(
        index,
        None if sample_id is None else str(sample_id),
        {name: row.column(name)[0].as_py() for name in names},
        to_sources([row.column(name)[0].as_py() for name in columns.images], span.shard.url),
        kept=kept,
    )


def _passing(job: JobSpec, batch: pa.RecordBatch) -> list[bool]:
    if job.input.filter is None:
        return [True] * batch.num_rows
    numbered = pa.table({**{name: batch.column(name) for name in job.input.filter_columns}, "": range(batch.num_rows)})
    kept = set(numbered.filter(job.input.filter).column("").to_pylist())
    return [n in kept for n in range(batch.num_rows)]
