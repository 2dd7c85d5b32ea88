"""What a publish knows of its parts, and which part goes into which file.

It is a temporary database on the local disk (SQLite removes it when the process ends, however that ends), so that
memory does not grow with the number of parts. Parts are ordered by shard, then by place in the shard: rows keep the
order of the input.
"""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

from pipeline.errors import JobError
from pipeline.publish.parts import Footer, Part

TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE parts (id INTEGER PRIMARY KEY, url, chunk_id, version, size INTEGER, shard, start INTEGER, stop INTEGER,
                    first_id, num_rows INTEGER, num_bytes INTEGER);
CREATE TABLE ranks (rank INTEGER PRIMARY KEY, part INTEGER);
CREATE TABLE pieces (part INTEGER, partition INTEGER, num_rows INTEGER);
CREATE TABLE placed (rank INTEGER, partition INTEGER, file INTEGER, PRIMARY KEY (rank, partition)) WITHOUT ROWID;
CREATE TABLE files (id INTEGER PRIMARY KEY, is_there INTEGER);
"""


@dataclass(frozen=True)
class FilePlan:
    """A file to be: the `number`th of its partition, with the rows of its parts up to that of `last_rank`."""

    id: int
    partition: int
    number: int
    num_rows: int
    last_rank: int


@dataclass(frozen=True)
class Placing:
    """A part, and for each partition to be taken from it now, the file where those rows go."""

    rank: int
    part: Part
    num_rows: int
    files: dict[int, int]
    """Partition to the id of a FilePlan."""


class PartsIndex:
    """All parts of one publish. Belongs to the thread that made it."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(TABLES)
        self._database.execute("BEGIN")  # one transaction that never ends: each would write its pages
        self.num_parts = self.num_rows = 0

    def close(self) -> None:
        self._database.close()

    def add_part(self, part: Part) -> None:
        row = (part.url, part.chunk_id, part.version, part.size)
        self._database.execute("INSERT INTO parts (url, chunk_id, version, size) VALUES (?, ?, ?, ?)", row)
        self.num_parts += 1

    def parts(self) -> Iterator[Part]:
        """All of them, in the order in which they were added."""
        last = 0
        while rows := self._database.execute(
            "SELECT url, chunk_id, version, size, id FROM parts WHERE id > ? ORDER BY id LIMIT 1000", (last,)
        ).fetchall():
            yield from (Part(*row[:4]) for row in rows)
            last = rows[-1][4]

    def add_footer(self, number: int, footer: Footer, rows_by_partition: dict[int, int]) -> None:
        """What the footer of the `number`th part says (from 1)."""
        row = (footer.shard, footer.start, footer.stop, footer.first_id, footer.num_rows, footer.num_bytes, number)
        self._database.execute(
            "UPDATE parts SET shard=?, start=?, stop=?, first_id=?, num_rows=?, num_bytes=? WHERE id=?", row
        )
        pieces = [(number, partition, rows) for partition, rows in rows_by_partition.items()]
        self._database.executemany("INSERT INTO pieces VALUES (?, ?, ?)", pieces)
        self.num_rows += footer.num_rows

    def rank_parts(self) -> None:
        """Put the parts into the order of the input."""
        self._database.execute(
            "INSERT INTO ranks (part) SELECT id FROM parts ORDER BY shard, start, first_id, chunk_id"
        )

    def check_overlaps(self) -> None:
        """Raises JobError if two parts hold the same samples of one shard."""
        rows = self._database.execute(
            "SELECT shard, start, stop, url FROM ranks JOIN parts ON parts.id = ranks.part ORDER BY rank"
        )
        for before, after in pairwise(rows):
            if before[0] == after[0] and after[1] < before[2]:
                raise JobError(
                    f"{before[3]} and {after[3]} hold the same samples of {before[0]}: one of them is stale. "
                    "Remove it with `r4b run SPEC --drop-stale`."
                )

    def plan_files(self, target_size: int) -> Iterator[FilePlan]:
        """Cut each partition's parts into files of about `target_size` bytes; a part is never split within one."""
        pieces = self._database.execute(
            "SELECT pieces.partition, rank, pieces.num_rows, 1.0 * num_bytes * pieces.num_rows / parts.num_rows "
            "FROM pieces JOIN ranks USING (part) JOIN parts ON parts.id = pieces.part ORDER BY 1, 2"
        )
        next_id = 1
        for partition, of_partition in groupby(pieces, key=lambda piece: int(piece[0])):
            number, num_rows, num_bytes, last_rank = 0, 0, 0.0, 0
            for _, rank, rows, size in of_partition:
                if num_rows and num_bytes + size > target_size:
                    yield FilePlan(next_id, partition, number, num_rows, last_rank)
                    next_id, number, num_rows, num_bytes = next_id + 1, number + 1, 0, 0.0
                self._database.execute("INSERT INTO placed VALUES (?, ?, ?)", (rank, partition, next_id))
                num_rows, num_bytes, last_rank = num_rows + rows, num_bytes + size, rank
            yield FilePlan(next_id, partition, number, num_rows, last_rank)
            next_id += 1

    def set_present(self, file_ids: Iterator[int]) -> None:
        """These files need not be written."""
        self._database.executemany("INSERT INTO files VALUES (?, 1)", ((file_id,) for file_id in file_ids))

    def placings(self, first: int, last: int) -> Iterator[Placing]:
        """What is still to be read for the partitions `first` to `last`, in order."""
        rows = self._database.execute(
            "SELECT rank, url, chunk_id, version, size, num_rows, partition, file FROM placed "
            "JOIN ranks USING (rank) JOIN parts ON parts.id = ranks.part "
            "WHERE partition BETWEEN ? AND ? AND file NOT IN (SELECT id FROM files) ORDER BY rank, partition",
            (first, last),
        )
        for rank, of_part in groupby(rows, key=lambda row: int(row[0])):
            found = list(of_part)
            part = Part(*found[0][1:5])
            yield Placing(rank, part, found[0][5], {row[6]: row[7] for row in found})
