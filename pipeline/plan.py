"""The plan: which chunks a job consists of. It lists shards and reads footers; it holds no rows and no images.

A chunk is named by its content (shard, version, range), never by its position in a run, so planning again after
new shards arrived gives the old chunks their old names. Shards whose samples nobody has counted yet (tar, JSONL) are in
the plan as streams.
Not covered: reading samples.
"""

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from itertools import islice

import pyarrow as pa

from pipeline.alignment import list_prompt_shards
from pipeline.errors import JobError, SampleError, ShardChangedError, SpecError
from pipeline.formats.contract import Format, Head, Span
from pipeline.listing import choose_format
from pipeline.prompts import render_prompt
from pipeline.records import Anchor, Chunk, Reading, Shard, Work
from pipeline.spec import InputFormat, JobSpec, PromptSpec
from pipeline.storage import absolute_url, glob_to_regex, is_glob, join_url
from pipeline.surveys import Survey, SurveyMaker, list_surveys, read_surveys, survey_url


@dataclass(frozen=True)
class Plan:
    """A job's chunks, in the order of the input."""

    chunks: tuple[Chunk, ...]
    num_shards: int
    streams: tuple[Shard, ...] = ()
    """Shards whose chunks will be known when they have been read."""
    format: InputFormat = "parquet"
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    """Types of the columns that are kept or filtered by."""
    notes: tuple[str, ...] = ()
    """What a person should know about the input."""
    prompt_table: tuple[str, str] | None = None
    """(URL, version) of the one table of prompts."""
    prompt_shards: tuple[tuple[str, str], ...] = ()
    """(URL, version) of all prompt shards, those that belong to no shard too."""

    @property
    def num_samples(self) -> int:
        """Of the chunks; the samples of streams come on top."""
        return sum(chunk.num_samples for chunk in self.chunks)

    def without(self, committed: Set[str]) -> "Plan":
        """The chunks that are still to do."""
        return replace(self, chunks=tuple(chunk for chunk in self.chunks if chunk.chunk_id not in committed))

    def unplanned(self, committed: Set[str]) -> list[str]:
        """Committed chunks that are not among the plan's: of streams, or of shards that changed or are gone."""
        return sorted(committed - {chunk.chunk_id for chunk in self.chunks})


def make_plan(job: JobSpec) -> Plan:
    """List the shards and cut them into chunks; raises SpecError if there is nothing to read or a column is missing."""
    for url in job.input.urls:
        check_apart(absolute_url(url), absolute_url(job.output.url), "input.url")
    if job.prompt_shards is not None:
        check_apart(absolute_url(job.prompt_shards.url), absolute_url(job.output.url), "prompts.url")
    files, decided = choose_format(job)
    prompts = list_prompt_shards(job, files.name)
    notes = [decided] if decided else []
    head = files.format.look(job, files.listings())
    check_prompts(job, head)
    pieces = files.format.cut(job, map(prompts.claim, files.listings()), head, notes.append)
    pieces = use_surveys(job, pieces)
    if job.input.limit is not None:
        pieces = limit_samples(job, files.format, head, pieces, job.input.limit)
    chunks: list[Chunk] = []
    streams: list[Shard] = []
    shards: set[str] = set()
    for piece in pieces:
        if isinstance(piece, Shard):
            streams.append(piece)
            shards.add(piece.url)
        else:
            chunks.append(piece)
            shards.add(piece.shard)
    if not chunks and not streams:
        raise SpecError(f"input.url: the input {', '.join(job.input.urls)} has no rows{_but_for(job)}.")
    prompts.check()
    return Plan(
        tuple(chunks),
        len(shards),
        tuple(streams),
        files.name,
        head.schema,
        tuple(notes),
        prompt_table=prompts.table,
        prompt_shards=prompts.all,
    )


def _but_for(job: JobSpec) -> str:
    return " that input.where can hold for" if job.input.where is not None else ""


def check_apart(input_url: str, output_url: str, key: str) -> None:
    """Raise SpecError if the parts would be read as input; `key` names what they would be taken for."""
    part = part_url(output_url, "part")
    if part.startswith(input_url.rstrip("/") + "/") or (
        is_glob(input_url) and glob_to_regex(input_url).fullmatch(part)
    ):
        raise SpecError(f"output.url: parts of {output_url} would lie inside {key}, and be read as input.")


