"""Small inputs for the tests: images, shards, specs and generated chunks.

Not covered: scenes with true answers, which `pipeline.scenes` draws.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.errors import SampleError
from pipeline.records import Chunk, GeneratedChunk, Generation, ReadCounts, Retry, Task, Work
from pipeline.spec import JobSpec, parse_spec

Result = Generation | SampleError
ENGINE_READY_AT = 1_700_000_000.0
IMAGE_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """The image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_bytes(color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (6, 4)) -> bytes:
    """A PNG of one colour."""
    return encode(Image.new("RGB", size, color))


def numbered_png(number: int) -> bytes:
    """A PNG whose pixels tell its number (below 65,536)."""
    return png_bytes((number // 256, number % 256, 7), (3, 2))


def number_of(pixels: bytes) -> int:
    """The number that `numbered_png` drew."""
    return pixels[0] * 256 + pixels[1]


def image_table(num_rows: int, first: int = 0, **columns: Sequence[Any] | pa.Array) -> pa.Table:
    """Rows of id `row-N` and an image that tells N, and more columns."""
    numbers = range(first, first + num_rows)
    table = {"id": [f"row-{n}" for n in numbers], "image": pa.array(map(numbered_png, numbers), pa.binary())}
    return pa.table({**table, **columns})


def write_shard(path: Path, table: pa.Table, row_group_size: int | None = None) -> Path:
    """Write a Parquet shard, its folder too; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # opened here, for pyarrow takes no path that is not UTF-8
        pq.write_table(table, file, row_group_size=row_group_size)
    return path


def make_job(input_url: Path | str | list[str], output_url: Path | str, **sections: Any) -> JobSpec:
    """A job on the simulated engine with one prompt; `sections` replace or extend whole sections of the spec."""
    data: dict[str, Any] = {
        "prompts": [{"id": "p", "template": "Describe this image."}],
        "engine": {"kind": "simulated", "num_gpus": 0},
        **sections,
    }
    url = input_url if isinstance(input_url, list) else str(input_url)
    data["input"] = {"url": url, **sections.get("input", {})}
    data["output"] = {"url": str(output_url), "chunk_rows": 4, **sections.get("output", {})}
    return parse_spec(data, "the test's spec")


def make_generation(**changes: Any) -> Generation:
    """A direct answer; `changes` replace fields."""
    fields: dict[str, Any] = {
        "mode_chosen": "non-thinking",
        "reasoning": None,
        "answer": "A red square.",
        "finish_reason": "stop",
        "thinking_truncated": False,
        "prompt_tokens": 20,
        "image_tokens": 9,
        "completion_tokens": 6,
        "reasoning_tokens": 0,
        "answer_tokens": 4,
        "latency_s": 0.5,
    }
    return Generation(**{**fields, **changes})


def make_generated(
    chunk: Chunk,
    results: Mapping[str, Result] | Sequence[tuple[str, Result]],
    kept: pa.Table | None = None,
    retry: Retry | None = None,
) -> GeneratedChunk:
    """A chunk whose samples, by id, came out as `results`, all for the prompt `p`."""
    pairs = list(results.items()) if isinstance(results, Mapping) else list(results)
    tasks = tuple(
        Task(sample_id, "p", "auto", error=result if isinstance(result, SampleError) else None)
        for sample_id, result in pairs
    )
    if kept is None:
        kept = pa.table({"_": pa.nulls(len(pairs))}).select([])
    counts = ReadCounts(num_samples=len(pairs))
    made = tuple(result for _, result in pairs)
    return GeneratedChunk(Work(chunk, retry), tasks, made, kept, counts, ENGINE_READY_AT)
