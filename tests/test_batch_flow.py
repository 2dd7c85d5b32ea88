"""The batch flow through `run_batch`, on the simulated engine and real Ray: completeness, resume, refusals, errors.

The real engine runs in test_real_job.py; kills and races in test_kill_and_resume.py.
"""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.batch import chunks_in_flight, engine_resources, run_batch
from pipeline.errors import ErrorRateError, JobError, SpecError
from pipeline.records import ChunkReport, Manifest
from pipeline.spec import parse_spec
from tests.builders import make_job
from tests.running import keys_of, read_output, simulated_spec, write_scene_shards
from tests.s3_server import S3Server


@pytest.fixture(autouse=True)
def store_before_ray(s3: S3Server) -> S3Server:
    """Ray's workers have the environment of the moment when Ray started, and S3's credentials are in it."""
    return s3


def run(spec: dict[str, Any], **options: Any) -> tuple[Manifest, list[ChunkReport]]:
    reports: list[ChunkReport] = []
    manifest = run_batch(parse_spec(spec, "test"), on_commit=reports.append, **options)
    return manifest, reports


def part_versions(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "data").iterdir()}


def png(color: tuple[int, int, int]) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(sink, "PNG")
    return sink.getvalue()


def write_images(path: Path, images: list[bytes | None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = [f"row-{index}" for index in range(len(images))]
    pq.write_table(pa.table({"id": ids, "image": pa.array(images, pa.binary())}), path)


def image_spec(folder: Path, **limits: Any) -> dict[str, Any]:
    spec = simulated_spec(folder)
    spec["prompts"] = [{"id": "p", "template": "Describe this image."}]
    spec["output"]["keep_columns"] = []
    return spec | {"limits": limits}


def test_run_two_prompts_gives_every_row_once(tmp_path: Path) -> None:
    write_scene_shards(tmp_path / "in", 110)
    spec = simulated_spec(tmp_path)
    spec["prompts"].append({"id": "short", "template": "Describe it.", "thinking_mode": "short"})
    manifest, reports = run(spec)
    table = read_output(tmp_path / "out")
    wanted = {(f"scene-{n:06d}", prompt) for n in range(110) for prompt in ("question", "short")}
    assert len(keys_of(table)) == 220
    assert set(keys_of(table)) == wanted
    assert manifest.num_rows == 220
    assert sum(report.num_rows for report in reports) == 220
    assert manifest.num_chunks == len(list((tmp_path / "out" / "data").iterdir())) == 8
    assert (tmp_path / "out" / "_SUCCESS").read_bytes() == b""
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["num_rows"] == 220
    modes = set(zip(table["prompt_id"].to_pylist(), table["mode_chosen"].to_pylist(), strict=True))
    assert modes == {("question", "thinking"), ("question", "non-thinking"), ("short", "non-thinking")}


def test_run_again_generates_nothing_and_new_shards_only_their_own(tmp_path: Path) -> None:
    write_scene_shards(tmp_path / "in", 64, rows_per_shard=32)
    spec = simulated_spec(tmp_path)
    run(spec)
    before = part_versions(tmp_path / "out")
    _, reports = run(spec)
    assert reports == []
    assert part_versions(tmp_path / "out") == before
    write_scene_shards(tmp_path / "more", 96, rows_per_shard=32)
    (tmp_path / "more" / "scenes-000064.parquet").rename(tmp_path / "in" / "scenes-000064.parquet")
    manifest, reports = run(spec)
    assert len(reports) == 2
    assert manifest.num_rows == 96
    after = part_versions(tmp_path / "out")
    assert {name: after[name] for name in before} == before


def test_run_changed_prompt_is_refused_and_named(tmp_path: Path) -> None:
    write_scene_shards(tmp_path / "in", 16)
    spec = simulated_spec(tmp_path)
    run(spec)
    spec["prompts"][0]["template"] = "Now {{ question }}"
    before = part_versions(tmp_path / "out")
    with pytest.raises(SpecError, match=r"(?s)prompts: was .*now .*Now \{\{ question") as refusal:
        run(spec)
    assert "sampling" not in str(refusal.value)
    assert part_versions(tmp_path / "out") == before
    manifest, _ = run(spec, force_new=True)
    assert manifest.num_rows == 16


def test_run_changed_shard_is_refused_until_dropped(tmp_path: Path) -> None:
    write_scene_shards(tmp_path / "in", 32)
    spec = simulated_spec(tmp_path)
    run(spec)
    write_scene_shards(tmp_path / "in", 31)
    with pytest.raises(SpecError, match="shards that changed"):
        run(spec)
    manifest, _ = run(spec, drop_stale=True)
    assert manifest.num_rows == 31
    assert len(set(keys_of(read_output(tmp_path / "out")))) == read_output(tmp_path / "out").num_rows == 31


def test_run_removed_shard_is_reported_as_stale(tmp_path: Path) -> None:
    write_scene_shards(tmp_path / "in", 64, rows_per_shard=32)
    spec = simulated_spec(tmp_path)
    run(spec)
    (tmp_path / "in" / "scenes-000032.parquet").unlink()
    manifest, reports = run(spec)
    assert reports == []
    assert len(manifest.stale_parts) == 2
    assert manifest.num_rows == 32


def test_run_bad_rows_become_error_rows_or_fail_the_job(tmp_path: Path) -> None:
    images: list[bytes | None] = [png((n, 0, 0)) for n in range(120)]
    images[3], images[50], images[119] = None, b"", b"no image"
    write_images(tmp_path / "in" / "a.parquet", images)
    with pytest.raises(ErrorRateError, match="max_error_rate"):
        run(image_spec(tmp_path, max_error_rate=0.01))
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    manifest, _ = run(image_spec(tmp_path, max_error_rate=0.03))
    assert manifest.errors_by_type == {"image_null": 1, "image_empty": 1, "image_unrecognized": 1}
    table = read_output(tmp_path / "out")
    bad = table.filter(pa.compute.is_valid(table["error_type"]))
    assert set(bad["sample_id"].to_pylist()) == {"row-3", "row-50", "row-119"}
    assert bad["answer"].null_count == bad["mode_chosen"].null_count == 3
    assert table.num_rows == 120


def test_run_finished_output_with_too_many_errors_still_fails(tmp_path: Path) -> None:
    write_images(tmp_path / "in" / "a.parquet", [None] * 30 + [png((9, 9, 9))] * 90)
    with pytest.raises(ErrorRateError):
        run(image_spec(tmp_path, max_error_rate=0.01) | {"output": {"url": str(tmp_path / "out"), "chunk_rows": 1000}})
    with pytest.raises(ErrorRateError):
        run(image_spec(tmp_path, max_error_rate=0.01) | {"output": {"url": str(tmp_path / "out"), "chunk_rows": 1000}})
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_run_all_rows_failing_fails_even_a_small_job(tmp_path: Path) -> None:
    write_images(tmp_path / "in" / "a.parquet", [None, b""])
    with pytest.raises(ErrorRateError, match="2 of 2 rows"):
        run(image_spec(tmp_path))


def test_run_whose_output_another_job_took_meanwhile_does_not_finish_it(tmp_path: Path) -> None:
    write_images(tmp_path / "in" / "a.parquet", [png((1, 2, 3))] * 20)
    job_file = tmp_path / "out" / "_job.json"

    def take_over(report: ChunkReport) -> None:
        job_file.write_text(json.dumps(json.loads(job_file.read_text()) | {"fingerprint": "0" * 64}))

    with pytest.raises(JobError, match="Another job took this output meanwhile"):
        run_batch(parse_spec(image_spec(tmp_path), "test"), on_commit=take_over)
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_retry_errors_redoes_only_the_error_rows(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images: list[dict[str, Any]] = [{"bytes": png((n, 9, 9)), "path": None} for n in range(40)]
    images[7] = {"bytes": None, "path": "late.png"}
    pq.write_table(
        pa.table({"id": [f"row-{n}" for n in range(40)], "image": pa.array(images, struct)}), folder / "a.parquet"
    )
    spec = image_spec(tmp_path)
    manifest, _ = run(spec)
    assert manifest.errors_by_type == {"image_missing": 1}
    before, first = part_versions(tmp_path / "out"), read_output(tmp_path / "out")
    (folder / "late.png").write_bytes(png((1, 2, 3)))
    assert run(spec)[1] == []
    manifest, reports = run(spec, retry_errors=True)
    assert manifest.num_errors == 0
    assert len(reports) == 1
    after, second = part_versions(tmp_path / "out"), read_output(tmp_path / "out")
    assert sum(before[name] != after[name] for name in before) == 1
    assert keys_of(first) == keys_of(second)
    changed = [n for n in range(40) if first.slice(n, 1).to_pylist() != second.slice(n, 1).to_pylist()]
    assert [first["sample_id"][n].as_py() for n in changed] == ["row-7"]


def test_retry_errors_of_a_few_bad_parts_does_not_judge_the_job_by_them(tmp_path: Path) -> None:
    images: list[bytes | None] = [png((n % 250, n // 250, 9)) for n in range(1200)]
    images[:5] = [None] * 5
    write_images(tmp_path / "in" / "a.parquet", images)
    spec = image_spec(tmp_path, max_error_rate=0.05)
    spec["output"]["chunk_rows"] = 128
    manifest, _ = run(spec)
    assert (manifest.num_errors, manifest.num_rows) == (5, 1200)
    spec["limits"] = {"max_error_rate": 0.01}
    manifest, reports = run(spec, retry_errors=True)  # 5 of 128 rows is more than the limit, 5 of 1,200 is not
    assert (manifest.num_errors, len(reports)) == (5, 1)
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_run_over_s3_gives_the_rows_of_the_disk(tmp_path: Path, s3: S3Server) -> None:
    write_scene_shards(tmp_path / "in", 64, rows_per_shard=32)
    local = simulated_spec(tmp_path)
    run(local)
    prefix = s3.fresh_prefix("flow")
    for path in (tmp_path / "in").iterdir():
        s3.put(f"{prefix}/in/{path.name}", path.read_bytes())
    remote = local | {"storage": {"endpoint_url": s3.endpoint_url}, "input": {"url": f"{prefix}/in/"}}
    remote["output"] = local["output"] | {"url": f"{prefix}/out"}
    manifest, reports = run(remote)
    assert manifest.num_rows == 64
    assert len(reports) == 4
    stored = {url: s3.get(url) for url in s3.list(f"{prefix}/out/")}
    assert f"{prefix}/out/_SUCCESS" in stored
    rows = [
        row for url, data in stored.items() if "/data/" in url for row in pq.read_table(io.BytesIO(data)).to_pylist()
    ]
    where_from = ("shard", "latency_s")
    ours = sorted(({k: v for k, v in row.items() if k not in where_from} for row in rows), key=lambda r: r["sample_id"])
    theirs = read_output(tmp_path / "out").drop_columns(list(where_from)).sort_by("sample_id").to_pylist()
    assert ours == theirs
    assert run(remote)[1] == []
    secret = s3.secret_key.encode()
    assert not any(secret in data for data in stored.values())


@pytest.mark.parametrize("num_gpus", [0, 0.5, 1])
def test_engine_reserves_so_little_cpu_that_its_gpus_decide_how_many_there_are(tmp_path: Path, num_gpus: float) -> None:
    job = make_job(tmp_path / "in", tmp_path / "out", engine={"kind": "simulated", "num_gpus": num_gpus})
    resources = engine_resources(job)
    assert resources["num_gpus"] == num_gpus
    assert 3 * resources["num_cpus"] < 1, "of a CPU for each GPU, Ray Data allots to engines about a third"


@pytest.mark.parametrize(
    ("max_num_seqs", "rows_per_chunk", "chunks"), [(256, 256, 4), (256, 20, 28), (1, 1000, 4), (64, 64, 4), (65, 64, 6)]
)
def test_chunks_in_flight_hold_twice_what_fills_the_engine(max_num_seqs: int, rows_per_chunk: int, chunks: int) -> None:
    assert chunks_in_flight(max_num_seqs, rows_per_chunk) == chunks
    assert chunks * rows_per_chunk >= 2 * max_num_seqs
