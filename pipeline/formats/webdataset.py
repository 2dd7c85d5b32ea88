"""WebDataset tars: consecutive members with one key are a sample.

An index file beside a tar says where its samples begin, and so how many there are; then chunks are read from where they
lie. Without one, and in a tar.gz, a shard is read from its beginning and its chunks get their names on the way.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.errors import JobError, SampleError, ShardChangedError, SpecError
from pipeline.formats.contract import Head, ImageSource, Listing, Note, Sample, Span, Wanted, damaged
from pipeline.formats.loose import keep_row, make_head, row_passes
from pipeline.formats.tar import TarSample, iter_tar_samples
from pipeline.formats.tar_index import INDEX_SUFFIXES, TarIndex, check_index, parse_tar_index
from pipeline.images import EXTENSIONS
from pipeline.records import Anchor, Chunk, Shard, valid_text
from pipeline.spec import JobSpec
from pipeline.storage import open_buffered, open_store

COMPRESSED = (".gz", ".tgz")
HEAD_SAMPLES = 16
TEXTS = frozenset({"txt", "text", "caption", "cls", "label"})
"""Extensions whose members are columns of text; `json` members are columns of their own."""
PROBES_AT_ONCE = 16


class WebDatasetFormat:
    """See the module."""

    extensions = frozenset({".tar", ".tar.gz", ".tgz"})
    companions = frozenset(INDEX_SUFFIXES)

    def look(self, job: JobSpec, listings: Iterable[Listing]) -> Head:
        """As the contract says."""
        for listing in listings:
            samples = list(self._first_samples(job, listing.shard))
            if samples:
                _check_images(job, samples, listing.info.url)
                return make_head(job, _readable_columns(samples), listing.info.url)
        raise SpecError(f"input.url: no sample can be read from {', '.join(job.input.urls)}.")

    def _first_samples(self, job: JobSpec, shard: Shard) -> Iterator[TarSample]:
        try:
            with open_buffered(shard.url, job.storage, shard.version) as file:
                samples = iter_tar_samples(file, compressed=is_gzip(file))
                yield from (sample for sample in islice(samples, HEAD_SAMPLES) if sample.members)
        except (JobError, OSError) as error:
            raise SpecError(f"input.url: {error}") from error

    def cut(self, job: JobSpec, listings: Iterator[Listing], head: Head, note: Note) -> Iterator[Chunk | Shard]:
        """As the contract says."""
        with ThreadPoolExecutor(PROBES_AT_ONCE) as pool:
            while batch := list(islice(listings, 256)):
                indexes = pool.map(lambda one: _find_index(job, one, note), batch)
                for listing, index in zip(batch, indexes, strict=True):
                    if index is None:
                        yield listing.shard
                    else:
                        yield from _cut_indexed(listing.shard, index, job.output.chunk_rows)

    def read(self, job: JobSpec, span: Span, schema: pa.Schema, wanted: Wanted) -> Iterator[Sample]:
        """As the contract says. Where a position ends the span, lost samples are made up for with errors."""
        url, anchor, limit = span.shard.url, span.anchor, job.limits.max_image_bytes
        index, gap = anchor.sample, ""
        with open_buffered(url, job.storage, span.shard.version, job.limits.fetch_timeout_s) as file:
            compressed = anchor.position == 0 and is_gzip(file)
            for sample in iter_tar_samples(file, wanted, anchor.sample, anchor.position, limit, compressed):
                if (sample.index == span.stop) if span.end is None else (sample.offset >= span.end):
                    break
                index, gap = sample.index + 1, sample.damage or gap
                yield _to_sample(job, url, replace(sample, offset=0) if compressed else sample, schema)
        if span.end is not None and span.stop is not None:
            why = f"{valid_text(url)}: its index names a sample here that cannot be read. {gap}".strip()
            yield from (damaged(missing, why, span.end) for missing in range(index, span.stop))


FORMAT = WebDatasetFormat()


def is_gzip(file: BinaryIO) -> bool:
    """By its first bytes, whatever its name; leaves the file at its beginning."""
    magic = file.read(2)
    file.seek(0)
    return magic == b"\x1f\x8b"


def _find_index(job: JobSpec, listing: Listing, note: Note) -> TarIndex | None:
    """The index beside a tar, if there is one and it fits."""
    url = listing.info.url
    if url.lower().endswith(COMPRESSED):
        return None
    names = [info.url for info in listing.companions] or _possible_names(url)
    for name in names:
        try:
            if (info := open_store(name, job.storage).stat(name)) is None:
                continue
            index = parse_tar_index(open_store(name, job.storage).read(name, info.version))
            with open_buffered(url, job.storage, listing.info.version) as file:
                check_index(file, index)
            return index
        except ValueError as error:
            note(f"{name} is passed over: {error}")
        except ShardChangedError:
            continue  # the index vanished, or the tar did, which reading will tell
        except JobError as error:
            raise SpecError(f"input.url: {error}") from error
    return None


def _possible_names(url: str) -> Iterator[str]:
    for suffix in INDEX_SUFFIXES:
        yield url + suffix
        yield url.removesuffix(".tar") + suffix


def _cut_indexed(shard: Shard, index: TarIndex, chunk_rows: int) -> Iterator[Chunk]:
    count = len(index.offsets)
    for start in range(0, count, chunk_rows):
        stop = min(start + chunk_rows, count)
        end = index.offsets[stop] if stop < count else None
        yield shard.chunk(start, stop, anchor=Anchor(start, index.offsets[start]), end=end if end else LAST)


LAST = 1 << 62
"""The end of a last chunk: all that follows in the tar, for an index may not say where that is."""


def _check_images(job: JobSpec, samples: list[TarSample], url: str) -> None:
    held = [sample.members or {} for sample in samples]
    if not any(name in members for members in held for name in _image_members(job, members)):
        named = job.input.columns.images if _names_images(job) else ["an image"]
        raise SpecError(
            f"input.columns.image: none of the first {len(samples)} samples of {url} has {' or '.join(named)}; "
            f"their members end in {', '.join(sorted({name for members in held for name in members}))}."
        )


def _names_images(job: JobSpec) -> bool:
    return "image" in job.input.columns.model_fields_set and job.input.columns.image != "image"


def _image_members(job: JobSpec, members: Mapping[str, Any]) -> list[str]:
    """Extensions of the image members: those that the spec names, or all that look like images, in the tar's order."""
    if _names_images(job):
        return [name.lower() for name in job.input.columns.images]
    return [name for name in members if "." + name.rpartition(".")[2] in EXTENSIONS]


