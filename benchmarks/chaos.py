"""Jobs under seeded faults on a cluster of several nodes, resumed as an operator would, and their output checked.

    python -m benchmarks.chaos --runs 100 --seed 1                                   # the simulated engine
    python -m benchmarks.chaos --runs 10 --seed 1 --engine vllm --rows 600 --chunk-rows 20   # the small checkpoint

A seed decides which faults strike (`benchmarks.chaos_faults`) and after how many parts: `--runs 1 --seed N` has a run
again. Input and output are in a real S3 store behind a proxy that can break requests. A driver that was killed or
failed is started again with the same command, and nothing else is ever done. A run is right if every planned row stands
in the output exactly once, answered (the simulated engine's answers as in an undisturbed run), and no file seen at any
time was half written. Prints a line of JSON for each run and one for all; exit code 1 if a run was not right. Needs
root (network namespaces).
"""

import argparse
import io
import json
import os
import random
import re
import secrets
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.chaos_faults import FAULTS, Faults
from benchmarks.chaos_output import WatchedOutput
from benchmarks.raylets import HEAD, Raylets, inside_own_network, kill_family, running_raylets
from tests.builders import image_table
from tests.running import R4B, real_spec, simulated_spec, write_spec
from tests.s3_server import S3Server, credentials_in_environment, running_s3
from tests.store_proxy import StoreProxy, running_proxy

NUM_NODES = 3
MAX_DRIVERS = 15
MAX_SECONDS = {"simulated": 600.0, "vllm": 1500.0}
STALL_S = {"simulated": 5.0, "vllm": 60.0}
STORE_STALL_S = 3.0
LOOK_S = 0.5
LOSSES = re.compile(r"(\d+) engines were lost and replaced.*; (\d+) chunks were generated again")


@dataclass(frozen=True)
class Scene:
    """What all runs have in common."""

    cluster: Raylets
    store: S3Server
    proxy: StoreProxy
    folder: Path
    spec: dict[str, Any]
    num_rows: int
    max_seconds: float


@dataclass
class Outcome:
    """What a run came to."""

    seed: int
    faults: list[str] = field(default_factory=list)
    """That struck, each after how many parts, with the process or node that it struck."""
    missed: list[str] = field(default_factory=list)
    """Whose time did not come before the job's end."""
    drivers: int = 0
    seconds: float = 0.0
    finished: bool = False
    lost: int = 0
    twice: int = 0
    errors: int = 0
    half_written: int = 0
    redone_chunks: int = 0
    engine_deaths: int = 0
    answers: str = ""

    def is_right(self, answers: str | None) -> bool:
        """Whether all is as in an undisturbed run; None: its answers may have come out otherwise."""
        wrong = self.lost or self.twice or self.errors or self.half_written
        return self.finished and not wrong and answers in (None, self.answers)


def run_once(scene: Scene, seed: int, calm: bool = False) -> Outcome:
    """One job from its start to its end; a calm one has no faults."""
    rng = random.Random(seed)
    num_parts = -(-scene.num_rows // scene.spec["output"]["chunk_rows"])
    due = sorted((rng.randrange(1, num_parts), rng.choice(FAULTS)) for _ in range(0 if calm else rng.randint(2, 5)))
    output = WatchedOutput(scene.store, scene.store.fresh_prefix(f"out-{seed}"))
    faults = Faults(scene.cluster, scene.proxy, rng)
    folder = scene.folder / f"job-{seed}"
    folder.mkdir()
    path = write_spec(folder, scene.spec | {"output": {**scene.spec["output"], "url": output.url}})
    outcome = Outcome(seed)
    start = time.monotonic()
    while not outcome.finished and outcome.drivers < MAX_DRIVERS and time.monotonic() - start < scene.max_seconds:
        outcome.drivers += 1
        drive(path, folder / f"driver-{outcome.drivers}.log", start + scene.max_seconds, output, faults, due, outcome)
    faults.end()
    while len(scene.cluster.nodes) > NUM_NODES:
        scene.cluster.remove(scene.cluster.nodes[0])
    output.look()
    outcome.seconds = round(time.monotonic() - start, 1)
    outcome.missed = [fault for _, fault in due]
    outcome.half_written = len(output.half_written)
    outcome.finished = outcome.finished and output.is_finished()
    for name, value in output.judge(scene.num_rows).items():
        setattr(outcome, name, value)
    return outcome


def drive(
    path: str,
    log: Path,
    deadline: float,
    output: WatchedOutput,
    faults: Faults,
    due: list[tuple[int, str]],
    outcome: Outcome,
) -> None:
    """One driver to its end, while the faults strike that are due."""
    with log.open("w") as file:
        command = [R4B, "run", path, "--json"]
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True)
    faults.driver = driver
    while driver.poll() is None and time.monotonic() < deadline:
        num_parts = output.look()
        while due and num_parts >= due[0][0]:
            outcome.faults.append(f"{num_parts}:{faults.strike(due.pop(0)[1])}")
        time.sleep(LOOK_S)
    kill_family(driver)
    outcome.finished = driver.returncode == 0
    for engines, chunks in LOSSES.findall(log.read_text()):
        outcome.redone_chunks += int(chunks)
        outcome.engine_deaths += int(engines)


