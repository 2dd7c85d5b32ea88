"""Whole jobs on the real engine through the command line, read with DuckDB as a user would.

Each of these starts vLLM once; what needs no model is tested on the simulated engine.
"""

import importlib.resources
import io
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from jobs.demo import CHECKPOINT, CPU_ENGINE_ARGS
from pipeline.scenes import draw_scene, make_scene
from tests.running import r4b, write_spec
from tests.s3_server import S3Server

pytestmark = pytest.mark.long

DEMO_ROWS = 100
TYPES = {
    **dict.fromkeys(["sample_id", "prompt_id", "shard", "mode_requested", "mode_chosen"], "VARCHAR"),
    **dict.fromkeys(["reasoning", "answer", "finish_reason"], "VARCHAR"),
    "thinking_truncated": "BOOLEAN",
    **dict.fromkeys(["prompt_tokens", "image_tokens", "completion_tokens"], "INTEGER"),
    **dict.fromkeys(["reasoning_tokens", "answer_tokens"], "INTEGER"),
    "latency_s": "FLOAT",
    **dict.fromkeys(["error_type", "error_message"], "VARCHAR"),
}


def rows(query: str) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = duckdb.sql(query).fetchall()
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demo folder and what the command printed."""
    folder = tmp_path_factory.mktemp("demo")
    finished = r4b("demo", "--rows", str(DEMO_ROWS), "--output", str(folder))
    assert finished.code == 0, finished.stderr
    return folder, finished.stdout


def test_demo_parts_have_the_promised_columns_and_sense(demo: tuple[Path, str]) -> None:
    parts = f"'{demo[0]}/output/data/*.parquet'"
    described = {name: kind for name, kind, *_ in rows(f"describe select * from {parts}")}
    assert list(described.items()) == [*TYPES.items(), ("kind", "VARCHAR"), ("truth", "VARCHAR")]
    assert rows(f"select count(*), count(distinct (sample_id, prompt_id)) from {parts}") == [(DEMO_ROWS, DEMO_ROWS)]
    assert rows(f"select distinct mode_chosen from {parts} order by 1") == [("non-thinking",), ("thinking",)]
    bad = (
        f"select count(*) from {parts} where error_type is not null"
        " or completion_tokens < reasoning_tokens + answer_tokens or image_tokens >= prompt_tokens"
        " or answer like '%think>%' or reasoning like '%think>%' or answer = '' or latency_s <= 0"
        " or (reasoning is null) != (mode_chosen = 'non-thinking') or contains(answer, reasoning)"
    )
    assert rows(bad) == [(0,)]
    assert rows(f"select avg((answer = truth)::int) from {parts}")[0][0] >= 0.95


def test_demo_prints_where_what_and_examples(demo: tuple[Path, str]) -> None:
    folder, stdout = demo
    assert f"{folder}/output/data/*.parquet" in stdout
    for word in ("non-thinking", "thinking", "rows/s", "right", "thought:", "answer:"):
        assert word in stdout
    assert yaml.safe_load((folder / "job.yaml").read_text())["name"] == "shapes-demo"
    assert pq.ParquetFile(next((folder / "input").iterdir())).schema_arrow.names[:2] == ["id", "image"]


def test_demo_parts_say_what_made_them(demo: tuple[Path, str]) -> None:
    part = next((demo[0] / "output" / "data").iterdir())
    footer = {key.decode(): value.decode() for key, value in pq.ParquetFile(part).metadata.metadata.items()}
    assert footer["r4b.model"] == str(CHECKPOINT)
    assert footer["r4b.chunk_id"] == part.stem
    assert len(footer["r4b.fingerprint"]) == 32
    assert footer["r4b.software_version"]


@pytest.mark.slow  # on the simulated engine: test_batch_flow, test_layouts
def test_same_job_over_s3_gives_the_same_rows(demo: tuple[Path, str], tmp_path: Path, s3: S3Server) -> None:
    prefix = s3.fresh_prefix("real-job")
    for shard in (demo[0] / "input").iterdir():
        s3.put(f"{prefix}/in/{shard.name}", shard.read_bytes())
    spec = yaml.safe_load((demo[0] / "job.yaml").read_text())
    spec["input"]["url"], spec["output"]["url"] = f"{prefix}/in/", f"{prefix}/out"
    spec["storage"] = {"endpoint_url": s3.endpoint_url}
    finished = r4b("run", write_spec(tmp_path, spec))
    assert finished.code == 0, finished.stderr
    (tmp_path / "parts").mkdir()
    for url in s3.list(f"{prefix}/out/data/"):
        (tmp_path / "parts" / url.rpartition("/")[2]).write_bytes(s3.get(url))
    columns = "* exclude (shard, latency_s)"
    here = rows(f"select {columns} from '{demo[0]}/output/data/*.parquet' order by sample_id")
    there = rows(f"select {columns} from '{tmp_path}/parts/*.parquet' order by sample_id")
    assert len(here) == DEMO_ROWS
    assert here == there


def giant_png_header() -> bytes:
    """A PNG that says it is 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def scene_bytes(seed: int, format_name: str = "PNG") -> bytes:
    sink = io.BytesIO()
    draw_scene(make_scene(seed)).save(sink, format_name)
    return sink.getvalue()


