"""Rows that kill or hang engines: they become error rows, all others are answered, and few engines are lost."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.batch import run_batch
from pipeline.deaths import MAX_DEATHS_IN_A_ROW
from pipeline.errors import JobError
from pipeline.records import Losses, Manifest
from pipeline.spec import parse_spec
from pipeline.suspects import MAX_DEATHS_OF_A_ROW
from tests.builders import numbered_png
from tests.running import r4b, read_output, simulated_spec, write_spec

pytestmark = pytest.mark.long

POISON = "POISON"


def write_questions(folder: Path, num_rows: int, poisonous: set[int], rows_per_shard: int = 500) -> None:
    """Shards whose questions kill where they say so."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, num_rows, rows_per_shard):
        numbers = range(first, min(first + rows_per_shard, num_rows))
        questions = [f"What is {n}? {POISON if n in poisonous else ''}" for n in numbers]
        images = pa.array([numbered_png(n) for n in numbers], pa.binary())
        table = pa.table({"id": [f"row-{n}" for n in numbers], "image": images, "question": questions})
        pq.write_table(table, folder / f"{first:06d}.parquet")


def poison_spec(folder: Path, how: str, **limits: Any) -> dict[str, Any]:
    spec = simulated_spec(folder, simulation={how: POISON}, max_num_seqs=64)
    return spec | {"limits": limits, "output": {"url": str(folder / "out"), "chunk_rows": 64}}


def run(spec: dict[str, Any]) -> Manifest:
    return run_batch(parse_spec(spec, "the test's spec"))


def guilty_of(table: pa.Table) -> set[str]:
    """Ids of the rows that killed; all others must be answered."""
    bad = table.filter(pa.compute.equal(table["error_type"], "engine_killed"))
    assert table["answer"].null_count == bad.num_rows
    return set(bad["sample_id"].to_pylist())


@pytest.mark.parametrize(
    ("how", "guilty", "num_rows"),
    [
        ("kills_process", {65}, 128),
        pytest.param("kills_engine", {3, 64, 65, 499}, 500, marks=pytest.mark.slow),
        pytest.param(
            "kills_process",
            {0, 1700, 1701, 4242, 6399, 6400, 9999},
            10_000,
            marks=[pytest.mark.slow, pytest.mark.timeout(3000)],
        ),
    ],
)
def test_poisonous_rows_are_isolated(tmp_path: Path, how: str, guilty: set[int], num_rows: int) -> None:
    write_questions(tmp_path / "in", num_rows, guilty)
    losses: list[Losses] = []
    limits = {"max_error_rate": 0.02, "max_engine_restarts": len(guilty) * MAX_DEATHS_OF_A_ROW}
    manifest = run_batch(parse_spec(poison_spec(tmp_path, how, **limits), "the spec"), on_losses=losses.append)
    table = read_output(tmp_path / "out")
    assert guilty_of(table) == {f"row-{n}" for n in guilty}
    assert manifest.errors_by_type == {"engine_killed": len(guilty)}
    assert len(set(table["sample_id"].to_pylist())) == table.num_rows == num_rows
    assert 0 < losses[0].engines <= len(guilty) * MAX_DEATHS_OF_A_ROW


def test_row_that_hangs_the_engine_is_isolated(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", 70, {66})
    run(poison_spec(tmp_path, "hangs_engine", max_error_rate=0.02, stall_timeout_s=5))
    assert guilty_of(read_output(tmp_path / "out")) == {"row-66"}


def test_too_many_restarts_fail_the_job_with_the_evidence(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", 100, {7})
    path = write_spec(tmp_path, poison_spec(tmp_path, "kills_engine", max_engine_restarts=2))
    finished = r4b("run", path)
    assert finished.code == 1
    assert "3 engines died, more than limits.max_engine_restarts = 2 allows" in finished.stderr
    assert "000000.parquet 0 to 64" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_engine_that_dies_of_everything_fails_the_job(tmp_path: Path) -> None:
    write_questions(tmp_path / "in", 64, set(range(64)))
    with pytest.raises(JobError, match=f"{MAX_DEATHS_IN_A_ROW} engines of one actor died in a row, without an answer"):
        run(poison_spec(tmp_path, "kills_engine"))
