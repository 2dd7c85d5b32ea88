"""Engines of a job that died, as its watch counts them: when there are too many, the job ends with the last of them."""

from collections import Counter, deque
from collections.abc import Sequence

from pipeline.spec import LimitsSpec

MAX_UNSTARTED = 5
"""Engines of a job that died before any of its engines had started."""
MAX_DEATHS_IN_A_ROW = 12
"""Of one actor's engines, none of which answered anything."""
MAX_TOLD = 3


class Deaths:
    """The count. An `owner` is an actor, which has one engine after another."""

    def __init__(self, limits: LimitsSpec) -> None:
        self._limits = limits
        self._told: deque[str] = deque(maxlen=MAX_TOLD)
        self._in_a_row: Counter[str] = Counter()
        self._num_unstarted = 0
        self.num = 0
        self.any_started = False
        """Whether an engine of this job has ever started."""

    def add(self, owner: str, cause: str, chunks: Sequence[str]) -> None:
        """One died, with these chunks in it."""
        self.num += 1
        self._num_unstarted += not self.any_started
        if chunks:  # an engine that does not start is its machine's fault, and others may
            self._in_a_row[owner] += 1
        self._told.append(f"{cause}; in it: {', '.join(chunks[:MAX_TOLD]) or 'nothing'}")

    def answered(self, owner: str) -> None:
        """An actor's engine has answered something."""
        self._in_a_row.pop(owner, None)

    def verdict(self, owner: str) -> str | None:
        """The reason why this actor's job cannot go on, or None."""
        told = "\n".join(f"  {death}" for death in self._told)
        if self._in_a_row[owner] >= MAX_DEATHS_IN_A_ROW:
            return f"{MAX_DEATHS_IN_A_ROW} engines of one actor died in a row, without an answer. The last:\n{told}"
        if not self.any_started and self._num_unstarted >= MAX_UNSTARTED:
            return f"{self._num_unstarted} engines died as they started, and none has started. The last:\n{told}"
        if self.num > self._limits.max_engine_restarts:
            return (
                f"{self.num} engines died, more than limits.max_engine_restarts = "
                f"{self._limits.max_engine_restarts} allows. The last:\n{told}"
            )
        return None
