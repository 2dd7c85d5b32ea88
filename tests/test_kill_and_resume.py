"""What a killed, interrupted or doubled driver leaves behind: every planned row once, nothing committed done again.

On the simulated engine, so that three kills of a 2,000-row job take a minute; Ray and the commits are real. The tests
of kills (five there) and of two drivers run on vLLM as well, marked slow.
"""

import contextlib
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.batch import run_batch
from pipeline.records import ChunkReport
from pipeline.spec import parse_spec
from tests.layouts import LAYOUTS, scene_samples, write_tar_index
from tests.running import (
    keys_of,
    kill_tree,
    r4b,
    read_output,
    real_spec,
    simulated_spec,
    started_r4b,
    write_scene_shards,
    write_spec,
)

pytestmark = pytest.mark.long

SLOW = {"simulation": {"seconds_per_token": 0.004}}
SpecMaker = Callable[[Path], dict[str, Any]]


def slow_simulated_spec(folder: Path) -> dict[str, Any]:
    return simulated_spec(folder, **SLOW)


on_both_engines = pytest.mark.parametrize(
    "make_spec",
    [slow_simulated_spec, pytest.param(real_spec, marks=[pytest.mark.slow, pytest.mark.timeout(2400)])],
    ids=["simulated", "vllm"],
)


