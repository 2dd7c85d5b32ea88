"""A job's output as `r4b publish` reads it: which parts there are, what their footers say, and their rows.

Everything is tied to the version that the listing showed: a part that is replaced or removed meanwhile stops the
publish, so that a version never mixes two states. Footers and small parts are fetched ahead, a few at a time.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.commits import JOB_FILE, MANIFEST_FILE, PART_NAME, SUCCESS_FILE, read_job_file
from pipeline.errors import JobError, ShardChangedError, SpecError
from pipeline.spec import StorageSpec
from pipeline.storage import ObjectInfo, absolute_url, join_url, open_store

READS_AT_ONCE = 8
ITEMS_AHEAD = 32
BYTES_AHEAD = 64 << 20
"""Of parts that are fetched whole and wait their turn."""
WHOLE_BYTES = 32 << 20
"""A larger part is not fetched whole, but read as it is used."""
BATCH_BYTES = 8 << 20
"""Of rows in memory that are read from a part at a time."""
MAX_BATCH_ROWS = 1 << 16
READ_BUFFER_BYTES = 1 << 20
UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Source:
    """A job's output as it was found. `manifest` is the job's own, or None while the job is not finished."""

    url: str
    storage: StorageSpec
    name: str
    fingerprint: str
    of_folders: bool
    """Whether its shards are folders of images, whose chunks are not ranges of one file."""
    manifest: dict[str, Any] | None = None
    manifest_version: str | None = None

    @property
    def finished(self) -> bool:
        return self.manifest is not None


@dataclass(frozen=True)
class Part:
    """A part as the listing shows it."""

    url: str
    chunk_id: str
    version: str
    size: int

    @property
    def info(self) -> ObjectInfo:
        return ObjectInfo(self.url, self.version, self.size)


@dataclass(frozen=True)
class Footer:
    """What a part says of itself. `num_bytes` are those of its compressed columns."""

    part: Part
    shard: str
    start: int
    stop: int
    first_id: str
    """The least `sample_id`: it orders the parts of a folder."""
    num_rows: int
    num_bytes: int
    model: str
    revision: str
    schema: pa.Schema
    rows_by_value: dict[Any, int] = field(default_factory=dict)
    """Rows by value of the column to partition by; without one, all rows under None."""


def open_source(output_url: str, storage: StorageSpec, unfinished: bool) -> Source:
    """Raises SpecError if this is no output, or one that is not finished and need not be taken as it is."""
    url = absolute_url(output_url).rstrip("/")
    job = read_job_file(url, storage)
    source = Source(
        url, storage, str(job["name"]), job["fingerprint"], job["made_with"].get("input.format") == "images"
    )
    store = open_store(url, storage)
    info = store.stat(join_url(url, MANIFEST_FILE))
    if info is None or store.stat(join_url(url, SUCCESS_FILE)) is None:
        if unfinished:
            return source
        raise SpecError(
            f"{url} is not finished: there is no {SUCCESS_FILE}. Finish it with `r4b run`, or publish the parts that "
            "are there with --unfinished."
        )
    try:
        manifest = json.loads(store.read(info.url, info.version))
        manifest = {**manifest, "num_chunks": int(manifest["num_chunks"]), "num_rows": int(manifest["num_rows"])}
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{info.url} is not a manifest of this software.") from error
    return replace(source, manifest=manifest, manifest_version=info.version)


def check_unchanged(source: Source) -> None:
    """Raises JobError if a finished output was reopened, and perhaps finished again, since it was opened."""
    info = open_store(source.url, source.storage).stat(join_url(source.url, MANIFEST_FILE))
    if source.finished and (info is None or info.version != source.manifest_version):
        raise JobError(f"{source.url} changed while it was published: a job ran there. Run the command again.")


def list_parts(source: Source, with_stale: bool) -> Iterator[Part]:
    """The parts in the order of their names; without those that the job's manifest calls stale, unless asked for."""
    folder = join_url(source.url, "data") + "/"
    stale = frozenset(() if with_stale or source.manifest is None else source.manifest.get("stale_parts", ()))
    for info in open_store(folder, source.storage).list(folder):
        match = PART_NAME.fullmatch(info.url.removeprefix(folder))
        if match and match[1] not in stale:
            yield Part(info.url, match[1], info.version, info.size)


def read_footers(source: Source, parts: Iterable[Part], column: str | None) -> Iterator[Footer]:
    """The footers of many parts, in order; with `column`, how many rows each of its values has."""
    return in_order(parts, lambda part: _read_footer(source, part, column), lambda part: 0)


