"""Which rows kill engines: chunks that were in engines when these died are tried alone, then in ever fewer rows.

A chunk that was in two deaths is a suspect. It is tried as a whole with nothing beside it; if the engine dies again, in
groups of GROUP rows, one after another; a group that kills is tried row by row; and a row that was twice alone in an
engine that died is guilty. What the others have answered meanwhile is kept. So a guilty row costs at most
MAX_DEATHS_OF_A_ROW engines, however long its chunk. A group that killed is tried again after all others, and only in an
engine that has answered something. Only where none of its chunk's rows was ever answered is there no such test.
Plain bookkeeping: `pipeline.watch` asks it on behalf of all engines of a job.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pipeline.errors import SampleError
from pipeline.records import Generation

Rows = tuple[int, ...]
Result = Generation | SampleError

DEATHS_OF_A_SUSPECT = 2
DEATHS_ALONE = 2
"""Of one row."""
MAX_KEPT = 64
"""Suspects that are answered, whose answers are kept."""
GROUP = 16
"""Rows that are tried together; a whole chunk before that, and each of them alone after it."""
MAX_DEATHS_OF_A_ROW = DEATHS_OF_A_SUSPECT + 2 + DEATHS_ALONE


@dataclass(frozen=True)
class Trial:
    """What is left to find out about a suspect: groups of rows to be tried one after another, with nothing beside."""

    groups: tuple[Rows, ...]
    results: dict[int, Result]
    """Of the rows that are answered or guilty already."""
    control: int | None
    """A row that was answered: an engine that dies of this one is sick itself."""


@dataclass
class _Chunk:
    deaths: int = 0
    groups: list[Rows] = field(default_factory=list)
    results: dict[int, Result] = field(default_factory=dict)
    deaths_alone: dict[int, int] = field(default_factory=dict)


class Suspects:
    """The chunks that were in engines that died. Chunks of no death cost nothing here."""

    def __init__(self) -> None:
        self._chunks: dict[str, _Chunk] = {}
        self._done: list[str] = []

    def trial(self, chunk_id: str, rows: Sequence[int]) -> Trial | None:
        """How to go on with a chunk whose `rows` need an engine; None: as with any other."""
        chunk = self._chunks.get(chunk_id)
        if chunk is None or chunk.deaths < DEATHS_OF_A_SUSPECT:
            return None
        known = set(chunk.results).union(*chunk.groups)
        if new := tuple(row for row in rows if row not in known):  # a row may have had an error when it was read before
            chunk.groups.append(new)
        answered = [row for row, result in chunk.results.items() if isinstance(result, Generation)]
        return Trial(tuple(chunk.groups), dict(chunk.results), answered[0] if answered else None)

    def charge(self, chunk_id: str, rows: Rows | None) -> None:
        """An engine died with this chunk in it; on trial only these rows of it."""
        chunk = self._chunks.setdefault(chunk_id, _Chunk())
        chunk.deaths += 1
        if rows is None or rows not in chunk.groups:
            return
        chunk.groups.remove(rows)
        chunk.groups += self._narrow(chunk, rows)  # last: what may be innocent shows first whether engines live

    def _narrow(self, chunk: _Chunk, rows: Rows) -> Iterable[Rows]:
        if len(rows) > 1:
            return split(rows)
        (row,) = rows
        chunk.deaths_alone[row] = chunk.deaths_alone.get(row, 0) + 1
        if chunk.deaths_alone[row] < DEATHS_ALONE:
            return [rows]
        chunk.results[row] = SampleError(
            "engine_killed",
            f"The engine died {DEATHS_ALONE} times with this row alone in it, {chunk.deaths} times with its chunk.",
        )
        return []

    def keep(self, chunk_id: str, results: dict[int, Result]) -> None:
        """The answers of one group."""
        chunk = self._chunks.setdefault(chunk_id, _Chunk())
        chunk.results |= results
        chunk.groups = [rows for rows in chunk.groups if not set(rows) <= results.keys()]

    def done(self, chunk_id: str) -> None:
        """A chunk is answered. A suspect's answers stay a while: the engine may die before Ray has them."""
        chunk = self._chunks.get(chunk_id)
        if chunk is None:
            return
        if chunk.deaths < DEATHS_OF_A_SUSPECT:
            del self._chunks[chunk_id]
            return
        self._done = [*(one for one in self._done if one != chunk_id), chunk_id]
        for oldest in self._done[:-MAX_KEPT]:
            self._chunks.pop(oldest, None)
        self._done = self._done[-MAX_KEPT:]


def split(rows: Rows) -> list[Rows]:
    """A group in groups of GROUP rows; one of no more than that in single rows."""
    size = 1 if len(rows) <= GROUP else GROUP
    return [rows[start : start + size] for start in range(0, len(rows), size)]
