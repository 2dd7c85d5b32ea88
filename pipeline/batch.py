"""The whole flow of a batch job: plan, read, generate, commit. The one module that imports ray.data.

The dataset has one row for each chunk, so a block is a chunk: Ray moves references, retries chunks and never
splits one. Rows of the output exist only inside the tasks that make them.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pipeline.asking import load_prompt_table
from pipeline.cluster import find_cause, start_ray
from pipeline.commits import (
    Output,
    check_owner,
    claim_output,
    commit_chunk,
    committed_chunks,
    count_errors,
    drop_parts,
    finish_output,
    has_part,
    read_reports,
    read_retry,
    reopen_output,
)
from pipeline.engine.models import check_model, find_tiling, identify_model
from pipeline.engine_actor import EngineActor
from pipeline.errors import JobError, SpecError
from pipeline.lives import attend, counted
from pipeline.matching import match_prompts
from pipeline.outcomes import Outcome, check_error_rate, check_shards, count_in, watch_errors
from pipeline.plan import Plan, complete_plan, make_plan, make_readings
from pipeline.readers import ReadSettings, read_chunks
from pipeline.records import (
    Chunk,
    ChunkReport,
    GeneratedChunk,
    Losses,
    Manifest,
    Reading,
    Tally,
    Work,
    valid_text,
)
from pipeline.sharing import CPUS_PER_ENGINE, Pool
from pipeline.spec import JobSpec, fingerprint_parts
from pipeline.transport import from_batch, from_batches, to_batch
from pipeline.watch import count_losses, end_watch, start_watch

WHOLE_BLOCK: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
ONE_ROW = {**WHOLE_BLOCK, "batch_size": 1}
"""The same, for a block has one row; for a stage with GPUs Ray Data takes no None."""


def run_batch(
    job: JobSpec,
    force_new: bool = False,
    retry_errors: bool = False,
    drop_stale: bool = False,
    on_start: Callable[[Plan, list[Work]], None] = lambda plan, works: None,
    on_commit: Callable[[ChunkReport], None] = lambda report: None,
    on_losses: Callable[[Losses], None] = lambda losses: None,
) -> Manifest:
    """Run a job to its end, or what an earlier run left of it; raises SpecError before, JobError after the start."""
    check_model(job.engine)
    identity = identify_model(job.engine)
    deployed = find_deployment(job, identity)
    plan = make_plan(job)
    if plan.prompt_table is not None:
        load_prompt_table(*plan.prompt_table, job.storage)  # a table that cannot be used fails here, not in each reader
    parts = fingerprint_parts(job, identity, plan.format, plan.schema, plan.prompt_table)
    output = Output(job, {**parts, **deployed})
    claim_output(output, force_new)
    committed = committed_chunks(output)
    known, stale = refuse_stale(output, plan, committed, drop_stale)
    works = [Work(chunk) for chunk in known.without(committed).chunks]
    if retry_errors:
        works += error_works(output, known, committed)
    readings = make_readings(works, plan.streams)
    tally = Tally(Manifest(job.name, output.fingerprint_hash, job.engine.model))
    if readings:
        start_ray(job)
    on_start(plan, works)
    if readings:
        reopen_output(output)
        settings = ReadSettings(job, plan.format, plan.schema, find_tiling(job.engine), plan.prompt_table)
        retried = frozenset(work.chunk.chunk_id for work in works if work.retry is not None)
        outcomes = run_readings(readings, settings, output, bool(committed), on_losses)
        reports = count_in(outcomes, tally)
        check_shards(watch_errors(reports, retried, job.limits.max_error_rate, on_commit))
    return finish(output, complete_plan(job, plan), stale, tally)


def find_deployment(job: JobSpec, model_identity: str) -> dict[str, str]:
    """What answers a job that has no engines of its own, for its fingerprint; raises SpecError if it is not there."""
    if job.engine.pool == "actors":
        return {}
    from pipeline.engine.served import check_deployment  # here, for most jobs need no Serve, which is slow to import

    start_ray(job)
    return check_deployment(job.engine, model_identity)


def run_readings(
    readings: list[Reading],
    settings: ReadSettings,
    output: Output,
    resumes: bool,
    on_losses: Callable[[Losses], None],
) -> Iterator[Outcome]:
    """Stream the input through read, generate and commit; yields a report for each chunk as it is committed."""
    set_up_data()
    job = output.job
    watch = start_watch(job.limits, Pool(job.engine.gpus_per_actor, job.engine.replicas.min))
    reading = {"settings": settings, "output": output if resumes else None, "watch": watch}
    dataset = readings_to_dataset(readings)
    dataset = dataset.map_batches(read_batches, fn_kwargs=reading, num_cpus=CPUS_PER_READ, **WHOLE_BLOCK)
    with warnings.catch_warnings():  # Ray deprecates `max_restarts` here before it has another place for it
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        engine = {"fn_constructor_args": (job, output.fingerprint, watch), **engine_resources(job)}
        dataset = dataset.map_batches(EngineActor, **engine, **ONE_ROW)
    committing = {"output": output, "watch": watch}
    dataset = dataset.map_batches(commit_batch, fn_kwargs=committing, num_cpus=CPUS_PER_COMMIT, **WHOLE_BLOCK)
    num_chunks, ended = 0, False
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for outcome in from_batches(batch):
                num_chunks += isinstance(outcome, ChunkReport)
                yield outcome
        ended = True
    except Exception as error:  # Ray wraps what our own code raised in several layers of its own
        raise find_cause(error) from error
    finally:
        on_losses(count_losses(watch, num_chunks if ended else None))
        end_watch(watch)


def readings_to_dataset(readings: list[Reading]) -> ray.data.Dataset:
    """One row and one block for each pass over a shard: references only."""
    return ray.data.from_arrow([to_batch(reading) for reading in readings])


def read_batches(batch: pa.Table, settings: ReadSettings, output: Output | None, watch: Any) -> Iterator[pa.Table]:
    """CPU task: one pass over a shard; fetches, checks, decodes and renders, and gives a block for each chunk."""
    is_committed = (lambda chunk_id: False) if output is None else partial(has_part, output)
    attend(watch, settings.job.limits)
    reading = from_batch(batch)
    with counted(watch, reading.name):
        yield from map(to_batch, read_chunks(reading, settings, is_committed))  # no name holds a chunk longer


def commit_batch(batch: pa.Table, output: Output, watch: Any) -> pa.Table:
    """CPU task: one atomic write."""
    attend(watch, output.job.limits)
    chunk = from_batch(batch)
    return to_batch(commit_chunk(chunk, output)) if isinstance(chunk, GeneratedChunk) else batch


# With an engine's, together one core, so that a job runs on a machine that has no more. A read must not reserve what a
# CPU engine does: Ray Data would fuse the two stages, and reading would wait for the engine.
CPUS_PER_READ, CPUS_PER_COMMIT = 0.5, 0.25


def engine_resources(job: JobSpec) -> dict[str, Any]:
    """The actor pool: its size, what each actor reserves, and how many chunks each holds."""
    engine = job.engine
    num_gpus = engine.gpus_per_actor
    chunks = chunks_in_flight(engine.max_num_seqs, job.output.chunk_rows * max(1, len(job.spec_prompts)))
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
        "num_cpus": CPUS_PER_ENGINE,
        "max_restarts": -1,  # how often is the watch's to say
    }


def chunks_in_flight(max_num_seqs: int, rows_per_chunk: int) -> int:
    """How many chunks an engine runs at once: twice what fills it, for near its end a chunk is a few long thoughts."""
    return 2 * math.ceil(max_num_seqs / rows_per_chunk) + 2


def refuse_stale(output: Output, plan: Plan, committed: frozenset[str], drop: bool) -> tuple[Plan, list[str]]:
    """Parts of shards that changed would show their rows twice: raise SpecError, or drop them; others are reported.

    Gives the plan with the committed chunks of its streams, and the chunk ids of parts whose shards are gone.
    """
    streams = {valid_text(shard.url): shard for shard in plan.streams}
    shards = {valid_text(chunk.shard) for chunk in plan.chunks} | set(streams)
    changed: list[str] = []
    gone: list[str] = []
    read: list[Chunk] = []
    for report in read_reports(output, plan.unplanned(committed)):
        stream = streams.get(report.shard)
        if stream is not None and stream.chunk(report.start, report.stop).chunk_id == report.chunk_id:
            read.append(stream.chunk(report.start, report.stop))
        else:
            (changed if report.shard in shards else gone).append(report.chunk_id)
    if drop and changed:
        reopen_output(output)  # before the first row is missing
        drop_parts(output, changed)
    elif changed:
        raise SpecError(
            f"output.url: {len(changed)} parts, {changed[0]}.parquet among them, come from shards that changed since, "
            "or whose prompt shards did, or were made with another input.limit; their rows would stand twice. "
            "Remove these parts with --drop-stale, or choose another output.url."
        )
    return replace(plan, chunks=(*plan.chunks, *read)), gone


def refuse_others(output: Output, unplanned: Set[str]) -> None:
    """Parts that came during this run and are not of its plan: raise JobError, for another saw the input otherwise."""
    for report in read_reports(output, sorted(unplanned)[:1]):
        raise JobError(
            f"output.url: {len(unplanned)} parts, {report.chunk_id}.parquet among them, came from another run while "
            f"this one went on, of {report.shard} as this one does not know it. The output is not marked as done. When "
            "the other run has ended, run the job again, with --drop-stale if it asks for that."
        )


def error_works(output: Output, plan: Plan, committed: frozenset[str]) -> list[Work]:
    """The committed chunks that hold error rows, to be done again for those rows alone."""
    chunks = {chunk.chunk_id: chunk for chunk in plan.chunks if chunk.chunk_id in committed}
    bad = [report.chunk_id for report in read_reports(output, chunks) if report.num_errors]
    return [Work(chunks[chunk_id], read_retry(output, chunk_id)) for chunk_id in bad]


def finish(output: Output, plan: Plan, stale: list[str], tally: Tally) -> Manifest:
    """Check that every planned chunk is committed, add up the parts, and write `_manifest.json` and `_SUCCESS`.

    Parts of earlier runs, and those with errors, are read for that; the others are in the tally.
    """
    try:
        check_owner(output)
    except SpecError as error:
        raise JobError(f"Another job took this output meanwhile. {error}") from error
    planned = [chunk.chunk_id for chunk in plan.chunks]
    committed = committed_chunks(output)
    if missing := set(planned) - committed:
        raise JobError(f"{len(missing)} of {len(planned)} chunks are not committed; run the job again to finish them.")
    refuse_others(output, set(plan.unplanned(committed)) - set(stale))
    for report in read_reports(output, (one for one in planned if one not in tally.counted)):
        tally.add(report)
    manifest = tally.manifest
    manifest.num_chunks = len(planned)
    bad = [chunk_id for chunk_id in planned if chunk_id in tally.bad]
    manifest.errors_by_type, manifest.damaged_shards = count_errors(output, bad)
    manifest.stale_parts = stale
    check_error_rate(manifest.num_rows, manifest.num_errors, output.job.limits.max_error_rate, None)
    match_prompts(output, plan, manifest)
    finish_output(output, manifest.to_json())
    return manifest


def set_up_data() -> None:
    """Ray Data without bars, chatter and impatience, and with a block for each chunk that a read task gives."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails the job is raised, and told once
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # bytes: no two rows share a block, for a chunk need not wait for the next
    context.execution_no_progress_timeout_s = -1  # waiting for GPUs to arrive is no failure
    context.raise_original_map_exception = True  # Ray's own wrapper loses ours on its way from an actor
