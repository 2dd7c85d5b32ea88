"""Which rows of batch jobs a replica takes beside people's requests.

vLLM's priorities order only what waits: a row that runs keeps its place until it is done, and makes each step of all
others longer. Rows cannot be taken back, so care is taken in letting them in. While people are being answered few rows
run. When the last request is over their number doubles every few seconds, for people who paused come again soonest;
and a share of the engine's places is never theirs, so that whoever comes then need not wait for a row to end.
What is left: a request that comes after a quiet time shares the engine with all rows that run then, until they end.
Not covered: memory for keys and values, for which vLLM makes rows give way to people by itself; requests with n > 1,
which count once; fairness between jobs.
"""

import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from deployments.settings import ServeSettings
from pipeline.errors import BusyError

DOUBLING_S = 5.0
"""Of quiet, for twice as many rows."""
RESERVED_SHARE = 8
"""One place in so many is kept for people."""
MAX_DOUBLINGS = 20.0


class BatchRows:
    """Counts rows and requests of one replica; lives in one event loop."""

    def __init__(self, settings: ServeSettings, clock: Callable[[], float] = time.monotonic) -> None:
        num_places = settings.engine.max_num_seqs
        self.max_rows = max(1, num_places - math.ceil(num_places / RESERVED_SHARE))
        self.max_rows_beside = min(settings.scaling.batch_rows_beside_requests, self.max_rows)
        self.rows = 0
        self.requests = 0
        self._clock = clock
        self._last_request_at: float | None = None

    @property
    def limit(self) -> int:
        """Rows that may run now."""
        if self.requests:
            return self.max_rows_beside
        if self._last_request_at is None:
            return self.max_rows
        doublings = min((self._clock() - self._last_request_at) / DOUBLING_S, MAX_DOUBLINGS)
        return min(self.max_rows, int(self.max_rows_beside * 2**doublings))

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[None]:
        """Hold a row's place; raises BusyError at once when there is none."""
        if self.rows >= self.limit:
            raise BusyError("The replica has as many rows as it takes beside its requests.")
        self.rows += 1
        try:
            yield
        finally:
            self.rows -= 1

    def enter(self) -> None:
        """An interactive request has come."""
        self.requests += 1

    def leave(self) -> None:
        """It has been answered, or given up."""
        self.requests -= 1
        self._last_request_at = self._clock()
