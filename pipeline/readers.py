"""From a pass over a shard to chunks of tasks: read, select, ask, load. Runs on CPUs; one chunk is held at a time.

What is wrong with a row becomes that row's error. A shard that is gone, or another than planned, fails alone.
The invariant: every sample of a chunk has its rows, is counted as left out, or is counted as without a prompt.
Not covered: generation.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256

import pyarrow as pa

from pipeline.ahead import map_ahead
from pipeline.asking import Asked, Asker
from pipeline.errors import JobError, SampleError, SpecError, StoreUnavailableError
from pipeline.formats import FORMATS, Sample
from pipeline.formats.contract import Span, damaged
from pipeline.loading import ImageLoader
from pipeline.records import CommittedChunk, FailedShard, ReadChunk, ReadCounts, Reading, Shard, Task, Work, valid_text
from pipeline.spec import InputFormat, JobSpec, SampleSpec
from pipeline.surveys import SurveyMaker, write_survey
from pipeline.tiling import Tiling

LOADS_AT_ONCE = 8
SAMPLES_AHEAD = 16
"""Samples whose images are held as they were read."""


@dataclass(frozen=True)
class ReadSettings:
    """What a read task must know of its job's plan."""

    job: JobSpec
    format: InputFormat
    schema: pa.Schema
    tiling: Tiling | None = None
    prompt_table: tuple[str, str] | None = None


def read_chunks(
    reading: Reading, settings: ReadSettings, is_committed: Callable[[str], bool] = lambda chunk_id: False
) -> Iterator[ReadChunk | CommittedChunk | FailedShard]:
    """One pass over a shard; `is_committed` tells a stream which of its chunks have a part. Raises JobError."""
    try:
        if reading.stream is not None:
            yield from _read_stream(reading.stream, settings, is_committed)
        else:
            yield from _read_works(reading.works, settings)
    except StoreUnavailableError:  # no fault of this shard: the job stops, and resumes when the store is back
        raise
    except (JobError, SpecError, OSError) as error:
        yield FailedShard(valid_text(reading.shard), valid_text(str(error)))


def _read_works(works: Sequence[Work], settings: ReadSettings) -> Iterator[ReadChunk]:
    first, last = works[0].chunk, works[-1].chunk
    if first.damage is not None:
        yield _make_chunk(works[0], [damaged(0, first.damage)], settings)
        return
    shard = Shard(first.shard, first.shard_version, first.prompts)
    span = Span(shard, first.anchor, last.stop, last.end, first.members)
    starts, stops = [work.chunk.start for work in works], [work.chunk.stop for work in works]

    def is_wanted(index: int) -> bool:
        number = bisect_right(starts, index) - 1
        return number >= 0 and (index < stops[number] or last.end is not None)

    samples = _Peekable(FORMATS[settings.format].read(settings.job, span, settings.schema, is_wanted))
    for work in works:
        samples.skip_before(work.chunk.start)
        yield _make_chunk(work, samples.take_before(work.chunk.stop if work is not works[-1] else None), settings)


def _read_stream(
    shard: Shard, settings: ReadSettings, is_committed: Callable[[str], bool]
) -> Iterator[ReadChunk | CommittedChunk]:
    """All chunks of a shard, read if they have no part; at its end, its survey."""
    job, rows = settings.job, settings.job.output.chunk_rows
    maker, done = SurveyMaker(rows), _Committed(shard, rows, is_committed)
    samples = _Peekable(FORMATS[settings.format].read(job, Span(shard), settings.schema, done.is_wanted), maker)
    number = 0
    while samples.peek() is not None:
        start, stop = number * rows, (number + 1) * rows
        if done.is_wanted(start):
            yield _make_last_or_full(shard, start, samples, maker, settings)
        else:
            samples.skip_before(stop)
            yield CommittedChunk(shard.chunk(start, stop).chunk_id)
        number += 1
    write_survey(job, shard, maker.survey)


def _make_last_or_full(
    shard: Shard, start: int, samples: "_Peekable", maker: SurveyMaker, settings: ReadSettings
) -> ReadChunk:
    """A stream's next chunk. The last one ends where the shard does, and is named so; its survey comes before it."""
    stop = start + settings.job.output.chunk_rows
    chunk = _make_chunk(Work(shard.chunk(start, stop)), samples.take_before(stop), settings)
    if samples.peek() is not None:
        return chunk
    write_survey(settings.job, shard, maker.survey)
    return replace(chunk, work=Work(shard.chunk(start, maker.num_samples)))


class _Committed:
    """Whether a stream's samples are in a part already, asked once for each chunk."""

    def __init__(self, shard: Shard, chunk_rows: int, is_committed: Callable[[str], bool]) -> None:
        self._shard, self._rows, self._ask = shard, chunk_rows, is_committed
        self._number, self._wanted = -1, True

    def is_wanted(self, index: int) -> bool:
        number = index // self._rows
        if number != self._number:
            chunk = self._shard.chunk(number * self._rows, (number + 1) * self._rows)
            self._number, self._wanted = number, not self._ask(chunk.chunk_id)
        return self._wanted


