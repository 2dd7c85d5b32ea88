"""The whole flow of a batch job: plan, read, generate, commit. The one module that imports ray.data.

The dataset has one row for each chunk, so a block is a chunk: Ray moves references, retries chunks and never
splits one. Rows of the output exist only inside the tasks that make them.
"""

import asyncio
import logging
import math
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pipeline.cluster import find_cause, start_ray
from pipeline.commits import (
    Output,
    claim_output,
    commit_chunk,
    committed_chunks,
    count_errors_by_type,
    drop_parts,
    finish_output,
    read_reports,
    read_retry,
    reopen_output,
)
from pipeline.engine import open_engine
from pipeline.engine.contract import task_to_request
from pipeline.engine.models import check_model, identify_model
from pipeline.errors import EngineDiedError, ErrorRateError, JobError, SampleError, SpecError
from pipeline.plan import Plan, make_plan
from pipeline.readers import read_chunk
from pipeline.records import ChunkReport, GeneratedChunk, Generation, Manifest, ReadChunk, Task, Work, valid_text
from pipeline.spec import JobSpec, fingerprint_parts

MIN_ROWS_FOR_ERROR_RATE = 100
WHOLE_BLOCK: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}


def run_batch(
    job: JobSpec,
    force_new: bool = False,
    retry_errors: bool = False,
    drop_stale: bool = False,
    on_start: Callable[[Plan, list[Work]], None] = lambda plan, works: None,
    on_commit: Callable[[ChunkReport], None] = lambda report: None,
) -> Manifest:
    """Run a job to its end, or what an earlier run left of it; raises SpecError before, JobError after the start."""
    check_model(job.engine)
    plan = make_plan(job)
    output = Output(job, fingerprint_parts(job, identify_model(job.engine)))
    claim_output(output, force_new)
    committed = committed_chunks(output)
    stale = refuse_stale(output, plan, committed, drop_stale)
    works = [Work(chunk) for chunk in plan.without(committed).chunks]
    if retry_errors:
        works += error_works(output, plan, committed)
    if works:
        start_ray(job)
    on_start(plan, works)
    if works:
        reopen_output(output)
        retried = frozenset(work.chunk.chunk_id for work in works if work.retry is not None)
        watch_errors(run_works(works, output), retried, job.limits.max_error_rate, on_commit)
    return finish(output, plan, stale)


def run_works(works: list[Work], output: Output) -> Iterator[ChunkReport]:
    """Stream the works through read, generate and commit; yields a report for each chunk as it is committed."""
    quiet_data()
    job = output.job
    dataset = works_to_dataset(works)
    dataset = dataset.map_batches(read_batch, fn_kwargs={"job": job}, num_cpus=CPUS_PER_READ, **WHOLE_BLOCK)
    with warnings.catch_warnings():  # Ray deprecates `max_restarts` here before it has another place for it
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        dataset = dataset.map_batches(EngineActor, fn_constructor_args=(job,), **engine_resources(job), **WHOLE_BLOCK)
    dataset = dataset.map_batches(commit_batch, fn_kwargs={"output": output}, num_cpus=CPUS_PER_COMMIT, **WHOLE_BLOCK)
    try:
        for row in dataset.iter_rows():
            yield pickle.loads(row["item"])
    except Exception as error:  # Ray wraps what our own code raised in several layers of its own
        raise find_cause(error) from error


def works_to_dataset(works: list[Work]) -> ray.data.Dataset:
    """One row and one block for each chunk: references only."""
    return ray.data.from_arrow([to_batch(work) for work in works])


def read_batch(batch: pa.Table, job: JobSpec) -> pa.Table:
    """CPU task: fetch, check, decode and render one chunk."""
    return to_batch(read_chunk(from_batch(batch), job))


class EngineActor:
    """GPU actor: one engine. Its chunks run concurrently, so that one long thought does not idle the engine."""

    def __init__(self, job: JobSpec) -> None:
        self.job = job
        self.engine: Any = None
        self.ready_at = 0.0
        self.starting = asyncio.Lock()
        # Images wait as the bytes that were read until the engine is near: rendering makes copies of each.
        self.slots = asyncio.Semaphore(2 * job.engine.max_num_seqs)

    async def __call__(self, batch: pa.Table) -> pa.Table:
        chunk: ReadChunk = from_batch(batch)
        async with self.starting:  # here, not in the constructor: the engine lives in this event loop
            if self.engine is None:
                self.engine = await open_engine(self.job.engine)
                self.ready_at = time.time()
        try:
            results = await asyncio.gather(*(self.answer(task) for task in chunk.tasks))
        except EngineDiedError:
            # An engine that died never recovers in its process; exiting lets Ray restart the actor, retry its chunks.
            os._exit(1)
        tasks = tuple(replace(task, images=()) for task in chunk.tasks)
        return to_batch(GeneratedChunk(chunk.work, tasks, tuple(results), chunk.kept, self.ready_at))

    async def answer(self, task: Task) -> Generation | SampleError:
        """One row's generation, or what is wrong with it."""
        if task.error is not None:
            return task.error
        try:
            async with self.slots:
                generation: Generation = await self.engine.generate(task_to_request(task, self.job.sampling))
            return generation
        except SampleError as error:
            return error


def commit_batch(batch: pa.Table, output: Output) -> pa.Table:
    """CPU task: one atomic write."""
    return to_batch(commit_chunk(from_batch(batch), output))


def to_batch(item: Any) -> pa.Table:
    """A Ray Data batch of one row, the pickled `item`."""
    return pa.table({"item": pa.array([pickle.dumps(item)], pa.large_binary())})


