"""Jobs under seeded faults on a cluster of several nodes, resumed as an operator would, and their output checked.

    python -m benchmarks.chaos --runs 100 --seed 1                  # the simulated engine
    python -m benchmarks.chaos --runs 10 --seed 1 --engine vllm     # the small checkpoint on vLLM

A seed decides which faults strike and after how many parts: `--runs 1 --seed N` has a run again. A driver
that was killed or failed is started again with the same command, and nothing else is ever done. A run is right if every
planned row stands in the output exactly once, answered, and no file seen at any time was half written. Exit code 1 if
one was not. Needs root (network namespaces).
"""

import argparse
import contextlib
import json
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from benchmarks.raylets import Raylets, inside_own_network, kill_family, running_raylets
from pipeline.records import read_part
from tests.builders import image_table, write_shard
from tests.running import R4B, real_spec, simulated_spec, write_spec

NUM_NODES = 3
STALL_S = 5.0
ATTEMPTS = 15
RUN_S = 600.0
IMPORTS_S = 4.0
"""Of processor time: a worker that is stopped while it imports its modules is not missed, see docs/DESIGN.md."""
LOSSES = re.compile(r"(\d+) engines were lost and replaced.*; (\d+) chunks were generated again")
ACTOR, ENGINE, READER, WRITER = "EngineActor", "EngineCore", "read_batches", "commit_batch"


@dataclass
class Chaos:
    """One run: a cluster, an output, and what has happened."""

    cluster: Raylets
    rng: random.Random
    out: Path
    driver: Any = None
    seen: dict[str, int] = field(default_factory=dict)
    """Rows of each part that was seen."""
    half_written: list[str] = field(default_factory=list)

    def strike(self, fault: str) -> str:
        """Let a fault happen; says after how many parts, and what it struck."""
        told = f"{len(self.seen)}:{fault}({getattr(self, fault)() or ''})"
        print(told, file=sys.stderr, flush=True)
        return told

    def kill_driver(self) -> None:
        kill_family(self.driver)

    def kill_actor(self) -> str:
        return self._signal(ACTOR, signal.SIGKILL)

    def kill_engine(self) -> str:
        return self._signal(ENGINE, signal.SIGKILL) or self._signal(ACTOR, signal.SIGKILL)

    def kill_reader(self) -> str:
        return self._signal(READER, signal.SIGKILL)

    def kill_writer(self) -> str:
        return self._signal(WRITER, signal.SIGKILL)

    def stop_actor(self) -> str:
        return self._signal(ACTOR, signal.SIGSTOP)

    def stop_engine(self) -> str:
        return self._signal(ENGINE, signal.SIGSTOP) or self._signal(ACTOR, signal.SIGSTOP)

    def stop_reader(self) -> str:
        return self._signal(READER, signal.SIGSTOP, IMPORTS_S)

    def preempt_actor(self) -> str:
        return self._signal(ACTOR, signal.SIGTERM)

    def kill_raylet(self) -> str:
        node = self.rng.choice(self.cluster.nodes)
        for process in node.processes():
            if process.name() == "raylet":
                process.kill()
        time.sleep(2)
        self.cluster.remove(node)
        self.cluster.add_node()
        return node.address

    def lose_node(self) -> str:
        node = self.rng.choice(self.cluster.nodes)
        self.cluster.remove(node)
        self.cluster.add_node()
        return node.address

    def add_node(self) -> str:
        return self.cluster.add_node().address

    def cut_network(self) -> str:
        node = self.rng.choice(self.cluster.nodes)
        node.cut()
        time.sleep(self.rng.uniform(1, 4))
        node.mend()
        return node.address

    def _signal(self, title: str, number: int, at_least_s: float = 0.0) -> str:
        found = sorted(self._workers(title, at_least_s), key=lambda process: process.pid)
        if not found:
            return ""
        process = self.rng.choice(found)
        process.send_signal(number)
        return str(process.pid)

    def _workers(self, title: str, at_least_s: float) -> Iterator[psutil.Process]:
        """The nodes' processes with this title that have worked for as long."""
        for process in (process for node in self.cluster.nodes for process in node.processes()):
            with contextlib.suppress(psutil.NoSuchProcess):
                line = " ".join(process.cmdline())
                is_worker = line.startswith("ray::") or "VLLM::" in line
                if title in line and is_worker and process.cpu_times().user >= at_least_s:
                    yield process

    def look(self) -> None:
        """Read every part that is new, as a reader that polls would."""
        for path in self.out.glob("data/*.parquet"):
            if path.name in self.seen:
                continue
            try:
                self.seen[path.name] = pq.read_metadata(path).num_rows
                with path.open("rb") as file:
                    read_part(file)
            except Exception as error:  # whatever pyarrow says of it
                self.half_written.append(f"{path.name}: {error}")
                self.seen.setdefault(path.name, 0)


FAULTS = [name for name in vars(Chaos) if name.split("_")[0] in ("kill", "stop", "preempt", "lose", "add", "cut")]


@dataclass
class Outcome:
    """What a run came to."""

    seed: int
    faults: list[str]
    """That struck, each after how many parts, with the process or node that it struck."""
    missed: list[str]
    """Whose time did not come before the job's end."""
    drivers: int
    seconds: float
    lost: int
    twice: int
    errors: int
    half_written: int
    redone_chunks: int
    engine_deaths: int
    finished: bool
    answers: str

    def is_right(self, answers: str) -> bool:
        """Whether all is as in an undisturbed run, whose answers these are."""
        wrong = self.lost or self.twice or self.errors or self.half_written or self.answers != answers
        return self.finished and not wrong


