"""Watches over a job's processes: a Ray actor beside the driver, to which engines, readers and writers make reports.

It knows which chunks are in which engine, so that it can tell which were there when one died (`pipeline.suspects`), and
which process has fallen silent, which it has killed, so that Ray does the work again elsewhere. It holds no rows but
the answers of a suspect's. If it is lost, the job goes on: a guilty row then costs more engines.
Not covered: engines that answer nothing although their process lives; their actor asks them (`pipeline.engine_actor`).
"""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.deaths import Deaths
from pipeline.lives import BEATS_IN_A_TIMEOUT, Life, find_draining, is_node_alive, kill_there
from pipeline.records import Losses
from pipeline.shares import REPORT_S
from pipeline.sharing import Pool, Sharing, has_room
from pipeline.spec import LimitsSpec
from pipeline.suspects import Result, Rows, Suspects, Trial

BEATS_MISSED = 3
"""After which a process is no longer counted as one that holds GPUs."""
LOOK_S = 5.0
"""Between two looks for nodes that drain: Google Cloud gives notice of 25 s."""
COUNT_S = 10.0


@dataclass
class _Present:
    """What is known of a process that lives."""

    heard_at: float
    placed_at: float | None = None
    """If it holds GPUs; its engine starts with its first chunk."""
    entered_at: float = 0.0
    is_engine: bool = False
    is_ready: bool = False
    is_leaving: bool = False
    must_yield: bool = False
    replacing: Any = None
    """The task that has it killed, held here so that it is not collected."""
    chunks: dict[str, tuple[str, Rows | None]] = field(default_factory=dict)
    """Chunks in its engine: a name for people, and the rows on trial."""


