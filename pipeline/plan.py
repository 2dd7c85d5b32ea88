"""The plan: which chunks a job consists of. It lists shards and reads footers; it holds no rows and no images.

A chunk is named by its content (shard, version, range), never by its position in a run, so planning again after
new shards arrived gives the old chunks their old names. The files of a folder are grouped where a hash of their
names says so, not by counting: a new file then changes one chunk, not all that follow.
Not covered: reading samples.
"""

import hashlib
from collections.abc import Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import JobError, SpecError
from pipeline.images import EXTENSIONS
from pipeline.records import Chunk
from pipeline.spec import JobSpec
from pipeline.storage import ObjectInfo, absolute_url, glob_root, glob_to_regex, is_glob, join_url, open_store

FOLDER_COLUMNS = ("id", "path")
"""Columns that the files of a folder have."""


@dataclass(frozen=True)
class Plan:
    """A job's chunks, in the order of the input."""

    chunks: tuple[Chunk, ...]
    num_shards: int

    @property
    def num_samples(self) -> int:
        return sum(chunk.num_samples for chunk in self.chunks)

    def without(self, committed: Set[str]) -> "Plan":
        """The chunks that are still to do."""
        return replace(self, chunks=tuple(chunk for chunk in self.chunks if chunk.chunk_id not in committed))

    def stale(self, committed: Set[str]) -> list[str]:
        """Committed chunks that this plan does not have: their shards changed or are gone."""
        return sorted(committed - {chunk.chunk_id for chunk in self.chunks})


def make_plan(job: JobSpec) -> Plan:
    """List the shards and cut them into chunks; raises SpecError if there is nothing to read or a column is missing."""
    for url in job.input.urls:
        _check_apart(absolute_url(url), absolute_url(job.output.url))
    cut = _cut_parquet if job.input.format == "parquet" else _cut_folder
    shards: set[str] = set()
    chunks: list[Chunk] = []
    left = job.input.limit
    for chunk in cut(job):
        if left is not None:
            if left <= 0:
                break
            chunk = _shorten(chunk, left)
            left -= chunk.num_samples
        shards.add(chunk.shard)
        chunks.append(chunk)
    if not chunks:
        raise SpecError(f"input.url: the input {', '.join(job.input.urls)} has no rows.")
    return Plan(tuple(chunks), len(shards))


def _check_apart(input_url: str, output_url: str) -> None:
    part = part_url(output_url, "part")
    if part.startswith(input_url.rstrip("/") + "/") or (
        is_glob(input_url) and glob_to_regex(input_url).fullmatch(part)
    ):
        raise SpecError(f"output.url: parts of {output_url} would lie inside input.url, and be read as input.")


def _shorten(chunk: Chunk, num_samples: int) -> Chunk:
    if chunk.num_samples <= num_samples:
        return chunk
    return replace(chunk, stop=chunk.start + num_samples, members=chunk.members[:num_samples])


def _list_all(job: JobSpec, extensions: Set[str]) -> Iterator[tuple[str, ObjectInfo]]:
    """(folder of the input URL, file) of all files, each once, however many of the URLs reach it."""
    seen: set[str] = set()
    for url in job.input.urls:
        for info in _list_files(job, url, extensions):
            if info.url not in seen:
                seen.add(info.url)
                yield glob_root(absolute_url(url)), info


def _list_files(job: JobSpec, url: str, extensions: Set[str]) -> Iterator[ObjectInfo]:
    """The shards or images at `url`. A name given in full or by glob is taken as it is; a folder is filtered."""
    found = False
    try:
        for info in open_store(url, job.storage).list(absolute_url(url)):
            name = PurePosixPath(info.url)
            below = info.url.startswith(absolute_url(url).rstrip("/") + "/")
            named = info.url == absolute_url(url) or (is_glob(url) and not below)
            if named or (name.suffix.lower() in extensions and not name.name.startswith((".", "_"))):
                found = True
                yield info
    except (JobError, OSError) as error:
        raise SpecError(f"input.url: {error}") from error
    if not found:
        kind = "parquet" if job.input.format == "parquet" else "image"
        raise SpecError(f"input.url: no {kind} files at {url}; it must be a file, a folder or prefix, or a glob.")