def real_spec(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "odd-images",
        "input": {"url": str(folder / "in")},
        "prompts": [{"id": "caption", "template": "Describe this image.", "thinking_mode": "short"}],
        "sampling": {"max_tokens": 100},
        "engine": {"model": str(CHECKPOINT), "num_gpus": 0, "max_num_seqs": 64, "args": CPU_ENGINE_ARGS},
        "output": {"url": str(folder / "out"), "chunk_rows": 64},
    } | changes


@pytest.mark.slow  # on the simulated engine: test_batch_flow
def test_five_broken_images_of_a_hundred(tmp_path: Path) -> None:
    images: list[bytes | None] = [scene_bytes(seed) for seed in range(100)]
    images[10] = scene_bytes(10, "JPEG")[:400]
    images[30], images[50], images[70], images[90] = b"I am text", b"", None, giant_png_header()
    (tmp_path / "in").mkdir()
    ids = [f"image-{n}" for n in range(100)]
    pq.write_table(pa.table({"id": ids, "image": pa.array(images, pa.binary())}), tmp_path / "in" / "a.parquet")
    strict = r4b("run", write_spec(tmp_path, real_spec(tmp_path)))
    assert strict.code == 1
    assert "limits.max_error_rate" in strict.stderr
    assert "Traceback" not in strict.stderr
    allowed = r4b("run", write_spec(tmp_path, real_spec(tmp_path, limits={"max_error_rate": 0.05})))
    assert allowed.code == 0, allowed.stderr
    parts = f"'{tmp_path}/out/data/*.parquet'"
    assert rows(f"select count(*) from {parts} where answer is not null and error_type is null") == [(95,)]
    assert rows(f"select sample_id, error_type from {parts} where error_type is not null order by 1") == [
        ("image-10", "image_truncated"),
        ("image-30", "image_unrecognized"),
        ("image-50", "image_empty"),
        ("image-70", "image_null"),
        ("image-90", "image_too_many_pixels"),
    ]


@pytest.mark.slow  # cut thoughts on vLLM: test_engine_contract, test_online_parity
def test_folder_of_photos_with_cut_thoughts_gives_a_row_for_each(tmp_path: Path) -> None:
    for package, pattern in (("skimage.data", "*"), ("sklearn.datasets.images", "*.jpg")):
        folder = Path(str(importlib.resources.files(package)))
        for path in folder.glob(pattern):
            if path.suffix in (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif", ".webp"):
                (tmp_path / "in" / package).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / "in" / package / path.name)
    names = sorted(str(path.relative_to(tmp_path / "in")) for path in (tmp_path / "in").rglob("*.*") if path.is_file())
    assert len(names) >= 10
    spec = real_spec(tmp_path, sampling={"max_tokens": 6}, limits={"max_error_rate": 0.2})
    spec["input"]["format"] = "images"
    spec["prompts"][0]["thinking_mode"] = "long"
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "in" / "clear.png")
    finished = r4b("run", write_spec(tmp_path, spec))
    assert finished.code == 0, finished.stderr
    parts = f"'{tmp_path}/out/data/*.parquet'"
    assert [name for (name,) in rows(f"select sample_id from {parts} order by 1")] == sorted([*names, "clear.png"])
    assert rows(f"select count(*) from {parts} where answer is not null and thinking_truncated") == [(0,)]
    cut = rows(f"select count(*) from {parts} where thinking_truncated and finish_reason = 'length' and answer is null")
    assert cut[0][0] >= len(names) // 2
