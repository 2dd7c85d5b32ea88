"""A job's part in the fair shares of its cluster: what it reports to them, and what it hears.

The shares (`pipeline.shares`) are one Ray actor of the cluster. It belongs to the job that made it and goes with it;
then another job makes the next, which knows all within a few reports. One that hangs is ended for that.
"""

import asyncio
import contextlib
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.shares import Shares

CPUS_PER_ENGINE = 0.25
"""Reserved beside its GPUs. Of a cluster's CPUs Ray Data allots to engines about a third, and grows no pool beyond."""
ANSWER_S = 10.0
MAX_SILENCES = 3
"""Reports in a row without an answer, after which the shares are ended."""


@dataclass(frozen=True)
class Pool:
    """What has to be known of a job's engines to share GPUs with other jobs."""

    gpus_per_engine: float
    min_engines: int
    """For as many Ray Data asks until it has them; for more only where Ray Data thinks that there is room."""


class Sharing:
    """One job's line to the shares. Silence of theirs holds up nothing."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._shares: Any = None
        self._num_silences = 0

    async def report(self, gpus: float, gpus_per_engine: float, waits: bool, yield_after_s: float | None) -> bool:
        """As `Shares.report`; False where nobody answers. One at a time."""
        try:
            self._shares = self._shares or find_shares()
            answer = await self._ask("report", gpus, gpus_per_engine, waits, yield_after_s)
        except TimeoutError:
            self._num_silences += 1
            if self._num_silences >= MAX_SILENCES:
                ray.kill(self._shares)
                self._forget()
            return False
        except (RayError, ValueError):  # the job that they belonged to has ended
            self._forget()
            return False
        self._num_silences = 0
        return answer

    async def owes(self) -> bool:
        """As `Shares.owes`; False before the first report, and where nobody answers."""
        if self._shares is not None:
            with contextlib.suppress(RayError, TimeoutError):
                return await self._ask("owes")
        return False

    async def _ask(self, what: str, *said: Any) -> bool:
        async with asyncio.timeout(ANSWER_S):
            answer: bool = await getattr(self._shares, what).remote(self._job, *said)
        return answer

    def _forget(self) -> None:
        self._shares, self._num_silences = None, 0


def find_shares() -> Any:
    """The cluster's, made if there are none."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options: dict[str, Any] = {"name": "shares", "namespace": "r4b", "get_if_exists": True}
    options |= {"num_cpus": 0, "scheduling_strategy": here}
    return ray.remote(Shares).options(**options).remote()


def has_room(gpus: float, draining: Set[str]) -> bool:
    """Whether a node that stays has the GPUs free, and CPU beside them, as the cluster knows it now. Blocks."""
    free = ray._private.state.available_resources_per_node()
    return any(
        node.get("GPU", 0) >= gpus and node.get("CPU", 0) >= CPUS_PER_ENGINE
        for key, node in free.items()
        if key not in draining
    )