def _readable_columns(samples: list[TarSample]) -> list[dict[str, Any]]:
    rows = []
    for sample in samples:
        try:
            rows.append(_columns_of(sample))
        except SampleError:
            continue  # such a sample becomes an error row; it says nothing about the others
    return rows


def _columns_of(sample: TarSample) -> dict[str, Any]:
    """`key`, texts by their extension, `json` as a whole and each of its fields; raises SampleError for bad JSON."""
    columns: dict[str, Any] = {"key": valid_text(sample.key)}
    for name, data in (sample.members or {}).items():
        last = name.rpartition(".")[2]
        if last not in TEXTS and last != "json":
            continue
        if isinstance(data, SampleError):
            raise data
        columns[name] = _parse_json(name, data) if last == "json" else data.decode("utf-8", "replace")
        if isinstance(columns[name], dict):
            columns = {**columns[name], **columns}
    return columns


def _parse_json(name: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("row_invalid", f"The member {name!r} is not JSON: {error}.") from error


def _to_sample(job: JobSpec, url: str, sample: TarSample, schema: pa.Schema) -> Sample:
    if sample.damage is not None:
        return damaged(sample.index, f"{valid_text(url)}: {sample.damage}", sample.offset)
    key = valid_text(sample.key)
    if sample.members is None:
        return Sample(sample.index, key, position=sample.offset)
    columns: dict[str, Any] = {"key": key}
    try:
        columns = _columns_of(sample)
        passes = row_passes(job, columns, schema)
        kept = keep_row(columns, job.output.keep_columns, schema) if passes else None
    except SampleError as error:
        return Sample(sample.index, _sample_id(job, columns), columns, position=sample.offset, error=error)
    held = ", ".join(sample.members)
    missing = SampleError("image_missing", f"The sample {key!r} lacks an image; its members end in {held}.")
    sources: tuple[ImageSource, ...] = tuple(
        sample.members.get(name, missing) for name in _image_members(job, sample.members)
    )
    sample_id = _sample_id(job, columns)
    return Sample(sample.index, sample_id, columns, sources or (missing,), sample.offset, kept, passes=passes)


def _sample_id(job: JobSpec, columns: Mapping[str, Any]) -> str | None:
    """The key, unless the spec names a column; None where it wants numbers."""
    named = job.input.columns.id if "id" in job.input.columns.model_fields_set else "key"
    if named is None:
        return None
    return str(columns["key"] if columns.get(named) is None else columns[named])
