"""A job's output in a store, read as others read it: while it grows, by one who polls; afterwards, against the plan."""

import io
import json
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import botocore.exceptions
import pyarrow.parquet as pq

from pipeline.records import read_part
from tests.s3_server import S3Server

STORE_ERRORS = (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError)


@dataclass
class WatchedOutput:
    """An output below `url`."""

    store: S3Server
    url: str
    num_parts: int | None = None
    """When it is finished, where that is known."""
    seen: dict[str, str] = field(default_factory=dict)
    """Parts and their etags."""
    half_written: list[str] = field(default_factory=list)
    overwritten: list[str] = field(default_factory=list)
    too_early: bool = False
    """Whether `_SUCCESS` was there before all parts were."""

    def look(self) -> int:
        """Read every part that is new, or another than before; gives how many were seen so far."""
        try:
            is_finished, parts = self.is_finished(), self.list_parts()
            self.too_early |= is_finished and len(parts) < (self.num_parts or 0)
            for url, etag in parts.items():
                if self.seen.get(url) != etag:
                    self._read(url)
                    self.overwritten += [url] if url in self.seen else []
                    self.seen[url] = etag
        except STORE_ERRORS:  # this host is busy; the next look sees as much
            pass
        return len(self.seen)

    def _read(self, url: str) -> None:
        data = self.store.get(url)
        try:
            read_part(io.BytesIO(data))
        except Exception as error:  # whatever pyarrow says of it
            self.half_written.append(f"{url}: {error}")

    def is_finished(self) -> bool:
        """Whether the job said so."""
        return f"{self.url}/_SUCCESS" in self.store.list(f"{self.url}/_SUCCESS")

    def judge(self, num_rows: int) -> dict[str, Any]:
        """What differs from the plan of so many rows, as counts, and a digest of all answers.

        Planned rows that are not there, rows too many, error rows; parts that were seen half-written, that changed
        after they were seen, or are gone; marks that are wrong: `_SUCCESS` too early, or a manifest of other numbers.
        """
        self.look()
        rows = [row for url in self.list_parts() for row in self._read_rows(url)]
        keys = Counter(row["sample_id"] for row in rows)
        expected = {f"row-{number}" for number in range(num_rows)}
        said = sorted(json.dumps(row, sort_keys=True) for row in rows)
        return {
            "lost": len(expected - keys.keys()),
            "twice": sum(count - 1 for count in keys.values()) + len(keys.keys() - expected),
            "errors": sum(row["error_type"] is not None for row in rows),
            "half_written": len(self.half_written),
            "overwritten": len(self.overwritten),
            "vanished": len(self.seen.keys() - self.list_parts().keys()),
            "wrong_marks": int(self.too_early) + int(self._read_totals() != (num_rows, len(self.seen))),
            "answers": sha256("\n".join(said).encode()).hexdigest()[:16],
        }

    def list_parts(self) -> dict[str, str]:
        """Parts and their etags."""
        listed = self.store.list_etags(f"{self.url}/data/")
        return {url: etag for url, etag in listed.items() if url.endswith(".parquet")}

    def _read_rows(self, url: str) -> list[dict[str, Any]]:
        """A part's rows, but for how long they took; none if it cannot be read."""
        try:
            table = pq.read_table(io.BytesIO(self.store.get(url))).drop_columns(["latency_s"])
        except Exception as error:  # as above
            self.half_written.append(f"{url}: {error}")
            return []
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows

    def _read_totals(self) -> tuple[int, int] | None:
        """Rows and parts that the manifest tells."""
        try:
            manifest = json.loads(self.store.get(f"{self.url}/_manifest.json"))
        except STORE_ERRORS:
            return None
        return manifest["num_rows"], manifest["num_chunks"]


WRONG = ("lost", "twice", "errors", "half_written", "overwritten", "vanished", "wrong_marks")
"""What `judge` counts, and must be 0."""
