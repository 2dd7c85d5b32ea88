"""From one chunk to its tasks: fetch, check, decode, render. Runs on CPUs, one chunk at a time.

What is wrong with a row becomes that row's error; what is wrong with the shard (gone, changed, unreadable) raises.
The invariant: a chunk of n samples and p prompts gives n * p tasks, whatever they hold.
Not covered: generation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import JobError, SampleError, ShardChangedError, StorageError, StoreUnavailableError
from pipeline.images import decode_image
from pipeline.plan import input_columns
from pipeline.prompts import THINKING_MODES, render_prompt
from pipeline.records import Chunk, DecodedImage, ReadChunk, Task, Work, valid_text
from pipeline.spec import JobSpec, PromptSpec
from pipeline.storage import absolute_url, join_url, open_store

FETCHES_AT_ONCE = 8


@dataclass(frozen=True)
class _Sample:
    sample_id: str
    columns: Mapping[str, Any]
    fetch: Callable[[], bytes | None]


def read_chunk(work: Work, job: JobSpec) -> ReadChunk:
    """Read a chunk's samples and make a task of each (sample, prompt); raises JobError if the shard is unusable."""
    samples, kept = (_read_folder if work.chunk.members else _read_parquet)(work.chunk, job)
    asked = [_prompts_for(index, work, job) for index in range(len(samples))]
    with ThreadPoolExecutor(FETCHES_AT_ONCE) as pool:
        tasks_of_samples = list(pool.map(_make_tasks, samples, asked, repeat(job)))
    origins = [index for index, tasks in enumerate(tasks_of_samples) for _ in tasks]
    tasks = tuple(task for tasks in tasks_of_samples for task in tasks)
    return ReadChunk(work, tasks, kept.take(pa.array(origins, pa.int64())))


def _prompts_for(sample: int, work: Work, job: JobSpec) -> list[PromptSpec]:
    """All prompts, or those whose rows are to be redone; a chunk's rows are its samples times its prompts."""
    first_row = sample * len(job.prompts)
    return [prompt for row, prompt in enumerate(job.prompts, first_row) if work.retry is None or row in work.retry.rows]


def _make_tasks(sample: _Sample, prompts: Sequence[PromptSpec], job: JobSpec) -> list[Task]:
    if not prompts:
        return []
    image = _load_image(sample, job)
    return [_make_task(sample, prompt, image) for prompt in prompts]


def _load_image(sample: _Sample, job: JobSpec) -> DecodedImage | SampleError:
    try:
        return decode_image(sample.fetch(), job.limits.max_image_bytes, job.limits.max_image_pixels)
    except SampleError as error:
        return error


def _make_task(sample: _Sample, prompt: PromptSpec, image: DecodedImage | SampleError) -> Task:
    try:
        rendered = render_prompt(prompt.template, prompt.system, prompt.thinking_mode, sample.columns)
    except SampleError as error:
        plain = prompt.thinking_mode in THINKING_MODES
        return Task(sample.sample_id, prompt.id, prompt.thinking_mode if plain else "auto", error=error)
    if isinstance(image, SampleError):
        return Task(sample.sample_id, prompt.id, rendered.thinking_mode, error=image)
    return Task(sample.sample_id, prompt.id, rendered.thinking_mode, (image,), rendered.text, rendered.system)


def _read_parquet(chunk: Chunk, job: JobSpec) -> tuple[list[_Sample], pa.Table]:
    table = _read_rows(chunk, job)
    columns = job.input.columns
    ids = table.column(columns.id).to_pylist() if columns.id in table.column_names else [None] * table.num_rows
    shard = valid_text(chunk.shard)
    sample_ids = [f"{shard}#{chunk.start + n}" if value is None else str(value) for n, value in enumerate(ids)]
    names = sorted(frozenset().union(*(prompt.columns for prompt in job.prompts)))
    rows = table.select(names).to_pylist() if names else [{}] * table.num_rows
    images = table.column(columns.image)
    samples = [
        _Sample(sample_id, row, _image_fetcher(images, index, chunk, job))
        for index, (sample_id, row) in enumerate(zip(sample_ids, rows, strict=True))
    ]
    return samples, table.select(job.output.keep_columns)


