"""The things that travel through the flow: chunks, samples, generations, rows.

Plain frozen data, on the standard library and pyarrow only. The Arrow schema of the output lives here because
it is the contract with every reader of the parts.
"""

import hashlib
import json
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
class Chunk:
    """A fixed range of one shard's samples: the unit of work, of retry and of resume.

    `members` names the image files of a chunk of a folder; for other shards it is empty and the range says all.
    """

    shard: str
    shard_version: str
    start: int
    stop: int
    members: tuple[tuple[str, str], ...] = ()
    """(URL, version) of each image file."""

    @property
    def chunk_id(self) -> str:
        """A name made of the content alone, the same in every run."""
        identity = json.dumps([self.shard, self.shard_version, self.start, self.stop, self.members])
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
class DecodedImage:
    """RGB pixels, row by row: `len(pixels) == width * height * 3`."""

    width: int
    height: int
    pixels: bytes


@dataclass(frozen=True)
class Task:
    """One row to be: a rendered prompt over a sample's images, or the reason why there is none."""

    sample_id: str
    prompt_id: str
    mode_requested: str
    images: tuple[DecodedImage, ...] = ()
    text: str = ""
    system: str | None = None
    error: SampleError | None = None


@dataclass(frozen=True)
class ReadChunk:
    """A chunk with its tasks. `kept` holds the kept columns, one Arrow row for each task."""

    work: Work
    tasks: tuple[Task, ...]
    kept: pa.Table


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
    engine_ready_at: float


@dataclass(frozen=True)
class ChunkReport:
    """What a commit says to the driver: a few numbers, never rows."""

    chunk_id: str
    shard: str
    num_rows: int
    num_errors: int
    num_thinking: int
    prompt_tokens: int
    completion_tokens: int
    first_error: str | None = None
    engine_ready_at: float | None = None
    """When the engine that made the rows was ready (Unix seconds); None when another writer was first."""


@dataclass
class Manifest:
    """The outcome of a job, as `_manifest.json` holds it."""

    name: str
    fingerprint: str
    model: str
    num_chunks: int
    num_rows: int = 0
    num_errors: int = 0
    num_thinking: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    errors_by_type: dict[str, int] = field(default_factory=dict)
    stale_parts: list[str] = field(default_factory=list)

    def add(self, report: ChunkReport) -> bool:
        """Count one part in; tells whether it holds errors."""
        self.num_rows += report.num_rows
        self.num_errors += report.num_errors
        self.num_thinking += report.num_thinking
        self.prompt_tokens += report.prompt_tokens
        self.completion_tokens += report.completion_tokens
        return report.num_errors > 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


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
        num_rows=table.num_rows,
        num_errors=len(errors),
        num_thinking=sum(mode == "thinking" for mode in table.column("mode_chosen").to_pylist()),
        prompt_tokens=_sum(table.column("prompt_tokens").to_pylist()),
        completion_tokens=_sum(table.column("completion_tokens").to_pylist()),
        first_error=errors[0] if errors else None,
        engine_ready_at=chunk.engine_ready_at,
    )


def _sum(values: Sequence[int | None]) -> int:
    return sum(value for value in values if value is not None)