def make_spec(folder: Path, engine: str, chunk_rows: int, input_url: str, endpoint_url: str) -> dict[str, Any]:
    """The job of all runs: three engines at most, one on each node."""
    spec = real_spec(folder) if engine == "vllm" else simulated_spec(folder, simulation={"seconds_per_token": 0.01})
    spec["engine"] = spec["engine"] | {"num_gpus": 1, "replicas": {"min": 1, "max": NUM_NODES}}
    spec["prompts"] = [{"id": "p", "template": "What is in the picture?"}]
    spec["limits"] = {"stall_timeout_s": STALL_S[engine], "preemption_grace_s": 3}
    spec["storage"] = {"endpoint_url": endpoint_url, "region": "us-east-1"}
    return spec | {"input": {"url": input_url}, "output": {"chunk_rows": chunk_rows}}


def put_shards(store: S3Server, url: str, num_rows: int, rows_per_shard: int = 500) -> None:
    """Shards of small images."""
    for first in range(0, num_rows, rows_per_shard):
        buffer = io.BytesIO()
        pq.write_table(image_table(min(rows_per_shard, num_rows - first), first), buffer, row_group_size=100)
        store.put(f"{url}{first:07d}.parquet", buffer.getvalue())


def main() -> None:
    """Run all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next has the next")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--chunk-rows", type=int, default=100)
    parser.add_argument("--engine", choices=["simulated", "vllm"], default="simulated")
    parser.add_argument("--keep", action="store_true", help="keep the folder with the drivers' logs")
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    inside_own_network("benchmarks.chaos")
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    outcomes = []
    with (
        running_s3() as store,
        credentials_in_environment(store),
        running_proxy(store.endpoint_url, host=HEAD, stall_s=STORE_STALL_S) as proxy,
        running_raylets(NUM_NODES) as cluster,
    ):
        input_url = store.fresh_prefix("in") + "/"
        put_shards(store, input_url, options.rows)
        spec = make_spec(folder, options.engine, options.chunk_rows, input_url, proxy.url)
        scene = Scene(cluster, store, proxy, folder, spec, options.rows, MAX_SECONDS[options.engine])
        calm = run_once(scene, 0, calm=True)
        print(json.dumps(asdict(calm)), flush=True)
        answers = calm.answers if options.engine == "simulated" else None
        for seed in range(options.seed, options.seed + options.runs):
            outcomes.append(run_once(scene, seed))
            print(json.dumps(asdict(outcomes[-1]) | {"right": outcomes[-1].is_right(answers)}), flush=True)
    wrong = [outcome.seed for outcome in outcomes if not outcome.is_right(answers)]
    names = ("lost", "twice", "errors", "half_written", "redone_chunks", "engine_deaths", "drivers")
    sums = {name: sum(getattr(one, name) for one in outcomes) for name in names}
    print(json.dumps({"runs": len(outcomes), "wrong": wrong, **sums, "folder": str(folder)}))
    if not options.keep and not wrong:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