def _read_footer(source: Source, part: Part, column: str | None) -> Footer:
    with _named(part), open_store(part.url, source.storage).open_listed(part.info) as file:
        parquet = pq.ParquetFile(file, pre_buffer=False)
        metadata, schema = parquet.metadata, parquet.schema_arrow
        ours = {key.decode(): value.decode() for key, value in (metadata.metadata or {}).items() if key[:4] == b"r4b."}
        if missing := {"r4b.shard", "r4b.start", "r4b.stop", "r4b.fingerprint"} - set(ours):
            raise JobError(f"{part.url} was not written by this software: its footer lacks {min(missing)}.")
        if ours["r4b.fingerprint"] != source.fingerprint:
            raise JobError(f"{part.url} was made with other settings than {JOB_FILE} says: another run writes here.")
        values = {None: metadata.num_rows} if column is None else _count_values(parquet, column, part)
        groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
        columns = [group.column(n) for group in groups for n in range(group.num_columns)]
        ids = [one.statistics for one in columns if one.path_in_schema == "sample_id"]
        return Footer(
            part,
            ours["r4b.shard"],
            int(ours["r4b.start"]),
            int(ours["r4b.stop"]),
            min((str(one.min) for one in ids if one is not None and one.has_min_max), default=""),
            metadata.num_rows,
            sum(one.total_compressed_size for one in columns),
            ours.get("r4b.model", ""),
            ours.get("r4b.revision", ""),
            schema.remove_metadata(),
            {value: rows for value, rows in values.items() if rows},
        )


def _count_values(parquet: pq.ParquetFile, column: str, part: Part) -> dict[Any, int]:
    if column not in parquet.schema_arrow.names:
        known = ", ".join(parquet.schema_arrow.names)
        raise SpecError(f"--partition-by: the parts have no column {column!r}; they have {known}.")
    counts: dict[Any, int] = {}
    for batch in parquet.iter_batches(MAX_BATCH_ROWS, columns=[column], use_threads=False):
        for pair in pc.value_counts(plain(batch.column(0))).to_pylist():
            counts[pair["values"]] = counts.get(pair["values"], 0) + pair["counts"]
    return counts


def plain(array: pa.Array) -> pa.Array:
    """An array, decoded if it is a dictionary."""
    return array.cast(array.type.value_type) if pa.types.is_dictionary(array.type) else array


def fetch_parts(source: Source, parts: Iterable[tuple[Part, Item]]) -> Iterator[tuple[tuple[Part, Item], BinaryIO]]:
    """Parts, each with something that belongs to it, as open files; the next ones are fetched meanwhile."""

    def fetch(pair: tuple[Part, Item]) -> tuple[tuple[Part, Item], BinaryIO]:
        part = pair[0]
        with _named(part):
            file = open_store(part.url, source.storage).open_listed(part.info)
            if part.size > WHOLE_BYTES:
                return pair, file
            with file:
                return pair, pa.BufferReader(pa.py_buffer(file.read()))

    return in_order(parts, fetch, lambda pair: pair[0].size if pair[0].size <= WHOLE_BYTES else 0)


def read_batches(part: Part, file: BinaryIO, num_rows: int) -> Iterator[pa.RecordBatch]:
    """A part's rows, some megabytes at a time, always cut alike; raises JobError unless there are `num_rows`."""
    with _named(part), file:
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BUFFER_BYTES)
        groups = [parquet.metadata.row_group(n) for n in range(parquet.metadata.num_row_groups)]
        unpacked = sum(group.total_byte_size for group in groups)
        rows_at_once = min(MAX_BATCH_ROWS, max(1, BATCH_BYTES * num_rows // max(1, unpacked)))
        found = 0
        for batch in parquet.iter_batches(rows_at_once, use_threads=False):
            batch.validate(full=True)
            found += batch.num_rows
            yield batch
        if found != num_rows:
            raise JobError(f"{part.url} is damaged: it has {found} rows where its footer says {num_rows}.")


@contextmanager
def _named(part: Part) -> Iterator[None]:
    """Turn what is wrong with a part into a JobError that names it."""
    try:
        yield
    except ShardChangedError as error:
        raise JobError(f"{part.url} was replaced or removed while it was published. Run the command again.") from error
    except UNREADABLE as error:
        told = " ".join(str(error).split())[:300]
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:  # Arrow's OSErrors have none
            raise JobError(f"{part.url} cannot be read here: {told}. Nothing is published; run it again.") from error
        raise JobError(
            f"{part.url} is damaged, or no Parquet file: {told}. Nothing is published. Delete that part and `r4b run` "
            "the job again to redo it."
        ) from error


def in_order(items: Iterable[Item], load: Callable[[Item], Loaded], size_of: Callable[[Item], int]) -> Iterator[Loaded]:
    """Load items with several threads, and yield them in order; few of them, and few bytes, wait at any time."""
    waiting: deque[tuple[int, Future[Loaded]]] = deque()
    num_bytes = 0
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        try:
            for item in items:
                waiting.append((size_of(item), pool.submit(load, item)))
                num_bytes += waiting[-1][0]
                while len(waiting) > ITEMS_AHEAD or num_bytes > BYTES_AHEAD:
                    size, loading = waiting.popleft()
                    yield loading.result()
                    num_bytes -= size
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, loading in waiting:
                loading.cancel()