def from_batch(batch: pa.Table) -> Any:
    """The item of a batch that `to_batch` made."""
    return pickle.loads(batch.column("item")[0].as_buffer())


# Together one core, so that a job runs on a machine that has no more. A read must not reserve what a CPU engine
# does: Ray Data would fuse the two stages, and reading would wait for the engine.
CPUS_PER_READ, CPUS_PER_COMMIT, CPUS_PER_CPU_ENGINE = 0.5, 0.25, 0.25
MAX_ENGINE_RESTARTS = 10
"""Of one replica; then the job fails rather than feed the same poison to engine after engine."""


def engine_resources(job: JobSpec) -> dict[str, Any]:
    """The actor pool: its size, what each actor reserves, and how many chunks each holds."""
    engine = job.engine
    num_gpus = engine.num_gpus * engine.tensor_parallel_size
    chunks = chunks_in_flight(engine.max_num_seqs, job.output.chunk_rows * len(job.prompts))
    pool = ray.data.ActorPoolStrategy(
        min_size=engine.replicas.min,
        max_size=engine.replicas.max,
        max_concurrent_calls_per_actor=chunks,
        # Ray adds an actor when the tasks in flight reach 1.75 times those that run, so as many must wait.
        max_tasks_in_flight_per_actor=2 * chunks,
    )
    return {
        "compute": pool,
        "num_gpus": num_gpus,
        "num_cpus": 1 if num_gpus else CPUS_PER_CPU_ENGINE,
        "max_restarts": MAX_ENGINE_RESTARTS,
    }


def chunks_in_flight(max_num_seqs: int, rows_per_chunk: int) -> int:
    """How many chunks an engine runs at once: twice what fills it, for near its end a chunk is a few long thoughts."""
    return 2 * math.ceil(max_num_seqs / rows_per_chunk) + 2


def refuse_stale(output: Output, plan: Plan, committed: frozenset[str], drop: bool) -> list[str]:
    """Parts of shards that changed would show their rows twice: raise SpecError, or drop them; others are reported."""
    stale = plan.stale(committed)
    shards = {valid_text(chunk.shard) for chunk in plan.chunks}
    changed = [report.chunk_id for report in read_reports(output, stale) if report.shard in shards]
    if drop and changed:
        reopen_output(output)  # before the first row is missing
        drop_parts(output, changed)
    elif changed:
        raise SpecError(
            f"output.url: {len(changed)} parts, {changed[0]}.parquet among them, come from shards that changed since, "
            "or were made with another input.limit; their rows would stand twice. "
            "Remove these parts with --drop-stale, or choose another output.url."
        )
    return sorted(set(stale) - set(changed))


def error_works(output: Output, plan: Plan, committed: frozenset[str]) -> list[Work]:
    """The committed chunks that hold error rows, to be done again for those rows alone."""
    chunks = {chunk.chunk_id: chunk for chunk in plan.chunks if chunk.chunk_id in committed}
    bad = [report.chunk_id for report in read_reports(output, chunks) if report.num_errors]
    return [Work(chunks[chunk_id], read_retry(output, chunk_id)) for chunk_id in bad]


def watch_errors(
    reports: Iterator[ChunkReport],
    retried: frozenset[str],
    max_error_rate: float,
    on_commit: Callable[[ChunkReport], None],
) -> None:
    """Drain the flow, and stop it as soon as too many rows have failed.

    Chunks with errors that are done again say nothing about the whole job; `finish` judges them with all others.
    """
    num_rows = num_errors = 0
    for report in reports:
        on_commit(report)
        if report.chunk_id in retried:
            continue
        num_rows += report.num_rows
        num_errors += report.num_errors
        if num_rows >= MIN_ROWS_FOR_ERROR_RATE:
            check_error_rate(num_rows, num_errors, max_error_rate, report.first_error)


def check_error_rate(num_rows: int, num_errors: int, max_error_rate: float, example: str | None) -> None:
    """Raise ErrorRateError, once there are rows enough to judge by, or when none at all was answered."""
    judged = num_rows >= MIN_ROWS_FOR_ERROR_RATE or num_errors == num_rows
    if judged and num_errors > max_error_rate * num_rows:
        raise ErrorRateError(
            f"{num_errors} of {num_rows} rows failed, more than limits.max_error_rate = {max_error_rate:g} allows"
            + (f"; one of them: {example}" if example else ".")
            + " Committed rows stay. Raise the limit, or mend the input and run with --retry-errors."
        )


def finish(output: Output, plan: Plan, stale: list[str]) -> Manifest:
    """Check that every planned chunk is committed, add up the parts, and write `_manifest.json` and `_SUCCESS`."""
    planned = [chunk.chunk_id for chunk in plan.chunks]
    if missing := set(planned) - committed_chunks(output):
        raise JobError(f"{len(missing)} of {len(planned)} chunks are not committed; run the job again to finish them.")
    manifest = Manifest(output.job.name, output.fingerprint_hash, output.job.engine.model, len(planned))
    bad = [report.chunk_id for report in read_reports(output, planned) if manifest.add(report)]
    manifest.errors_by_type = count_errors_by_type(output, bad)
    manifest.stale_parts = stale
    check_error_rate(manifest.num_rows, manifest.num_errors, output.job.limits.max_error_rate, None)
    finish_output(output, manifest.to_json())
    return manifest


def quiet_data() -> None:
    """Ray Data without bars, chatter and impatience."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # waiting for GPUs to arrive is no failure
