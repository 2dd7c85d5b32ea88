"""What the chunks of a run came to: counted as they come, and judged, so that a job that fails stops early."""

from collections.abc import Callable, Iterator

from pipeline.errors import ErrorRateError, JobError
from pipeline.records import ChunkReport, CommittedChunk, FailedShard, Tally

Outcome = ChunkReport | FailedShard | CommittedChunk
"""Of a chunk, or of a pass over a shard."""
MIN_ROWS_FOR_ERROR_RATE = 100
MAX_TOLD = 20


def count_in(outcomes: Iterator[Outcome], tally: Tally) -> Iterator[Outcome]:
    """The same outcomes, counted: parts without errors, for what nobody will replace needs no second look."""
    for outcome in outcomes:
        if isinstance(outcome, ChunkReport) and not outcome.num_errors:
            tally.add(outcome)
        yield outcome


def watch_errors(
    outcomes: Iterator[Outcome],
    retried: frozenset[str],
    max_error_rate: float,
    on_commit: Callable[[ChunkReport], None],
) -> list[FailedShard]:
    """Drain the flow, and stop it as soon as too many rows have failed; gives the shards that could not be read.

    Chunks with errors that are done again say nothing about the whole job; `finish` judges them with all others.
    """
    num_rows = num_errors = 0
    failed: dict[str, FailedShard] = {}
    for report in outcomes:
        if isinstance(report, CommittedChunk):
            continue
        if isinstance(report, FailedShard):
            failed[report.shard] = report
            continue
        on_commit(report)
        if report.chunk_id in retried:
            continue
        num_rows += report.num_rows
        num_errors += report.num_errors
        if num_rows >= MIN_ROWS_FOR_ERROR_RATE:
            check_error_rate(num_rows, num_errors, max_error_rate, report.first_error)
    return list(failed.values())


def check_shards(failed: list[FailedShard]) -> None:
    """Raise JobError if a shard was gone, or another than planned, when it was to be read."""
    if failed:
        told = "\n".join(f"  {shard.message}" for shard in failed[:MAX_TOLD])
        more = f"\n  and {len(failed) - MAX_TOLD} more" if len(failed) > MAX_TOLD else ""
        raise JobError(
            f"{len(failed)} shards could not be read; all others are done and committed. "
            f"Run the job again to plan it anew.\n{told}{more}"
        )


def check_error_rate(num_rows: int, num_errors: int, max_error_rate: float, example: str | None) -> None:
    """Raise ErrorRateError, once there are rows enough to judge by, or when none at all was answered."""
    judged = num_rows >= MIN_ROWS_FOR_ERROR_RATE or num_errors == num_rows
    if judged and num_errors > max_error_rate * num_rows:
        raise ErrorRateError(
            f"{num_errors} of {num_rows} rows failed, more than limits.max_error_rate = {max_error_rate:g} allows"
            + (f"; one of them: {example}" if example else ".")
            + " Committed rows stay. Raise the limit, or mend the input and run with --retry-errors."
        )
