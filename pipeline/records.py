"""The things that travel through the flow: chunks, samples, generations, rows.

Plain frozen data, on the standard library and pyarrow only. The Arrow schema of the output lives here because
it is the contract with every reader of the parts.
"""

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SampleError

Mode = Literal["thinking", "non-thinking"]
ThinkingMode = Literal["auto", "long", "short"]

OUTPUT_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("mode_requested", pa.string(), nullable=False),
        pa.field("mode_chosen", pa.string()),
        pa.field("reasoning", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("thinking_truncated", pa.bool_()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("image_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("reasoning_tokens", pa.int32()),
        pa.field("answer_tokens", pa.int32()),
        pa.field("latency_s", pa.float32()),
        pa.field("error_type", pa.string()),
        pa.field("error_message", pa.string()),
    ]
)
"""Columns of every part, in this order; `output.keep_columns` follow."""


@dataclass(frozen=True)
class Shard:
    """An input file, or a folder of loose images."""

    url: str
    version: str
    prompts: tuple[str, str] | None = None
    """(URL, version) of the prompt shard that belongs to this shard."""

    def chunk(self, start: int, stop: int, **more: Any) -> "Chunk":
        """A range of this shard's samples; `more` are fields of Chunk that tell how to read it."""
        return Chunk(self.url, self.version, start, stop, prompts=self.prompts, **more)


@dataclass(frozen=True)
class Anchor:
    """A place in a shard where reading can begin: a sample's index, and where it stands.

    `position` is a byte offset; for Parquet, the number of a row group.
    """

    sample: int = 0
    position: int = 0


@dataclass(frozen=True)
class Chunk:
    """A fixed range of one shard's samples: the unit of work, of retry and of resume.

    `members` names the files of each sample of a folder; for other shards it is empty and the range says all.
    """

    shard: str
    shard_version: str
    start: int
    stop: int
    members: tuple[tuple[tuple[str, str], ...], ...] = ()
    """For each sample, (URL, version) of its image file, then of its side-cars."""
    prompts: tuple[str, str] | None = None
    anchor: Anchor = Anchor()
    """Where reading begins: chunks of one shard with one anchor are read in one pass. No part of the identity."""
    end: int | None = None
    """The position where the last sample ends, where that is known. No part of the identity."""
    damage: str | None = None
    """Why the shard cannot be read at all: the one row of such a chunk. No part of the identity."""

    @property
    def chunk_id(self) -> str:
        """A name made of the content alone, the same in every run."""
        identity = json.dumps([self.shard, self.shard_version, self.start, self.stop, self.members, self.prompts])
        return hashlib.sha256(identity.encode()).hexdigest()[:32]

    @property
    def num_samples(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Retry:
    """Do again only these rows of a committed part, and replace that very part.

    Rows are meant by position, which a chunk fixes, not by id, which a dataset may repeat.
    """

    part_version: str
    rows: frozenset[int]


@dataclass(frozen=True)
class Work:
    """One chunk to do; with `retry`, only its error rows."""

    chunk: Chunk
    retry: Retry | None = None


@dataclass(frozen=True)
class Reading:
    """What one read task does in one pass over a shard: chunks with one anchor, in order.

    Or all chunks of a shard whose samples were never counted (`stream`); they get their names as they are read.
    """

    works: tuple[Work, ...] = ()
    stream: Shard | None = None

    @property
    def shard(self) -> str:
        """The shard's URL."""
        return self.stream.url if self.stream is not None else self.works[0].chunk.shard

    @property
    def name(self) -> str:
        """For people; no two of a job have the same."""
        if self.stream is not None:
            return self.shard
        first = self.works[0].chunk
        return f"{self.shard} from {first.start} (chunk {first.chunk_id})"  # a folder's chunks differ in the id alone


@dataclass(frozen=True)
class EncodedImage:
    """A checked picture for an engine.

    `data` is a PNG, JPEG or WebP file of `width` x `height` upright RGB or gray pixels. Pickled, it travels beside
    the pickle, so that an engine reads it in Ray's object store without a copy.
    """

    width: int
    height: int
    data: bytes

    def __reduce_ex__(self, protocol: Any) -> tuple[type["EncodedImage"], tuple[int, int, pickle.PickleBuffer]]:
        return EncodedImage, (self.width, self.height, pickle.PickleBuffer(self.data))


@dataclass(frozen=True)
class Task:
    """One row to be: messages over a sample's images, or the reason why there are none.

    `messages` are as OpenAI writes them; their `{"type": "image"}` parts take `images` in order. Where they have no
    such part, the images come first in the last of the user's. `sampling` overrides the job's.
    """

    sample_id: str
    prompt_id: str
    mode_requested: str
    images: tuple[EncodedImage, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    error: SampleError | None = None


@dataclass(frozen=True)
class ReadCounts:
    """What became of a chunk's samples, for those that have no row."""

    num_samples: int = 0
    num_left_out: int = 0
    """By `input.where` and `input.sample`."""
    num_without_prompt: int = 0


@dataclass(frozen=True)
class ReadChunk:
    """A chunk with its tasks. `kept` holds the kept columns, one Arrow row for each task."""

    work: Work
    tasks: tuple[Task, ...]
    kept: pa.Table
    counts: ReadCounts


@dataclass(frozen=True)
class FailedShard:
    """A shard that was gone, or another than planned, when it was to be read: its chunks are not done in this run."""

    shard: str
    message: str


@dataclass(frozen=True)
class CommittedChunk:
    """Stands where a stream's chunk would that has a part already.

    If a node is lost, Ray reads a shard again for the chunks that were lost, and knows them by their number in it.
    """

    chunk_id: str


@dataclass(frozen=True)
class Generation:
    """What the engine made of one request: a field for each output column that only the engine knows."""

    mode_chosen: Mode
    reasoning: str | None
    answer: str | None
    finish_reason: str
    thinking_truncated: bool
    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    answer_tokens: int
    latency_s: float


@dataclass(frozen=True)
class GeneratedChunk:
    """A chunk whose every task has a generation or an error."""

    work: Work
    tasks: tuple[Task, ...]
    results: tuple[Generation | SampleError, ...]
    kept: pa.Table
    counts: ReadCounts
    engine_ready_at: float


@dataclass(frozen=True)
class ChunkReport:
    """What a commit says to the driver: a few numbers, never rows."""

    chunk_id: str
    shard: str
    start: int
    stop: int
    num_rows: int
    num_errors: int
    num_thinking: int
    prompt_tokens: int
    completion_tokens: int
    num_samples: int
    num_left_out: int
    num_without_prompt: int
    first_error: str | None = None
    engine_ready_at: float | None = None
    """When the engine that made the rows was ready (Unix seconds); None when another writer was first."""


@dataclass(frozen=True)
class Losses:
    """What a run did more than once: how many engines were replaced, and how many chunks generated again."""

    engines: int
    with_nodes: int
    """Of the engines, those that went with their node."""
    chunks: int


SUMS = (
    "num_rows",
    "num_errors",
    "num_thinking",
    "prompt_tokens",
    "completion_tokens",
    "num_samples",
    "num_left_out",
    "num_without_prompt",
)
"""What a manifest adds up over the reports of its parts."""


@dataclass
class Manifest:
    """The outcome of a job, as `_manifest.json` holds it."""

    name: str
    fingerprint: str
    model: str
    num_chunks: int = 0
    num_rows: int = 0
    num_errors: int = 0
    num_thinking: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    num_samples: int = 0
    num_left_out: int = 0
    num_without_prompt: int = 0
    prompts_without_sample: int | None = None
    """None where a selection leaves samples out, so that nobody can tell; 0 where prompts are in the spec."""
    examples_without_sample: list[str] = field(default_factory=list)
    prompts_unreadable: int | None = None
    """Lines of prompt shards that name no sample; None and 0 as above."""
    errors_by_type: dict[str, int] = field(default_factory=dict)
    damaged_shards: list[str] = field(default_factory=list)
    stale_parts: list[str] = field(default_factory=list)

    def add(self, report: ChunkReport) -> bool:
        """Count one part in; tells whether it holds errors."""
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(report, name))
        return report.num_errors > 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


@dataclass
class Tally:
    """A manifest that grows with the parts that are committed, so that these need not be read again for it."""

    manifest: Manifest
    counted: set[str] = field(default_factory=set)
    """Chunk ids."""
    bad: set[str] = field(default_factory=set)
    """Of the chunks with errors."""

    def add(self, report: ChunkReport) -> None:
        """Count a part in, once."""
        if report.chunk_id in self.counted:
            return
        self.counted.add(report.chunk_id)
        if self.manifest.add(report):
            self.bad.add(report.chunk_id)


def read_part(file: BinaryIO, columns: list[str] | None = None) -> pa.Table:
    """A part's rows. Without threads: with them, pyarrow 26.0.1 aborts some short processes at their exit."""
    return pq.ParquetFile(file, pre_buffer=False).read(columns=columns, use_threads=False)


def rows_to_table(chunk: GeneratedChunk) -> pa.Table:
    """The part's table: OUTPUT_SCHEMA, then the kept columns."""
    rows = [_row(chunk.work.chunk.shard, task, result) for task, result in zip(chunk.tasks, chunk.results, strict=True)]
    table = pa.Table.from_pylist(rows, schema=OUTPUT_SCHEMA)
    for name in chunk.kept.column_names:
        table = table.append_column(chunk.kept.schema.field(name), chunk.kept.column(name))
    return table


def _row(shard: str, task: Task, result: Generation | SampleError) -> Mapping[str, Any]:
    row: dict[str, Any] = dict.fromkeys(OUTPUT_SCHEMA.names)
    row |= {
        "sample_id": valid_text(task.sample_id),
        "prompt_id": task.prompt_id,
        "shard": valid_text(shard),
        "mode_requested": task.mode_requested,
    }
    if isinstance(result, SampleError):
        row |= {"error_type": result.error_type, "error_message": valid_text(result.message)}
        return row
    row |= asdict(result)
    row["reasoning"] = None if result.reasoning is None else valid_text(result.reasoning)
    row["answer"] = None if result.answer is None else valid_text(result.answer)
    return row


def valid_text(text: str) -> str:
    """Arrow strings are UTF-8: a lone surrogate (undecodable file names have them) is written as `?`."""
    return text.encode("utf-8", "replace").decode()


def report_of(chunk: GeneratedChunk, table: pa.Table) -> ChunkReport:
    """The numbers of a chunk's part."""
    errors = [error for error in table.column("error_message").to_pylist() if error is not None]
    return ChunkReport(
        chunk_id=chunk.work.chunk.chunk_id,
        shard=valid_text(chunk.work.chunk.shard),
        start=chunk.work.chunk.start,
        stop=chunk.work.chunk.stop,
        num_rows=table.num_rows,
        num_errors=len(errors),
        num_thinking=sum(mode == "thinking" for mode in table.column("mode_chosen").to_pylist()),
        prompt_tokens=_sum(table.column("prompt_tokens").to_pylist()),
        completion_tokens=_sum(table.column("completion_tokens").to_pylist()),
        **asdict(chunk.counts),
        first_error=errors[0] if errors else None,
        engine_ready_at=chunk.engine_ready_at,
    )


def _sum(values: Sequence[int | None]) -> int:
    return sum(value for value in values if value is not None)
