"""JSONL manifests: a row a sample, with paths or URLs of images relative to the manifest.

How many rows a manifest has is not known before it is read, so its chunks get their names on the way.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.errors import JobError, SampleError, SpecError
from pipeline.formats.contract import Head, Listing, Note, Sample, Span, Wanted
from pipeline.formats.jsonlines import JsonRow, compression_of, iter_json_rows
from pipeline.formats.loose import HEAD_ROWS, keep_row, make_head, row_passes
from pipeline.formats.sources import to_sources
from pipeline.records import Chunk, Shard, valid_text
from pipeline.spec import JobSpec
from pipeline.storage import open_buffered


class JsonlFormat:
    """See the module."""

    extensions = frozenset(
        {f"{name}{packed}" for name in (".jsonl", ".ndjson") for packed in ("", ".gz", ".gzip", ".zst", ".zstd")}
    )
    companions: frozenset[str] = frozenset()

    def look(self, job: JobSpec, listings: Iterable[Listing]) -> Head:
        """As the contract says."""
        for listing in listings:
            rows = [row for row in self._first_rows(job, listing.shard) if not isinstance(row, SampleError)]
            if rows:
                _check_columns(job, rows, listing.info.url)
                return make_head(job, rows, listing.info.url)
        raise SpecError(f"input.url: no JSONL row can be read from {', '.join(job.input.urls)}.")

    def _first_rows(self, job: JobSpec, shard: Shard) -> list[Any]:
        try:
            with open_buffered(shard.url, job.storage, shard.version) as file:
                rows = iter_json_rows(file, find_compression(file, shard.url))
                return [row.row for row in islice(rows, HEAD_ROWS)]
        except (JobError, OSError) as error:
            raise SpecError(f"input.url: {error}") from error

    def cut(self, job: JobSpec, listings: Iterator[Listing], head: Head, note: Note) -> Iterator[Chunk | Shard]:
        """As the contract says."""
        return (listing.shard for listing in listings)

    def read(self, job: JobSpec, span: Span, schema: pa.Schema, wanted: Wanted) -> Iterator[Sample]:
        """As the contract says."""
        url = span.shard.url
        with open_buffered(url, job.storage, span.shard.version, job.limits.fetch_timeout_s) as file:
            compression = find_compression(file, url) if span.anchor.position == 0 else None
            rows = iter_json_rows(file, compression, wanted, span.anchor.sample, span.anchor.position)
            for row in rows:
                if span.stop is not None and row.index >= span.stop:
                    return
                # Nobody can seek in a compressed file: its samples have no position.
                yield _to_sample(job, span, row if compression is None else replace(row, offset=0), schema)


FORMAT = JsonlFormat()


def find_compression(file: BinaryIO, url: str) -> str | None:
    """By its first bytes, whatever its name, if it has any; leaves the file at its beginning."""
    magic = file.read(4)
    file.seek(0)
    if not magic:
        return compression_of(url)
    if magic[:2] == b"\x1f\x8b":
        return "gzip"
    return "zstd" if magic == b"\x28\xb5\x2f\xfd" else None


def _check_columns(job: JobSpec, rows: list[dict[str, Any]], url: str) -> None:
    present = sorted({name for row in rows for name in row})
    columns = job.input.columns
    wanted = dict.fromkeys(columns.images, "input.columns.image")
    if columns.id is not None and "id" in columns.model_fields_set:
        wanted[columns.id] = "input.columns.id"
    for name, key in wanted.items():
        if name not in present:
            raise SpecError(
                f"{key}: none of the first {len(rows)} rows of {url} has {name!r}; they have {', '.join(present)}."
            )


def _to_sample(job: JobSpec, span: Span, row: JsonRow, schema: pa.Schema) -> Sample:
    if row.row is None:
        return Sample(row.index, None, position=row.offset)
    if isinstance(row.row, SampleError):
        error = SampleError(row.row.error_type, f"{valid_text(span.shard.url)}: {row.row.message}")
        return Sample(row.index, None, position=row.offset, error=error)
    columns = job.input.columns
    named = None if columns.id is None else row.row.get(columns.id)
    sample_id = None if named is None else str(named)
    try:
        passes = row_passes(job, row.row, schema)
        kept = keep_row(row.row, job.output.keep_columns, schema) if passes else None
    except SampleError as error:
        return Sample(row.index, sample_id, row.row, position=row.offset, error=error)
    sources = to_sources([row.row.get(name) for name in columns.images], span.shard.url) if passes else ()
    return Sample(row.index, sample_id, row.row, sources, row.offset, kept, passes=passes)
