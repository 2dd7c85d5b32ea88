"""A job's output in a store, read as others read it: while it grows, by one who polls; afterwards, against the plan."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import pyarrow.parquet as pq

from pipeline.records import read_part
from tests.s3_server import S3Server


@dataclass
class WatchedOutput:
    """An output below `url`."""

    store: S3Server
    url: str
    seen: set[str] = field(default_factory=set)
    """Parts, by their URLs."""
    half_written: list[str] = field(default_factory=list)

    def look(self) -> int:
        """Read every part that is new; gives how many were seen so far."""
        for url in self._parts():
            if url in self.seen:
                continue
            self.seen.add(url)
            try:
                read_part(io.BytesIO(self.store.get(url)))
            except Exception as error:  # whatever pyarrow says of it
                self.half_written.append(f"{url}: {error}")
        return len(self.seen)

    def is_finished(self) -> bool:
        """Whether the job said so."""
        return f"{self.url}/_SUCCESS" in self.store.list(f"{self.url}/_SUCCESS")

    def judge(self, num_rows: int) -> dict[str, Any]:
        """Planned rows that are not there, rows too many, error rows, and a digest of all answers."""
        rows = [row for url in self._parts() for row in self._read_rows(url)]
        keys = Counter(row["sample_id"] for row in rows)
        expected = {f"row-{number}" for number in range(num_rows)}
        said = sorted(json.dumps(row, sort_keys=True) for row in rows)
        return {
            "lost": len(expected - keys.keys()),
            "twice": sum(count - 1 for count in keys.values()) + len(keys.keys() - expected),
            "errors": sum(row["error_type"] is not None for row in rows),
            "answers": sha256("\n".join(said).encode()).hexdigest()[:16],
        }

    def _parts(self) -> Iterator[str]:
        return (url for url in self.store.list(f"{self.url}/data/") if url.endswith(".parquet"))

    def _read_rows(self, url: str) -> list[dict[str, Any]]:
        """A part's rows, but for how long they took."""
        table = pq.read_table(io.BytesIO(self.store.get(url))).drop_columns(["latency_s"])
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows
