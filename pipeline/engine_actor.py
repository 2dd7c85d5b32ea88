"""The GPU actor of a job: one engine, which the chunks it is given share, and how it ends.

An engine that died never recovers in its process, so the process exits: Ray restarts the actor and gives it its chunks
again. Chunks that were in engines that died are tried alone (`pipeline.suspects`).
Not covered: which actor gets which chunk, which is Ray Data's.
"""

import asyncio
import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

import aiorwlock
import psutil
import pyarrow as pa
from ray.exceptions import RayError

from pipeline.engine import open_engine
from pipeline.engine.contract import task_to_request
from pipeline.errors import EngineDiedError, JobError, SampleError
from pipeline.lives import ASK_S, BEATS_IN_A_TIMEOUT, Beats, Life, kill_children
from pipeline.records import GeneratedChunk, ReadChunk, Task
from pipeline.spec import JobSpec
from pipeline.suspects import Result, Trial
from pipeline.transport import from_batch, to_batch

T = TypeVar("T")

START_AGAIN_S = 60.0
TELL_S = 10.0
"""At most, between two signs of life: the answer may be that the node drains."""
DELIVERY_S = 1.0
"""For what was answered to reach Ray before the process ends."""


class EngineActor:
    """One engine. Its chunks run concurrently, so that one long thought does not idle the engine.

    With `engine.pool: serve` the engine is a deployment elsewhere, and the actor needs no GPU.
    """

    def __init__(self, job: JobSpec, made_with: dict[str, str], watch: Any) -> None:
        self.job = job
        self.made_with = made_with
        self.watch = watch
        self.life = Life.here()
        self.placed = watch.place.remote(self.life)
        self.beats = Beats(watch, self.life, job.limits)  # a model that loads holds up the event loop
        self.engine: Any = None
        self.ready_at = 0.0
        self.starting = asyncio.Lock()
        # Images wait as the bytes that were read until the engine is near: rendering makes copies of each.
        self.slots = asyncio.Semaphore(2 * job.engine.max_num_seqs)
        self.turns: Any = None
        self.num_begun = 0
        self.has_answered = False
        self.loops: list[asyncio.Task[None]] = []
        self.patience_s = ASK_S
        self.leaving = threading.Event()
        self.deadline = math.inf
        self.never = asyncio.Event()  # what waits for one that nobody holds is collected, and Ray told an answer
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)

    async def __call__(self, batch: pa.Table) -> pa.Table:
        chunk = from_batch(batch)
        if not isinstance(chunk, ReadChunk):
            return batch
        async with self.starting:  # here, not in the constructor: the engine lives in this event loop
            if self.engine is None:
                await self._start()
        if self.leaving.is_set():
            await self.never.wait()  # handed back: the process ends before this does
        self.num_begun += 1
        try:
            results = await self._answer_chunk(chunk)
        except EngineDiedError as error:
            await self._die(str(error))
        finally:
            self.num_begun -= 1
        tasks = tuple(replace(task, images=()) for task in chunk.tasks)
        return to_batch(GeneratedChunk(chunk.work, tasks, tuple(results), chunk.kept, chunk.counts, self.ready_at))

    async def _start(self) -> None:
        """Start the engine; raises JobError if there is no use in that, or if the very first engine does not start."""
        if (reason := await self._ask(self.watch.enter.remote(self.life))) is not None:
            raise JobError(reason)
        await self._ask(self.placed)
        if await self._ask(self.watch.beat.remote(self.life)) is not None:
            await self._ask(self.watch.depart.remote(self.life))
            self._leave(0)
            await self.never.wait()
        try:
            engine = await open_engine(self.job.engine, self.made_with)
        except JobError as error:
            if await self._ask(self.watch.may_fail_to_start.remote()) is not False:
                await asyncio.sleep(START_AGAIN_S)  # its place stays taken meanwhile, for others are better
                await self._die(f"it did not start: {error}")
            raise
        await self._ask(self.watch.ready.remote(self.life))
        self.ready_at = time.time()
        self.turns = aiorwlock.RWLock()
        self.engine = engine
        self.beats.stop()
        self.loops = [asyncio.ensure_future(loop) for loop in (self._tell(), self._check())]

    async def _answer_chunk(self, chunk: ReadChunk) -> Sequence[Result]:
        """A result for each task, in order."""
        if self.job.engine.pool == "serve":  # whose replicas watch over themselves
            return await asyncio.gather(*(self._answer(task) for task in chunk.tasks))
        work = chunk.work.chunk
        name = f"{work.shard} {work.start} to {work.stop}"
        rows = [row for row, task in enumerate(chunk.tasks) if task.error is None]
        async with self.turns.reader_lock:
            trial = await self._ask(self.watch.begin.remote(self.life, work.chunk_id, name, rows))
            if trial is None:
                results: Sequence[Result] = await asyncio.gather(*(self._answer(task) for task in chunk.tasks))
        if trial is not None:
            async with self.turns.writer_lock:
                results = await self._try(chunk, name, trial)
        self.watch.end.remote(self.life, work.chunk_id)
        return results

    async def _try(self, chunk: ReadChunk, name: str, trial: Trial) -> Sequence[Result]:
        """A suspect's rows, group by group; the engine has nothing else to do."""
        chunk_id = chunk.work.chunk.chunk_id
        results = {row: task.error for row, task in enumerate(chunk.tasks) if task.error is not None} | trial.results
        for rows in trial.groups:
            if trial.control is not None and not self.has_answered:
                await self._ask(self.watch.try_rows.remote(self.life, chunk_id, name, ()))
                await self._answer(chunk.tasks[trial.control])
                await self._ask(self.watch.keep.remote(self.life, chunk_id, {}))
            await self._ask(self.watch.try_rows.remote(self.life, chunk_id, name, rows))
            answered = await asyncio.gather(*(self._answer(chunk.tasks[row]) for row in rows))
            results |= zip(rows, answered, strict=True)
            await self._ask(self.watch.keep.remote(self.life, chunk_id, dict(zip(rows, answered, strict=True))))
        return [results[row] for row in range(len(chunk.tasks))]

    async def _answer(self, task: Task) -> Result:
        """One row's generation, or what is wrong with it."""
        if task.error is not None:
            return task.error
        try:
            async with self.slots:
                generation: Result = await self.engine.generate(task_to_request(task, self.job.sampling))
            self.has_answered = True
            return generation
        except SampleError as error:
            return error

    async def _ask(self, answer: Awaitable[T]) -> T | None:
        """The watch's answer; None if it has none to give. One that gave none has less time for the next."""
        try:
            async with asyncio.timeout(self.patience_s):
                given = await answer
        except (TimeoutError, RayError):
            self.patience_s = DELIVERY_S
            return None
        self.patience_s = ASK_S
        return given

    async def _tell(self) -> None:
        """Let the watch know that this process, and its event loop, live."""
        while True:
            grace_s = await self._ask(self.watch.beat.remote(self.life, is_engine=True))
            if grace_s is not None:
                self._leave(grace_s)
            await asyncio.sleep(min(TELL_S, self.job.limits.stall_timeout_s / BEATS_IN_A_TIMEOUT))

    async def _check(self) -> None:
        """End the process when its engine goes on no more."""
        timeout_s = self.job.limits.stall_timeout_s
        while True:
            await asyncio.sleep(timeout_s / BEATS_IN_A_TIMEOUT)
            try:
                async with asyncio.timeout(timeout_s):
                    await self.engine.check()
            except TimeoutError:
                await self._die(f"it said nothing for {timeout_s:g} s")
            except Exception as error:  # vLLM has plain ones, too, for what failed in the engine's processes
                await self._die(str(error))

    async def _die(self, cause: str) -> NoReturn:
        """End the process; Ray starts another one and does again what this one held."""
        gone = (
            self.watch.depart.remote(self.life) if self.leaving.is_set() else self.watch.died.remote(self.life, cause)
        )
        await self._ask(gone)
        self._exit()

    def _exit(self) -> NoReturn:
        with contextlib.suppress(psutil.NoSuchProcess):
            kill_children(psutil.Process())
        os._exit(1)

    def _on_sigterm(self, number: int, frame: Any) -> None:
        """Whoever ends this process, and not its node, gives notice: finish what was begun, if it takes no longer than
        `limits.preemption_grace_s`, and hand the rest back. Of a node that drains the watch tells.
        """
        self._leave(self.job.limits.preemption_grace_s)

    def _leave(self, grace_s: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + grace_s)  # the node of one that yields may drain
        if not self.leaving.is_set():
            self.leaving.set()
            threading.Thread(target=self._depart, name="depart", daemon=True).start()

    def _depart(self) -> None:
        self.watch.depart.remote(self.life)
        if self.num_begun:
            while self.num_begun and time.monotonic() < self.deadline:
                time.sleep(0.1)
            time.sleep(DELIVERY_S)
        self._exit()