def _read_rows(chunk: Chunk, job: JobSpec) -> pa.Table:
    """Rows [start, stop) of the shard, from the row groups that hold them, the needed columns only."""
    try:
        with open_store(chunk.shard, job.storage, job.limits.fetch_timeout_s).open(
            chunk.shard, chunk.shard_version
        ) as file:
            shard = pq.ParquetFile(file, pre_buffer=True)
            groups, first = _groups_of(shard.metadata, chunk.start, chunk.stop)
            names = input_columns(job, set(shard.schema_arrow.names))
            table = shard.read_row_groups(groups, columns=names)
    except (pa.ArrowException, OSError) as error:
        raise JobError(f"{chunk.shard} cannot be read: {error}") from error
    return table.slice(chunk.start - first, chunk.num_samples)


def _groups_of(metadata: pq.FileMetaData, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that overlap [start, stop), and the index of their first row."""
    groups: list[int] = []
    first = row = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < stop and row + rows > start:
            first = first if groups else row
            groups.append(group)
        row += rows
    return groups, first


def _image_fetcher(images: pa.ChunkedArray, index: int, chunk: Chunk, job: JobSpec) -> Callable[[], bytes | None]:
    def fetch() -> bytes | None:
        value = images[index].as_py()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is None and path:
            return _fetch_path(path, chunk, job)
        return None if data is None else bytes(data)

    return fetch


def _fetch_path(path: str, chunk: Chunk, job: JobSpec) -> bytes:
    """A struct without bytes names its image by a path, relative to the shard (Hugging Face datasets)."""
    if "://" in path or path.startswith("/") or ".." in path.split("/"):
        raise SampleError("image_path_refused", f"The image path {path!r} is not a path below the shard's folder.")
    return _fetch_file(absolute_url(join_url(chunk.shard.rpartition("/")[0], path)), None, job)


def _fetch_file(url: str, version: str | None, job: JobSpec) -> bytes:
    """At most one byte more than `limits.max_image_bytes`, which is then one too many for the decoder."""
    try:
        with open_store(url, job.storage, job.limits.fetch_timeout_s).open(url, version) as file:
            return file.read(job.limits.max_image_bytes + 1)
    except ShardChangedError as error:
        raise SampleError("image_missing", str(error)) from error
    except StoreUnavailableError:  # no fault of this image: the job stops, and resumes when the store is back
        raise
    except (StorageError, OSError) as error:
        raise SampleError("image_unreadable", str(error)) from error


def _read_folder(chunk: Chunk, job: JobSpec) -> tuple[list[_Sample], pa.Table]:
    samples = list(_folder_samples(chunk, job))
    kept = {
        name: pa.array([sample.columns[name] for sample in samples], pa.string()) for name in job.output.keep_columns
    }
    return samples, pa.table(kept) if kept else _empty_rows(len(samples))


def _folder_samples(chunk: Chunk, job: JobSpec) -> Iterator[_Sample]:
    for url, version in chunk.members:
        path = _name_in_folder(url, chunk.shard, job)
        text = valid_text(path)  # a file name need not be UTF-8
        yield _Sample(text, {"id": text, "path": text}, lambda url=url, version=version: _fetch_file(url, version, job))  # type: ignore[misc]


def _name_in_folder(url: str, folder: str, job: JobSpec) -> str:
    """The path below the folder; with several inputs the whole URL, for two folders may hold the same names."""
    if len(job.input.urls) > 1:
        return url
    return url.removeprefix(folder.rstrip("/") + "/") if url != folder else url.rpartition("/")[2]


def _empty_rows(num_rows: int) -> pa.Table:
    return pa.table({"_": pa.nulls(num_rows)}).select([])
