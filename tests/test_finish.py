"""The end of a job whose output another run wrote to, too: parts not planned keep it from being marked done."""

from pathlib import Path

import pytest

from pipeline.batch import finish
from pipeline.commits import Output, claim_output, commit_chunk
from pipeline.errors import JobError
from pipeline.plan import Plan, complete_plan, make_plan
from pipeline.records import GeneratedChunk, Manifest, Tally
from pipeline.spec import JobSpec, fingerprint_parts
from tests.builders import image_table, make_generation, make_job, write_shard
from tests.reading import read_all


def output_of(job: JobSpec, plan: Plan) -> Output:
    output = Output(job, fingerprint_parts(job, "", plan.format, plan.schema, plan.prompt_table))
    claim_output(output)
    return output


def commit_all(job: JobSpec, plan: Plan) -> list[str]:
    """Answer and commit every chunk; gives their ids."""
    output, ids = output_of(job, plan), []
    for chunk in read_all(job, plan):
        results = tuple(task.error or make_generation() for task in chunk.tasks)
        commit_chunk(GeneratedChunk(chunk.work, chunk.tasks, results, chunk.kept, chunk.counts, 0.0), output)
        ids.append(chunk.work.chunk.chunk_id)
    return ids


def end(job: JobSpec, plan: Plan, stale: list[str]) -> Manifest:
    output = output_of(job, plan)
    return finish(output, complete_plan(job, plan), stale, Tally(Manifest("test", output.fingerprint_hash, "sim")))


def test_late_parts_of_a_shard_that_changed_keep_the_job_from_its_end(tmp_path: Path) -> None:
    job = make_job(tmp_path / "in", tmp_path / "out")
    shard = write_shard(tmp_path / "in" / "a.parquet", image_table(8))
    old = make_plan(job)
    ids = commit_all(job, old)
    shard.unlink()
    write_shard(shard, image_table(12, first=100))
    new = make_plan(job)
    commit_all(job, new)
    with pytest.raises(JobError, match=f"2 parts, {min(ids)}.parquet among them, came from another run"):
        end(job, new, [])
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert end(job, new, ids).num_rows == 12
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_a_run_that_knows_less_of_the_input_does_not_mark_the_output(tmp_path: Path) -> None:
    job = make_job(tmp_path / "in", tmp_path / "out")
    write_shard(tmp_path / "in" / "a.parquet", image_table(8))
    old = make_plan(job)
    write_shard(tmp_path / "in" / "b.parquet", image_table(8, first=100))
    commit_all(job, make_plan(job))
    with pytest.raises(JobError, match=r"b\.parquet as this one does not know it"):
        end(job, old, [])
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert end(job, make_plan(job), []).num_rows == 16
