"""Fair shares: of jobs that run on one cluster at the same time, the one with most GPUs lets engines go to the others.

Ray gives a free GPU to whoever asked first, and takes none away: a job that began alone keeps all of them to its end.
So every job's watch (`pipeline.watch`) reports here, to one Ray actor of the cluster, how many GPUs its engines have,
and whether they are fewer than `engine.replicas.min`. The actor belongs to the watch that made it and goes with it;
then another makes the next.
Not covered: which engine goes, and its chunks, which are the watch's and the engine actor's.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

REPORT_S = 10.0
FORGOTTEN_S = 4 * REPORT_S
"""After which a job that reports no more has ended."""
GIVE_WAY_S = 60.0
"""For which a GPU that was let go is kept free for the job that waits."""


@dataclass
class _Job:
    gpus: float
    gpus_per_engine: float
    wanting_since: float | None
    heard_at: float


@dataclass(frozen=True)
class _Debt:
    """A GPU that one job let go for another, which had so many then."""

    receiver: str
    gpus: float
    since: float


class Shares:
    """The actor's class. Times are its own clock's."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._jobs: dict[str, _Job] = {}
        self._debts: dict[str, _Debt] = {}

    def report(
        self, job: str, gpus: float, gpus_per_engine: float, is_wanting: bool, yield_after_s: float | None
    ) -> bool:
        """Tell what a job has; True: it should let one engine go.

        It should if another has wanted one for `yield_after_s` that fits into this one's place, and has still no more
        GPUs than this one after the change.
        """
        now = self._clock()
        self._jobs = {name: one for name, one in self._jobs.items() if now - one.heard_at < FORGOTTEN_S}
        before = self._jobs.get(job)
        since = before.wanting_since if before and before.wanting_since is not None else now
        mine = self._jobs[job] = _Job(gpus, gpus_per_engine, since if is_wanting else None, now)
        if yield_after_s is None:
            return False
        for name, other in self._jobs.items():
            has_waited = other.wanting_since is not None and now - other.wanting_since >= yield_after_s
            if name != job and has_waited and self._is_fairer(mine, other):
                other.wanting_since = now
                self._debts[job] = _Debt(name, other.gpus, now)
                return True
        return False

    def owes(self, job: str) -> bool:
        """Whether the GPU that a job let go last has not been taken by the one for which it did."""
        debt = self._debts.get(job)
        if debt is None:
            return False
        now, receiver = self._clock(), self._jobs.get(debt.receiver)
        is_waiting = receiver is not None and receiver.wanting_since is not None and receiver.gpus <= debt.gpus
        if is_waiting and now - debt.since < GIVE_WAY_S:
            return True
        del self._debts[job]
        return False

    def _is_fairer(self, mine: _Job, other: _Job) -> bool:
        fits = other.gpus_per_engine <= mine.gpus_per_engine
        return fits and mine.gpus - mine.gpus_per_engine >= other.gpus + other.gpus_per_engine


def find_shares() -> Any:
    """The cluster's, made if there is none."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options: dict[str, Any] = {"name": "shares", "namespace": "r4b", "get_if_exists": True}
    options |= {"num_cpus": 0, "scheduling_strategy": here}
    return ray.remote(Shares).options(**options).remote()
