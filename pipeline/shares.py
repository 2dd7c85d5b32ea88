"""Fair shares: of jobs that run on one cluster at the same time, the one with most GPUs lets engines go to the others.

Ray gives a free GPU to whoever asked first, and takes none away: a job that began alone keeps all of them to its end.
So every job's watch reports here, to one Ray actor of the cluster (`pipeline.sharing`), how many GPUs its engines have,
and whether they are fewer than `engine.replicas.min`.
Not covered: which engine goes, and its chunks, which are the watch's and the engine actor's.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

REPORT_S = 10.0
FORGOTTEN_S = 4 * REPORT_S
"""After which a job that reports no more has ended."""
GIVE_WAY_S = 60.0
"""For which a GPU that was let go is kept free for the job that waits."""
LEAVE_S = 3600.0
"""For an engine that was told to leave to finish what it has begun."""
ROUNDING = 1e-6


@dataclass
class _Job:
    gpus: float
    gpus_per_engine: float
    wanting_since: float | None
    yield_after_s: float | None
    heard_at: float
    has_no_use: bool = False
    """A GPU was kept free for it, and it did not come for it."""


@dataclass
class _Debt:
    """A GPU that `giver` lets go for a job, which had so many when that was decided."""

    giver: str
    gpus: float
    since: float
    free_since: float | None = None


class Shares:
    """The actor's class. Times are its own clock's."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._jobs: dict[str, _Job] = {}
        self._debts: dict[str, _Debt] = {}
        """By who is to get the GPU: one at a time."""

    def report(
        self, job: str, gpus: float, gpus_per_engine: float, is_wanting: bool, yield_after_s: float | None
    ) -> bool:
        """Tell what a job has; True: it should let one engine go.

        It should if it has most of all that may, and another has wanted an engine for `yield_after_s` that fits into
        its place and has still no more GPUs than this one after the change.
        """
        now = self._clock()
        before = self._jobs.get(job)
        mine = self._jobs[job] = _Job(gpus, gpus_per_engine, now if is_wanting else None, yield_after_s, now)
        if is_wanting and before is not None and before.wanting_since is not None:
            mine.wanting_since = before.wanting_since
            mine.has_no_use = before.has_no_use and before.gpus == gpus
        self._jobs = {name: one for name, one in self._jobs.items() if now - one.heard_at < FORGOTTEN_S}
        self._debts = {name: debt for name, debt in self._debts.items() if self._stands(name, debt, now)}
        for name, other in self._jobs.items():
            if name != job and name not in self._debts and self._should_give(mine, other, now):
                other.wanting_since = now
                self._debts[name] = _Debt(job, other.gpus, now)
                return True
        return False

    def owes(self, job: str) -> bool:
        """Whether a GPU that a job let go has not been taken by the one for which it did."""
        now = self._clock()
        debts = [(name, debt) for name, debt in self._debts.items() if debt.giver == job]
        for name, debt in debts:
            debt.free_since = debt.free_since or now
            if not self._stands(name, debt, now):
                del self._debts[name]
        return any(debt.giver == job for debt in self._debts.values())

    def _should_give(self, mine: _Job, other: _Job, now: float) -> bool:
        if mine.yield_after_s is None or other.wanting_since is None or other.has_no_use:
            return False
        rivals = (one for one in self._jobs.values() if one.yield_after_s is not None and _fits(one, other))
        has_waited = now - other.wanting_since >= mine.yield_after_s
        return has_waited and _fits(mine, other) and all(mine.gpus >= one.gpus - ROUNDING for one in rivals)

    def _stands(self, receiver: str, debt: _Debt, now: float) -> bool:
        """Whether the receiver still waits, and may still get it."""
        job = self._jobs.get(receiver)
        if job is None or job.wanting_since is None or job.gpus > debt.gpus or debt.giver not in self._jobs:
            return False
        if debt.free_since is not None and now - debt.free_since >= GIVE_WAY_S:
            job.has_no_use = True
            return False
        return now - debt.since < LEAVE_S


def _fits(giver: _Job, receiver: _Job) -> bool:
    """Whether an engine of the one has room for one of the other's, and would leave it with no fewer GPUs."""
    is_fair = giver.gpus - giver.gpus_per_engine >= receiver.gpus + receiver.gpus_per_engine - ROUNDING
    return is_fair and receiver.gpus_per_engine <= giver.gpus_per_engine