class _Peekable:
    """Samples with a look at the next one. `maker`, if there is one, takes down all that go by."""

    def __init__(self, samples: Iterator[Sample], maker: SurveyMaker | None = None) -> None:
        self._samples, self._maker = samples, maker
        self._next: Sample | None = None
        self._ended = False

    def peek(self) -> Sample | None:
        if self._next is None and not self._ended:
            self._next = next(self._samples, None)
            self._ended = self._next is None
            if self._next is not None and self._maker is not None:
                self._maker.add(self._next.index, self._next.position)
        return self._next

    def take_before(self, stop: int | None) -> Iterator[Sample]:
        """Samples with a lower index than `stop`; None: all that are left."""
        while (sample := self.peek()) is not None and (stop is None or sample.index < stop):
            self._next = None
            yield sample

    def skip_before(self, start: int) -> None:
        for _ in self.take_before(start):
            pass


def _make_chunk(work: Work, samples: Iterable[Sample], settings: ReadSettings) -> ReadChunk:
    """Tasks of a chunk's samples; images are loaded a few samples ahead."""
    maker = _ChunkMaker(work, settings)
    loader = ImageLoader(settings.job, settings.tiling)
    tasks: list[Task] = []
    with ThreadPoolExecutor(LOADS_AT_ONCE) as pool:
        for made in map_ahead(pool, lambda drafted: drafted.finish(loader), maker.drafts(samples), SAMPLES_AHEAD):
            tasks += made
    return ReadChunk(work, tuple(tasks), maker.kept_rows(), maker.counts)


@dataclass(frozen=True)
class _Draft:
    """A sample's tasks before its images are loaded."""

    sample: Sample
    tasks: Sequence[Task]

    def finish(self, loader: ImageLoader) -> list[Task]:
        """The tasks with their images, or with what is wrong with these."""
        if all(task.error is not None for task in self.tasks):
            return list(self.tasks)
        try:
            images = loader.load(self.sample.images)
        except SampleError as error:
            return [task if task.error is not None else replace(task, error=error, messages=()) for task in self.tasks]
        return [task if task.error is not None else replace(task, images=images) for task in self.tasks]


class _ChunkMaker:
    """Goes through a chunk's samples in order: counts them, selects, asks, and gathers the kept columns."""

    def __init__(self, work: Work, settings: ReadSettings) -> None:
        self._work, self._settings = work, settings
        self._asker = Asker(settings.job, work.chunk.prompts or settings.prompt_table)
        self._kept: list[pa.Table] = []
        self._row = 0
        self.counts = ReadCounts()

    def drafts(self, samples: Iterable[Sample]) -> Iterator[_Draft]:
        """One for each sample that has a row to be made now."""
        for sample in samples:
            sample_id = sample.sample_id
            if sample_id is None:
                sample_id = f"{self._work.chunk.shard}#{sample.index}"
            sample_id = valid_text(sample_id)
            self._count("num_samples")
            if not self._is_selected(sample, sample_id):
                self._count("num_left_out")
                continue
            asked = self._asker.ask(sample, sample_id)
            if not asked:
                self._count("num_without_prompt")
            tasks = [_to_task(one, sample_id, sample) for one in self._due(asked)]
            if tasks:
                self._kept += [sample.kept if sample.kept is not None else self._null_row()] * len(tasks)
                yield _Draft(sample, tasks)

    def _count(self, name: str) -> None:
        self.counts = replace(self.counts, **{name: getattr(self.counts, name) + 1})

    def _is_selected(self, sample: Sample, sample_id: str) -> bool:
        if sample.error is not None and sample.sample_id is None:
            return True  # nobody knows what it holds: it is reported, whatever is selected
        spec = self._settings.job.input.sample
        return sample.passes and (spec is None or is_drawn(sample_id, spec))

    def _due(self, asked: Sequence[Asked]) -> list[Asked]:
        """All of them, or those whose rows are to be redone."""
        first, self._row = self._row, self._row + len(asked)
        retry = self._work.retry
        return [one for row, one in enumerate(asked, first) if retry is None or row in retry.rows]

    def _kept_schema(self) -> pa.Schema:
        names = self._settings.job.output.keep_columns
        return pa.schema([self._settings.schema.field(name) for name in names])

    def _null_row(self) -> pa.Table:
        schema = self._kept_schema()
        return pa.table([_null_array(field.type) for field in schema], schema)

    def kept_rows(self) -> pa.Table:
        """One Arrow row of kept columns for each task."""
        schema = self._kept_schema()
        if not schema.names:
            return pa.table({"": pa.nulls(len(self._kept))}).select([])
        arrays = [
            pa.chunked_array([piece for row in self._kept for piece in row.column(field.name).chunks], field.type)
            for field in schema
        ]
        return pa.table(arrays, schema).unify_dictionaries().combine_chunks()


def _null_array(kind: pa.DataType) -> pa.Array:
    try:
        return pa.array([None], kind)
    except pa.ArrowNotImplementedError:
        # `nulls` takes every type, but makes nulls of a struct's fields too, which some must not be in Parquet
        return pa.nulls(1, kind)


def is_drawn(sample_id: str, spec: SampleSpec) -> bool:
    """Whether a seeded fraction holds this sample: by its id alone, so that it does not matter where it lies."""
    digest = sha256(f"{spec.seed}:{sample_id}".encode()).digest()
    return int.from_bytes(digest[:8]) < spec.fraction * 2**64


def _to_task(asked: Asked, sample_id: str, sample: Sample) -> Task:
    error = sample.error or asked.error
    messages = () if error is not None else asked.messages
    return Task(sample_id, asked.prompt_id, asked.mode, (), messages, asked.sampling, error)
