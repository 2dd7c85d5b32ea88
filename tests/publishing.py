"""Outputs to publish, made by real commits without a model, and a reader that polls a target all the time.

The reader knows the target's layout by itself: it uses nothing of the code under test but the stores.
"""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner

from jobs.cli import main
from pipeline.commits import Output, claim_output, commit_chunk, finish_output
from pipeline.errors import ShardChangedError
from pipeline.records import Chunk, Manifest
from pipeline.spec import StorageSpec
from pipeline.storage import join_url, open_store
from tests.builders import Result, make_generated, make_generation, make_job
from tests.running import Finished, started_r4b

WORDS = [f"word{n}" for n in range(3000)]
KINDS = ("count", "a/b=c %", None, "größe", "count")


@dataclass(frozen=True)
class OutputMaker:
    """A job's output, filled part by part. `shards` lists (shard, start) of each part, in any order."""

    url: str
    storage: StorageSpec = field(default_factory=StorageSpec)
    rows_per_part: int = 8
    words: int = 20
    input_format: str = "parquet"

    @property
    def output(self) -> Output:
        job = make_job(
            "/nowhere/in", self.url, output={"keep_columns": ["kind", "number"]}, storage=self.storage.model_dump()
        )
        return Output(job, {"input.format": self.input_format})

    def claim(self) -> "OutputMaker":
        claim_output(self.output)
        return self

    def chunk(self, shard: int, number: int) -> Chunk:
        start = number * self.rows_per_part
        return Chunk(f"in/{shard:05d}.parquet", "v1", start, start + self.rows_per_part)

    def add(self, shard: int, number: int, kept: pa.Table | None = None, rows: int | None = None) -> str:
        """Commit one part; gives its chunk id."""
        return self.add_chunk(self.chunk(shard, number), f"{shard:05d}", kept, rows)

    def add_chunk(self, chunk: Chunk, name: str, kept: pa.Table | None = None, rows: int | None = None) -> str:
        numbers = range(chunk.start, chunk.stop if rows is None else chunk.start + rows)
        rng = random.Random(chunk.chunk_id)
        results: list[tuple[str, Result]] = [
            (f"{name}-{n:06d}", make_generation(answer=" ".join(rng.choices(WORDS, k=self.words)))) for n in numbers
        ]
        if kept is None:
            kinds = pa.array([KINDS[n % len(KINDS)] for n in numbers], pa.string())
            kept = pa.table({"kind": kinds, "number": pa.array(numbers, pa.int64())})
        return commit_chunk(make_generated(chunk, results, kept), self.output).chunk_id

    def finish(self, num_parts: int, num_rows: int, stale: Sequence[str] = ()) -> None:
        manifest = Manifest("job", self.output.fingerprint_hash, "sim", num_parts, num_rows, stale_parts=list(stale))
        finish_output(self.output, manifest.to_json())

    def fill(self, num_parts: int, parts_per_shard: int = 10) -> "OutputMaker":
        """A finished job."""
        self.claim()
        for n in range(num_parts):
            self.add(n // parts_per_shard, n % parts_per_shard)
        self.finish(num_parts, num_parts * self.rows_per_part)
        return self


@dataclass
class PollingReader:
    """Reads `_latest.json` again and again, and whether all is there that it promises."""

    target: str
    storage: StorageSpec
    pause_s: float = 0.01
    seen: list[str] = field(default_factory=list)
    """Versions in the order in which they were met."""
    problems: list[str] = field(default_factory=list)
    num_polls: int = 0

    def poll(self) -> None:
        store = open_store(self.target, self.storage)
        pointer = self.read_pointer()
        folder = join_url(self.target, "versions", pointer["version"])
        manifest = json.loads(store.read(join_url(self.target, pointer["manifest"])))
        rows = 0
        for file in manifest["files"]:
            url = join_url(folder, file["path"])
            info = store.stat(url)
            if info is None or info.size != file["bytes"]:
                self.problems.append(f"{url}: {info}")
                continue
            if self.num_polls % 10 == 0:
                with store.open(url) as opened:
                    rows += pq.ParquetFile(opened).metadata.num_rows
        if self.num_polls % 10 == 0 and rows != manifest["num_rows"]:
            self.problems.append(f"{pointer['version']} has {rows} rows, its manifest says {manifest['num_rows']}")
        if not self.seen or self.seen[-1] != pointer["version"]:
            self.seen.append(pointer["version"])
        self.num_polls += 1

    def read_pointer(self) -> dict[str, str]:
        """Read again when it is replaced between the two requests of a store's `read`."""
        url = join_url(self.target, "_latest.json")
        for _ in range(5):
            with suppress(ShardChangedError):
                return dict(json.loads(open_store(url, self.storage).read(url)))
        raise AssertionError(f"{url} cannot be read")

    @contextmanager
    def running(self) -> Iterator[None]:
        done = threading.Event()

        def loop() -> None:
            while not done.is_set():
                try:
                    self.poll()
                except Exception as error:
                    self.problems.append(repr(error))
                done.wait(self.pause_s)

        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Look again every 5 ms until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.005)


def call(*args: str) -> Finished:
    """A command in this process: as r4b, without the time that its start takes."""
    outcome = CliRunner().invoke(main, args)
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    return Finished(outcome.exit_code, outcome.stdout, outcome.stderr)


def run_measured(*args: str, timeout: float = 600) -> tuple[Finished, float]:
    """Run r4b to its end; also the most resident memory that it had, in MiB."""
    peak = 0.0
    with started_r4b(*args) as process:
        while process.poll() is None:
            peak = max(peak, peak_of(process.pid))
            time.sleep(0.01)
        stdout, stderr = process.communicate(timeout=timeout)
    return Finished(process.returncode, stdout, stderr), peak


def peak_of(pid: int) -> float:
    """A process's own mark of high water (VmHWM), in MiB; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return max((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), default=0.0)


def json_of(finished: Finished) -> dict[str, Any]:
    """What a command printed with --json; it must have succeeded."""
    assert finished.code == 0, finished.stderr
    facts: dict[str, Any] = json.loads(finished.stdout)
    return facts