def check_prompts(job: JobSpec, head: Head) -> None:
    """Raise SpecError for a prompt that renders on none of the first samples, where only those show the columns."""
    for prompt in job.spec_prompts if head.rows else ():
        errors = [error for row in head.rows if (error := _render_error(prompt, row)) is not None]
        if len(errors) == len(head.rows):
            present = ", ".join(sorted({name for row in head.rows for name in row}))
            raise SpecError(
                f"prompts.{prompt.id}: {errors[0].message} So it is with all of the first {len(head.rows)} samples; "
                f"their columns are {present}."
            )


def _render_error(prompt: PromptSpec, row: object) -> SampleError | None:
    try:
        render_prompt(prompt.all_messages, prompt.thinking_mode, prompt.sampling, row)  # type: ignore[arg-type]
    except SampleError as error:
        return error
    return None


def use_surveys(job: JobSpec, pieces: Iterable[Chunk | Shard]) -> Iterator[Chunk | Shard]:
    """Streams that an earlier run of this output has read to their end become chunks."""
    known: frozenset[str] | None = None
    pieces = iter(pieces)
    while batch := list(islice(pieces, 256)):
        streams = [piece for piece in batch if isinstance(piece, Shard)]
        if streams and known is None:
            known = list_surveys(job)
        counted = [shard for shard in streams if known and survey_url(job, shard) in known]
        surveys = dict(zip(counted, read_surveys(job, counted), strict=True))
        for piece in batch:
            if isinstance(piece, Shard) and piece in surveys:
                yield from surveys[piece].chunks(piece, job.output.chunk_rows)
            else:
                yield piece


def complete_plan(job: JobSpec, plan: Plan) -> Plan:
    """The plan after its streams were read: all chunks. Raises JobError if one was not read to its end."""
    pieces = list(use_surveys(job, plan.streams))
    left = [piece.url for piece in pieces if isinstance(piece, Shard)]
    if left:
        raise JobError(f"{len(left)} shards, {left[0]} among them, were not read to their end; run the job again.")
    found = tuple(piece for piece in pieces if isinstance(piece, Chunk))
    return replace(plan, chunks=(*plan.chunks, *found), streams=())


def make_readings(works: Iterable[Work], streams: Iterable[Shard]) -> list[Reading]:
    """Passes over shards: works on chunks of one shard with one anchor go together; each stream is a pass."""
    passes: dict[tuple[str, Anchor, str], list[Work]] = {}
    for work in works:
        chunk = work.chunk
        alone = chunk.chunk_id if chunk.members else ""  # a folder's chunks have nothing in common
        passes.setdefault((chunk.shard, chunk.anchor, alone), []).append(work)
    in_order = (sorted(together, key=lambda work: work.chunk.start) for together in passes.values())
    return [Reading(tuple(together)) for together in in_order] + [Reading(stream=shard) for shard in streams]


def limit_samples(
    job: JobSpec, input_format: Format, head: Head, pieces: Iterable[Chunk | Shard], left: int
) -> Iterator[Chunk]:
    """The chunks of the first samples; streams are read, and counted, as far as need be."""
    for piece in pieces:
        if isinstance(piece, Shard):
            found = count_samples(job, input_format, head, piece, left).chunks(piece, job.output.chunk_rows)
        else:
            found = iter((piece,))
        for chunk in found:
            yield _shorten(chunk, left)
            left -= chunk.num_samples
            if left <= 0:
                return


def _shorten(chunk: Chunk, num_samples: int) -> Chunk:
    if chunk.num_samples <= num_samples:
        return chunk
    return replace(chunk, stop=chunk.start + num_samples, members=chunk.members[:num_samples], end=None)


def count_samples(job: JobSpec, input_format: Format, head: Head, shard: Shard, at_most: int) -> Survey:
    """Read a stream's samples, without their content, up to a number; raises SpecError if it cannot be read."""
    maker = SurveyMaker(job.output.chunk_rows)
    try:
        for sample in input_format.read(job, Span(shard, stop=at_most), head.schema, lambda index: False):
            maker.add(sample.index, sample.position)
    except ShardChangedError as error:
        raise SpecError(f"input.url: {error}") from error
    return maker.survey


def part_url(output_url: str, chunk_id: str) -> str:
    """Where a chunk's part is, once it is committed."""
    return join_url(output_url, "data", f"{chunk_id}.parquet")