def run_once(
    cluster: Raylets, seed: int, folder: Path, spec: dict[str, Any], num_rows: int, calm: bool = False
) -> Outcome:
    """One job from its start to its end; a calm one has no faults."""
    rng = random.Random(seed)
    out = folder / f"out-{seed}"
    spec = spec | {"output": {**spec["output"], "url": str(out)}}
    job_folder = folder / f"job-{seed}"
    job_folder.mkdir()
    path = write_spec(job_folder, spec)
    chaos = Chaos(cluster, rng, out)
    num_parts = -(-num_rows // spec["output"]["chunk_rows"])
    planned = sorted((rng.randrange(num_parts), rng.choice(FAULTS)) for _ in range(0 if calm else rng.randint(2, 5)))
    happened: list[str] = []
    start, drivers, redone, deaths, finished = time.monotonic(), 0, 0, 0, False
    while not finished and drivers < ATTEMPTS and time.monotonic() - start < RUN_S:
        drivers += 1
        with (job_folder / f"driver-{drivers}.log").open("w") as log:
            chaos.driver = subprocess.Popen(
                [R4B, "run", path, "--json"], stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
            while chaos.driver.poll() is None and time.monotonic() - start < RUN_S:
                chaos.look()
                while planned and len(chaos.seen) >= planned[0][0] and chaos.seen:
                    happened.append(chaos.strike(planned.pop(0)[1]))
                time.sleep(0.2)
            kill_family(chaos.driver)
        finished = chaos.driver.returncode == 0
        told = (job_folder / f"driver-{drivers}.log").read_text()
        for engines, chunks in LOSSES.findall(told):
            redone, deaths = redone + int(chunks), deaths + int(engines)
    chaos.look()
    while len(cluster.nodes) > NUM_NODES:
        cluster.remove(cluster.nodes[0])
    lost, twice, errors, answers = judge(out, num_rows)
    seconds = round(time.monotonic() - start, 1)
    done = finished and (out / "_SUCCESS").exists()
    halves, missed = len(chaos.half_written), [fault for _, fault in planned]
    return Outcome(seed, happened, missed, drivers, seconds, lost, twice, errors, halves, redone, deaths, done, answers)


def judge(out: Path, num_rows: int) -> tuple[int, int, int, str]:
    """Of an output: planned rows that are not there, rows too many, error rows, and a digest of all answers."""
    rows = [row for part in out.glob("data/*.parquet") for row in read_rows(part)]
    keys = Counter(row["sample_id"] for row in rows)
    expected = {f"row-{number}" for number in range(num_rows)}
    twice = sum(count - 1 for count in keys.values()) + len(keys.keys() - expected)
    errors = sum(row["error_type"] is not None for row in rows)
    said = sorted(json.dumps(row, sort_keys=True) for row in rows)
    return len(expected - keys.keys()), twice, errors, sha256("\n".join(said).encode()).hexdigest()[:16]


def read_rows(part: Path) -> list[dict[str, Any]]:
    """A part's rows, but for how long they took."""
    with part.open("rb") as file:
        rows: list[dict[str, Any]] = read_part(file).drop_columns(["latency_s"]).to_pylist()
    return rows


def make_spec(folder: Path, engine: str, chunk_rows: int) -> dict[str, Any]:
    """The job of all runs: three engines at most, one on each node."""
    spec = real_spec(folder) if engine == "vllm" else simulated_spec(folder, simulation={"seconds_per_token": 0.02})
    spec["engine"] = spec["engine"] | {"num_gpus": 1, "replicas": {"min": 1, "max": NUM_NODES}}
    spec["prompts"] = [{"id": "p", "template": "What is in the picture?"}]
    spec["limits"] = {"stall_timeout_s": STALL_S if engine == "simulated" else 30, "preemption_grace_s": 3}
    return spec | {"output": {"url": "", "chunk_rows": chunk_rows}}


def main() -> None:
    """Run, print a line of JSON for each run and one for all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next has the next")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--chunk-rows", type=int, default=100)
    parser.add_argument("--engine", choices=["simulated", "vllm"], default="simulated")
    parser.add_argument("--keep", action="store_true", help="keep the folder with logs and outputs")
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    inside_own_network("benchmarks.chaos")
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    for first in range(0, options.rows, 500):
        write_shard(folder / "in" / f"{first:06d}.parquet", image_table(min(500, options.rows - first), first), 100)
    spec = make_spec(folder, options.engine, options.chunk_rows)
    outcomes = []
    with running_raylets(NUM_NODES) as cluster:
        answers = run_once(cluster, -1, folder, spec, options.rows, calm=True).answers
        for seed in range(options.seed, options.seed + options.runs):
            outcomes.append(run_once(cluster, seed, folder, spec, options.rows))
            print(json.dumps(asdict(outcomes[-1]) | {"right": outcomes[-1].is_right(answers)}), flush=True)
    wrong = [outcome.seed for outcome in outcomes if not outcome.is_right(answers)]
    sums = {name: sum(getattr(one, name) for one in outcomes) for name in ("lost", "twice", "errors", "half_written")}
    print(json.dumps({"runs": len(outcomes), "wrong": wrong, **sums, "folder": str(folder)}))
    if not options.keep and not wrong:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