def parts_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Name to (inode, time of change) of each part."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("data/*.parquet")}


def wait_for_parts(folder: Path, at_least: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while len(parts_of(folder)) < at_least:
        assert time.monotonic() < deadline, f"only {len(parts_of(folder))} parts after {seconds} s"
        time.sleep(0.02)


@on_both_engines
def test_driver_killed_several_times_ends_with_every_row_once(tmp_path: Path, make_spec: SpecMaker) -> None:
    num_rows = 1000 if make_spec is slow_simulated_spec else 2000
    write_scene_shards(tmp_path / "in", num_rows, rows_per_shard=500)
    path, out = write_spec(tmp_path, make_spec(tmp_path)), tmp_path / "out"
    rng = random.Random(7)
    seen: dict[str, tuple[int, int]] = {}
    for _ in range(2 if make_spec is slow_simulated_spec else 5):
        with started_r4b("run", path) as process:
            wait_for_parts(out, len(seen) + rng.randint(1, 12))
            kill_tree(process.pid)
        now = parts_of(out)
        assert {name: now[name] for name in seen} == seen
        assert len(now) < num_rows // 16
        seen = now
        assert keys_of(read_output(out)) != []
        assert not (out / "_SUCCESS").exists()
    finished = r4b("run", path, "--json", timeout=1200)
    assert finished.code == 0, finished.stderr
    assert {name: parts_of(out)[name] for name in seen} == seen
    keys = keys_of(read_output(out))
    assert len(keys) == num_rows
    assert set(keys) == {(f"scene-{n:06d}", "question") for n in range(num_rows)}
    assert (out / "_SUCCESS").exists()


@pytest.mark.parametrize(
    "layout",
    [
        "tar",
        pytest.param("tar with index", marks=pytest.mark.slow),
        pytest.param("tar-gz", marks=pytest.mark.slow),
        pytest.param("jsonl", marks=pytest.mark.slow),
    ],
)
def test_driver_killed_in_the_middle_of_a_shard_generates_no_committed_row_again(tmp_path: Path, layout: str) -> None:
    """One shard of many chunks: what its reader had reached says nothing about what is committed."""
    scenes = [{**row, "id": f"again-{n:04d}-{row['id']}"} for n in range(4) for row in scene_samples(150)]
    shard = write_one_shard(tmp_path / "in", layout, scenes)
    spec = slow_simulated_spec(tmp_path)
    path, out = write_spec(tmp_path, spec), tmp_path / "out"
    with started_r4b("run", path) as process:
        wait_for_parts(out, 7)
        kill_tree(process.pid)
    before = parts_of(out)
    committed = read_output(out).num_rows
    assert 0 < committed < 600, shard
    reports: list[ChunkReport] = []
    manifest = run_batch(parse_spec(spec, "the test's spec"), on_commit=reports.append)
    assert sum(report.num_rows for report in reports) == 600 - committed
    assert {name: parts_of(out)[name] for name in before} == before
    keys = keys_of(read_output(out))
    assert (len(keys), len(set(keys)), manifest.num_rows, manifest.num_chunks) == (600, 600, 600, 38)
    assert {sample_id for sample_id, _ in keys} == {row["id"] for row in scenes}


def write_one_shard(folder: Path, layout: str, scenes: list[dict[str, Any]]) -> Path:
    """All scenes in one shard of this layout."""
    (found,) = [one for one in LAYOUTS if one.name == layout.partition(" ")[0]]
    found.write(folder, scenes, rows_per_shard=len(scenes))
    (shard,) = [path for path in folder.iterdir() if path.is_file()]
    if "index" in layout:
        write_tar_index(shard)
    return shard


@on_both_engines
def test_two_drivers_at_once_give_every_row_once(tmp_path: Path, make_spec: SpecMaker) -> None:
    write_scene_shards(tmp_path / "in", 300)
    path, out = write_spec(tmp_path, make_spec(tmp_path)), tmp_path / "out"
    with started_r4b("run", path) as first, started_r4b("run", path) as second:
        codes = []
        for process in (first, second):
            _, stderr = process.communicate(timeout=600)
            codes.append((process.returncode, stderr))
    assert [code for code, _ in codes] == [0, 0], codes
    keys = keys_of(read_output(out))
    assert len(keys) == len(set(keys)) == 300


def test_interrupt_stops_cleanly_and_resumes(tmp_path: Path) -> None:
    write_scene_shards(tmp_path / "in", 600)
    path, out = write_spec(tmp_path, simulated_spec(tmp_path, simulation={"seconds_per_token": 0.02})), tmp_path / "out"
    with started_r4b("run", path) as process:
        wait_for_parts(out, 1)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert "Traceback" not in stderr
        assert "goes on from there" in stderr
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []
    done = len(parts_of(out))
    finished = r4b("run", path, "--set", "engine.simulation.seconds_per_token=0.02")
    assert finished.code == 0, finished.stderr
    assert len(parts_of(out)) > done
    assert len(set(keys_of(read_output(out)))) == 600


def test_killed_replica_is_replaced_and_its_chunks_redone(tmp_path: Path) -> None:
    write_scene_shards(tmp_path / "in", 300)
    path, out = write_spec(tmp_path, simulated_spec(tmp_path, **SLOW)), tmp_path / "out"
    with started_r4b("run", path, "--json") as process:
        wait_for_parts(out, 1)
        assert kill_one(process.pid, "MapWorker")
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    keys = keys_of(read_output(out))
    assert len(keys) == len(set(keys)) == 300


@pytest.mark.parametrize(
    ("title", "number", "num_lost"),
    [("EngineActor", signal.SIGSTOP, 1), ("read_batches", signal.SIGSTOP, 0), ("EngineActor", signal.SIGTERM, 0)],
    ids=["actor hangs", "reader hangs", "actor is preempted"],
)
def test_job_goes_on_without_a_process_that_hangs_or_must_leave(
    tmp_path: Path, title: str, number: int, num_lost: int
) -> None:
    write_scene_shards(tmp_path / "in", 1200)
    spec = simulated_spec(tmp_path, simulation={"seconds_per_token": 0.02}) | {"limits": {"stall_timeout_s": 10}}
    path, out = write_spec(tmp_path, spec), tmp_path / "out"
    with started_r4b("run", path, "--json") as process:
        wait_for_parts(out, 1)
        while not kill_one(process.pid, title, number, at_least_s=IMPORTS_S):
            assert process.poll() is None, "the process was not there at any time"
            time.sleep(0.1)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    lost = re.search(r"(\d+) engines were lost", stderr)
    assert (int(lost[1]) if lost else 0) == num_lost, stderr
    keys = keys_of(read_output(out))
    assert len(keys) == len(set(keys)) == 1200


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_job_goes_on_without_vllms_own_process_that_hangs(tmp_path: Path) -> None:
    write_scene_shards(tmp_path / "in", 400)
    path = write_spec(tmp_path, real_spec(tmp_path) | {"limits": {"stall_timeout_s": 20}})
    with started_r4b("run", path, "--json") as process:
        wait_for_parts(tmp_path / "out", 1, seconds=300)
        assert kill_one(process.pid, "EngineCore", signal.SIGSTOP)
        _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert "1 engines were lost" in stderr
    keys = keys_of(read_output(tmp_path / "out"))
    assert len(keys) == len(set(keys)) == 400


IMPORTS_S = 2.0
"""Of processor time, that a worker takes for its imports: before, the watch knows of none (docs/DESIGN.md)."""


def kill_one(root: int, title: str, number: int = signal.SIGKILL, at_least_s: float = 0.0) -> bool:
    """Send a signal to the process of the tree that has worked most of those with this word in their title."""
    worked: dict[psutil.Process, float] = {}
    for process in psutil.Process(root).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                worked[process] = process.cpu_times().user
    worked = {process: seconds for process, seconds in worked.items() if seconds >= at_least_s}
    if worked:
        max(worked, key=worked.__getitem__).send_signal(number)
    return bool(worked)
