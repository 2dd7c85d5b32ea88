"""`r4b publish` of ten thousand parts: memory against a tenth of them, kills, a reader that polls, every row once.

On a disk, then on an S3 store (SeaweedFS on loopback). Parts are made by real commits. The reader looks at the
pointer, the manifest and every file that it names, all the time, while the publish is killed at random moments. Exit
code 1 if it saw anything but the old version and then the new one, whole, or rows are not those of the parts.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass

import duckdb
import pyarrow.dataset as ds
import pyarrow.fs as fs

from pipeline.spec import StorageSpec
from pipeline.storage import open_store
from tests.publishing import OutputMaker, PollingReader, json_of, run_measured
from tests.running import kill_tree, r4b, started_r4b
from tests.s3_server import S3Server, credentials_in_environment, running_s3


@dataclass(frozen=True)
class Bench:
    """One kind of store."""

    name: str
    url: str
    storage: StorageSpec
    server: S3Server | None
    rows: int

    def command(self, num_parts: int, target: str, *more: str) -> list[str]:
        endpoint = [] if self.server is None else ["--endpoint-url", self.server.endpoint_url]
        return ["publish", f"{self.url}/{num_parts}", "--to", f"{self.url}/{target}", "--json", *endpoint, *more]

    def fill(self, num_parts: int) -> None:
        start = time.monotonic()
        OutputMaker(f"{self.url}/{num_parts}", self.storage, self.rows, words=60).fill(num_parts, parts_per_shard=100)
        print(
            f"{self.name}: {num_parts} parts of {self.rows} rows made in {time.monotonic() - start:.0f} s", flush=True
        )

    def measure(self, num_parts: int, *more: str) -> str:
        """Publish to a fresh place, and print time and memory; gives the version."""
        start = time.monotonic()
        finished, peak = run_measured(*self.command(num_parts, f"to-{num_parts}{''.join(more)}", *more), timeout=3600)
        seconds, done = time.monotonic() - start, json_of(finished)
        print(
            f"{self.name}: {num_parts} parts {' '.join(more)}: {done['num_rows']} rows in {done['num_files']} files of "
            f"{done['num_bytes'] / done['num_files'] / 1e6:.1f} MB in {seconds:.1f} s; {peak:.0f} MiB resident at most",
            flush=True,
        )
        return str(done["version"])

    def kill_and_resume(self, num_parts: int, old: str, kills: int, target_size: str) -> bool:
        """Publish in another size where `old` is; kill that at random moments while a reader polls; let it end.

        Tells whether at least one was killed in its midst, the reader saw the old version and then the new one, whole,
        and the rows are those of the parts.
        """
        target = f"to-{num_parts}"
        command = self.command(num_parts, target, "--target-size", target_size)
        reader = PollingReader(f"{self.url}/{target}", self.storage, pause_s=0.05)
        rng, left = random.Random(3), [0]
        num_kills = 0
        with reader.running():
            for _ in range(kills):
                wanted, delay = left[-1] + rng.randint(0, 5), rng.uniform(0, 2)
                with started_r4b(*command) as process:
                    while process.poll() is None and self.count_files(target, old) < wanted:
                        time.sleep(0.05)
                    time.sleep(delay)
                    num_kills += process.poll() is None
                    kill_tree(process.pid)
                left.append(self.count_files(target, old))
            done = json_of(r4b(*command, timeout=3600))
            polls = reader.num_polls
            while reader.num_polls < polls + 20:
                time.sleep(0.01)
        print(
            f"{self.name}: {num_kills} killed; files after each: {left[1:]}; the last run wrote "
            f"{done['files_written']} of {done['num_files']} files. {reader.num_polls} polls saw {len(reader.seen)} "
            f"versions, the old one first: {reader.seen == [old, done['version']]}, problems: {reader.problems[:3]}",
            flush=True,
        )
        saw_all_or_nothing = reader.seen == [old, done["version"]] and not reader.problems
        return self.compare(num_parts, done["target"]) and saw_all_or_nothing and num_kills > 0

    def count_files(self, target: str, old: str) -> int:
        """Files of versions other than the old one."""
        infos = open_store(self.url, self.storage).list(f"{self.url}/{target}/versions/")
        return sum(info.url.endswith(".parquet") and old not in info.url for info in infos)

    def compare(self, num_parts: int, target: str) -> bool:
        """Rows of the parts and of the published files, with DuckDB: none is missing, none is there twice."""
        endpoint = [] if self.server is None else ["--endpoint-url", self.server.endpoint_url]
        listed = json.loads(r4b("published", target, "--json", *endpoint).stdout)
        database = duckdb.connect()
        database.register("found", self.dataset([file["url"] for file in listed["files"]]))
        parts = self.dataset(f"{self.url}/{num_parts}/data")
        database.register("parts", parts)
        names = ", ".join(f'"{name}"' for name in parts.schema.names)
        different = [
            database.sql(
                f"SELECT count(*) FROM (SELECT {names} FROM {a} EXCEPT ALL SELECT {names} FROM {b})"
            ).fetchall()
            for a, b in (("parts", "found"), ("found", "parts"))
        ]
        num_rows = database.sql("SELECT count(*), count(DISTINCT sample_id) FROM found").fetchall()
        print(f"{self.name}: DuckDB finds (rows, ids) {num_rows}; missing and added rows: {different}", flush=True)
        return num_rows == [(num_parts * self.rows,) * 2] and different == [[(0,)]] * 2

    def dataset(self, where: str | list[str]) -> ds.Dataset:
        if self.server is None:
            return ds.dataset(where, format="parquet")
        host = self.server.endpoint_url.removeprefix("http://")
        store = fs.S3FileSystem(endpoint_override=host, scheme="http", region="us-east-1")
        paths = where.removeprefix("s3://") if isinstance(where, str) else [url.removeprefix("s3://") for url in where]
        return ds.dataset(paths, format="parquet", filesystem=store)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=64, help="Of a part.")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--target-size", default="5MB", help="While it is killed; otherwise the default.")
    parser.add_argument("--store", choices=["disk", "s3", "both"], default="both")
    args = parser.parse_args()
    right = True
    for kind in ["disk", "s3"] if args.store == "both" else [args.store]:
        with (
            running_s3() if kind == "s3" else nullcontext() as server,
            credentials_in_environment(server) if server else nullcontext(),
            tempfile.TemporaryDirectory() as folder,
        ):
            url = server.fresh_prefix("publishing") if server else folder
            storage = StorageSpec(endpoint_url=server.endpoint_url if server else None)
            bench = Bench(kind, url, storage, server, args.rows)
            old = ""
            for num_parts in (args.parts // 10, args.parts):
                bench.fill(num_parts)
                old = bench.measure(num_parts)
                if kind == "disk":
                    bench.measure(num_parts, "--partition-by", "kind")
            right &= bench.kill_and_resume(args.parts, old, args.kills, args.target_size)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