class Watch:
    """The actor's class; `start_watch` makes the actor. Times are its own clock's."""

    def __init__(self, limits: LimitsSpec, pool: Pool | None = None) -> None:
        self._limits = limits
        self._pool = pool
        self._sharing: Sharing | None = None
        self._present: dict[Life, _Present] = {}
        self._over: dict[str, Life] = {}
        """The last life of each actor that has ended; what it may still say counts no more."""
        self._suspects = Suspects()
        self._deaths = Deaths(limits)
        self._num_lost = self._num_begun = 0
        self._draining: frozenset[str] = frozenset()
        self._readings: dict[str, Life] = {}
        """Passes under way, by their names, and who makes them."""
        self._read_deaths: Counter[str] = Counter()
        self._loops: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Begin to watch, before anybody has said a word; after a restart the first word does it."""
        self._begin()

    async def place(self, life: Life) -> None:
        """An actor has got GPUs; they may be those that were let go for a job that still waits."""
        present = self._hear(life)
        present.placed_at = time.monotonic()
        present.must_yield = self._sharing is not None and await self._sharing.owes()

    async def enter(self, life: Life) -> str | None:
        """A new life of an actor, before its engine starts; gives the reason why the job cannot go on, or None."""
        present = self._hear(life)
        present.is_engine, present.entered_at = True, time.monotonic()
        for earlier in [one for one in self._present if one.owner == life.owner and one != life]:
            before = self._present[earlier]
            if not await asyncio.to_thread(is_node_alive, earlier.node_id):
                self._num_lost += not before.is_leaving
            elif before.chunks or not before.is_ready:  # else the pool had let it go
                self._charge(earlier, "its process ended")
            self._end(earlier)
        return self._deaths.verdict(life.owner)

    async def ready(self, life: Life) -> None:
        """Its engine has started."""
        self._hear(life).is_ready = self._deaths.any_started = True

    async def may_fail_to_start(self) -> bool:
        """Whether an engine of this job has started before: then one that does not is its machine's fault."""
        return self._deaths.any_started

    async def begin(self, life: Life, chunk_id: str, name: str, rows: Sequence[int]) -> Trial | None:
        """A chunk goes into the engine beside others, unless it is a suspect: then it does not, and gets a trial."""
        present = self._hear(life)
        self._num_begun += 1
        trial = self._suspects.trial(chunk_id, rows)
        if trial is None:
            present.chunks[chunk_id] = (name, None)
        return trial

    async def try_rows(self, life: Life, chunk_id: str, name: str, rows: Rows) -> None:
        """These rows of a suspect go into the engine, and nothing else is in it."""
        self._hear(life).chunks[chunk_id] = (name, rows)

    async def keep(self, life: Life, chunk_id: str, results: dict[int, Result]) -> None:
        """They are answered."""
        self._hear(life).chunks.pop(chunk_id, None)
        self._deaths.answered(life.owner)
        self._suspects.keep(chunk_id, results)

    async def end(self, life: Life, chunk_id: str) -> None:
        """All rows of a chunk are answered."""
        self._hear(life).chunks.pop(chunk_id, None)
        self._deaths.answered(life.owner)
        self._suspects.done(chunk_id)

    async def beat(self, life: Life, is_engine: bool = False) -> float | None:
        """The process lives. If an engine should leave: the seconds that it has for what it has begun.

        It should if its node drains, and if another job waits for its GPUs, which then has patience.
        """
        present = self._hear(life)
        if is_engine and present.placed_at is None:  # this watch is a new one
            present.placed_at, present.is_engine, present.is_ready = time.monotonic(), True, True
            self._deaths.any_started = True
        if life.node_id in self._draining:
            return self._limits.preemption_grace_s
        return math.inf if present.must_yield else None

    async def read(self, life: Life, name: str) -> int:
        """A pass over a shard begins; how many processes have ended in it, other than with their node."""
        before = self._readings.get(name)
        if before is not None and before != life and await asyncio.to_thread(is_node_alive, before.node_id):
            self._read_deaths[name] += 1
        self._readings[name] = life
        return self._read_deaths[name]

    async def has_read(self, life: Life, name: str) -> None:
        """It has come to its end."""
        if self._readings.get(name) == life:
            del self._readings[name]

    async def depart(self, life: Life) -> None:
        """An actor is about to end: it is still watched, but what it holds is no suspect for its end."""
        self._hear(life).is_leaving = True

    async def died(self, life: Life, cause: str) -> None:
        """Its engine died, and the process ends with it."""
        self._charge(life, cause)
        self._end(life)

    async def count(self) -> tuple[int, int, int]:
        """Engines that died so far, engines that went with their node, and how often a chunk was begun."""
        return self._deaths.num, self._num_lost, self._num_begun

    def _begin(self) -> None:
        if not self._loops:
            self._loops = [asyncio.ensure_future(loop) for loop in (self._reap(), self._share(), self._look())]

    def _hear(self, life: Life) -> _Present:
        self._begin()
        present = _Present(0) if self._over.get(life.owner) == life else self._present.setdefault(life, _Present(0))
        present.heard_at = time.monotonic()
        return present

    def _end(self, life: Life) -> None:
        present = self._present.pop(life, None)
        if present is not None and present.is_engine:
            self._over[life.owner] = life

    def _charge(self, life: Life, cause: str) -> None:
        present = self._present.get(life)
        if present is None or present.is_leaving:
            return
        for chunk_id, (_, rows) in present.chunks.items():
            self._suspects.charge(chunk_id, rows)
        self._deaths.add(life.owner, cause, [name for name, _ in present.chunks.values()])

    async def _reap(self) -> None:
        """Have every process killed that has been silent, or has been starting, for too long."""
        pause_s = self._limits.stall_timeout_s / BEATS_IN_A_TIMEOUT
        last = time.monotonic()
        while True:
            await asyncio.sleep(pause_s)
            before, last = last, time.monotonic()
            if last - before > 2 * pause_s:  # it was this process that was held up, and others' words wait
                for present in self._present.values():
                    present.heard_at = max(present.heard_at, last)
                continue
            for life, present in list(self._present.items()):
                fault = None if present.replacing else self._find_fault(present, last)
                if fault is not None:
                    present.replacing = asyncio.ensure_future(self._replace(life, present, fault))

    def _find_fault(self, present: _Present, now: float) -> str | None:
        limits = self._limits
        if now - present.heard_at > limits.stall_timeout_s:
            return f"its process was silent for {limits.stall_timeout_s:g} s"
        if present.is_engine and not present.is_ready and now - present.entered_at > limits.start_timeout_s:
            return f"it had not started after {limits.start_timeout_s:g} s"
        return None

    async def _look(self) -> None:
        """Keep up with the nodes that drain."""
        while True:
            with contextlib.suppress(Exception):  # Ray's own kinds, and plain ones: the GCS is slow, or not there
                self._draining = await asyncio.to_thread(find_draining)
            await asyncio.sleep(LOOK_S)

    async def _share(self) -> None:
        """Report what engines there are, and let one go to another job when that is fair."""
        if self._pool is None or not self._pool.gpus_per_engine:
            return
        self._sharing = Sharing(ray.get_runtime_context().get_job_id())
        while True:
            await asyncio.sleep(REPORT_S)
            try:
                wants = await self._wants(self._pool)
            except Exception:  # as of `_look`: the GCS is slow, or not there
                continue
            yields = await self._sharing.report(*wants, self._limits.yield_after_s)
            if yields and (engines := [one for one in self._staying() if one.is_engine]):
                engines[-1].must_yield = True  # the last to come

    def _staying(self) -> list[_Present]:
        """What holds GPUs and keeps them, in the order of its coming: each actor's last life, if it gives signs."""
        since = time.monotonic() - self._limits.stall_timeout_s * BEATS_MISSED / BEATS_IN_A_TIMEOUT
        last: dict[str, _Present] = {}
        for life, one in self._present.items():
            if one.placed_at is not None and one.heard_at > since:
                last[life.owner] = one
        staying = [one for one in last.values() if not (one.is_leaving or one.must_yield)]
        return sorted(staying, key=lambda one: one.placed_at or 0.0)

    async def _wants(self, pool: Pool) -> tuple[float, float, bool]:
        """GPUs that it has, GPUs of an engine, and whether it waits for another engine, for which none are free."""
        num_engines = len(self._staying())
        waits = num_engines < pool.min_engines and not await asyncio.to_thread(
            has_room, pool.gpus_per_engine, self._draining
        )
        return num_engines * pool.gpus_per_engine, pool.gpus_per_engine, waits

    async def _replace(self, life: Life, present: _Present, fault: str) -> None:
        """Have a process killed; one that had ended by itself is blamed for what was in it."""
        try:
            was_there = await kill_there(life)
        except RayError:
            if await asyncio.to_thread(is_node_alive, life.node_id):
                present.heard_at, present.replacing = time.monotonic(), None  # tried again
                return
            self._num_lost += present.is_engine
            self._end(life)
            return
        if present.is_engine and (was_there or present.chunks):
            self._charge(life, fault)
        self._end(life)


def start_watch(limits: LimitsSpec, pool: Pool) -> Any:
    """The actor, on the driver's node: it is lost only with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    watch = ray.remote(**options)(Watch).remote(limits, pool)
    watch.open.remote()
    return watch


def count_losses(watch: Any, num_chunks: int | None) -> Losses:
    """What a run that has made `num_chunks` parts did more than once; None: it stopped, and some are under way.

    Nothing is known if the watch was lost.
    """
    try:
        died, lost, begun = ray.get(watch.count.remote(), timeout=COUNT_S)
    except RayError:
        return Losses(0, 0, 0)
    return Losses(died + lost, lost, 0 if num_chunks is None else max(0, begun - num_chunks))


def end_watch(watch: Any) -> None:
    """End it with its run: it would go on to judge processes that now work for another. Hides no error of the run's."""
    with contextlib.suppress(RayError):
        ray.kill(watch)