def _cut_parquet(job: JobSpec) -> Iterator[Chunk]:
    rows = job.output.chunk_rows
    shards = (info for _, info in _list_all(job, {".parquet", ".pq"}))
    first: pa.Schema | None = None
    with ThreadPoolExecutor(16) as pool:
        while batch := list(islice(shards, 256)):  # a bounded number of footers at a time
            footers = pool.map(lambda info: _read_footer(job, info), batch)
            for info, (num_rows, schema) in zip(batch, footers, strict=True):
                check_columns(job, info.url, schema)
                first = first or schema
                _check_kept(job, info.url, schema, first)
                for start in range(0, num_rows, rows):
                    yield Chunk(info.url, info.version, start, min(start + rows, num_rows))


def _check_kept(job: JobSpec, shard: str, schema: pa.Schema, first: pa.Schema) -> None:
    """Parts must be of one schema, so kept columns must have one type in all shards."""
    for name in job.output.keep_columns:
        if schema.field(name).type != first.field(name).type:
            raise SpecError(
                f"output.keep_columns: column {name!r} is {first.field(name).type} in the first shard "
                f"and {schema.field(name).type} in {shard}."
            )


def _read_footer(job: JobSpec, info: ObjectInfo) -> tuple[int, pa.Schema]:
    try:
        with open_store(info.url, job.storage).open(info.url) as file:
            footer = pq.ParquetFile(file)
            return footer.metadata.num_rows, footer.schema_arrow
    except (pa.ArrowException, OSError, JobError) as error:
        raise SpecError(f"input.url: {info.url} is not a readable Parquet file: {error}") from error


def check_columns(job: JobSpec, shard: str, schema: pa.Schema) -> None:
    """Every column that the spec names must be there and, for the image, be of a kind that can be read."""
    columns = job.input.columns
    wanted = {columns.image: "input.columns.image"}
    if columns.id is not None and "id" in columns.model_fields_set:
        wanted[columns.id] = "input.columns.id"
    wanted |= {name: f"prompts.{prompt.id}" for prompt in job.prompts for name in sorted(prompt.columns)}
    wanted |= dict.fromkeys(job.output.keep_columns, "output.keep_columns")
    for name, key in wanted.items():
        if name not in schema.names:
            raise SpecError(f"{key}: {shard} has no column {name!r}; it has {', '.join(schema.names)}.")
    kind = schema.field(columns.image).type
    if not (_is_bytes(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)):
        raise SpecError(
            f"input.columns.image: column {columns.image!r} of {shard} is {kind}; "
            "it must hold bytes, or a struct with bytes."
        )


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _cut_folder(job: JobSpec) -> Iterator[Chunk]:
    for key, names in (
        *((f"prompts.{prompt.id}", prompt.columns) for prompt in job.prompts),
        ("output.keep_columns", frozenset(job.output.keep_columns)),
    ):
        if unknown := sorted(names - set(FOLDER_COLUMNS)):
            raise SpecError(f"{key}: a folder of images has no column {unknown[0]!r}; it has id and path.")
    for folder, files in groupby(_list_all(job, EXTENSIONS), key=lambda pair: pair[0]):
        yield from _group_files(folder, (info for _, info in files), job.output.chunk_rows)


def _group_files(folder: str, files: Iterator[ObjectInfo], chunk_rows: int) -> Iterator[Chunk]:
    members: list[tuple[str, str]] = []
    for info in files:
        members.append((info.url, info.version))
        if len(members) == chunk_rows or _ends_group(info.url, chunk_rows):
            yield Chunk(folder, "", 0, len(members), tuple(members))
            members = []
    if members:
        yield Chunk(folder, "", 0, len(members), tuple(members))


def _ends_group(url: str, chunk_rows: int) -> bool:
    """True for about two names in `chunk_rows`, whatever their neighbours."""
    digest = hashlib.sha256(url.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8]) % max(2, chunk_rows // 2) == 0


def input_columns(job: JobSpec, schema_names: Set[str]) -> list[str]:
    """The columns that must be read from a Parquet shard: nothing else is."""
    columns = job.input.columns
    names = {columns.image, *job.output.keep_columns}.union(*(prompt.columns for prompt in job.prompts))
    if columns.id is not None and columns.id in schema_names:
        names.add(columns.id)
    return sorted(names)


def part_url(output_url: str, chunk_id: str) -> str:
    """Where a chunk's part is, once it is committed."""
    return join_url(output_url, "data", f"{chunk_id}.parquet")
