"""How many calls a sender keeps at a deployment: found by trying, as TCP finds how much a network takes.

An answer widens the window, a refusal narrows it below what is under way. A call that was refused goes again when the
answer to another shows that there may be room; where there is no other, after a pause that doubles, with full jitter.
So a deployment that is busy is asked about once for each answer it gives, by a single call if it gives none, however
many wait; and several senders share it without knowing of each other.
Not covered: what a call is, and when to give it up.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import tenacity

from pipeline.errors import JobError

T = TypeVar("T")

FIRST_SIZE = 16
KEPT = 0.8
"""Of what is under way when a call is refused. Half, as in TCP, would leave engines idle that are merely shared."""
MAX_PAUSE_S = 8.0


class NotNowError(JobError):
    """The call was not answered, and may be if it is made again."""


class Window:
    """For calls of one event loop, at most `most` at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.size = float(min(most, FIRST_SIZE))
        self.num_inside = self.num_waiting = 0
        self._step = self.size
        self._room = asyncio.Condition()

    async def send(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call, again as long as it raises NotNowError."""
        pausing = tenacity.AsyncRetrying(
            sleep=asyncio.sleep,
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, NotNowError) and self.num_inside == 1),
            wait=tenacity.wait_random_exponential(max=MAX_PAUSE_S),
        )
        while True:
            async with self._place():
                try:
                    return await pausing(self._count, call)
                except NotNowError:
                    continue  # others are under way

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        async with self._room:
            self.num_waiting += 1
            try:
                await self._room.wait_for(lambda: self.num_inside < int(self.size))
            finally:
                self.num_waiting -= 1
            self.num_inside += 1
        try:
            yield
        finally:
            self.num_inside -= 1
            async with self._room:
                self._room.notify(max(0, int(self.size) - self.num_inside))

    async def _count(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            answer = await call()
        except NotNowError:
            self.size = max(1.0, KEPT * (self.num_inside - 1))
            self._step = 1.0
            raise
        if self.num_waiting:  # else nobody has tried a window as large as this
            self._widen()
        return answer

    def _widen(self) -> None:
        """A step for each window of answers; steps double, to fill a deployment soon whose people have left."""
        share = 1 / self.size
        self.size = min(self.most, self.size + self._step * share)
        self._step = min(self.most, self._step * 2**share)
