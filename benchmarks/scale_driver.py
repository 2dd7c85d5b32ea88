"""What a chunk costs the head of a cluster: the driver, Ray's control plane and the watch, by the number of engines.

    python -m benchmarks.scale_driver --engines 4 16 64 --chunks 2000

As many engine actors as are asked for, on this host; the simulated engine answers at once. A chunk has few rows, for
what it costs the head does not depend on them. Prints a line of JSON for each number of engines: processor milliseconds
for each chunk, from the time that all engines were there, and the driver's memory at six times from then to the end.
The head's own limit is one core for the driver: 1000 / `driver_ms` chunks/s.
"""

import argparse
import json
import math
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pipeline.sharing import CPUS_PER_ENGINE
from tests.builders import image_table, write_shard
from tests.running import R4B, kill_tree, simulated_spec, write_spec

LOOK_S = 1.0
NUM_READERS = 4
"""As many as this host can take; a cluster would have more, of which the head notices little."""
HEAD_START_S = 10.0
PARTS = {"driver": "bin/r4b", "gcs": "gcs_server", "raylet": "raylet/raylet", "watch": "ray::Watch"}
"""Words in the command lines of the head's processes."""
RAY = str(Path(R4B).with_name("ray"))
MIB = 1 << 20


@dataclass
class Sample:
    """How far a job was, and what it had cost."""

    seconds: float
    chunks: int
    engines: int
    cpu_s: dict[str, float] = field(default_factory=dict)
    driver_mib: float = 0.0


def take_sample(start: float, out: Path, root: psutil.Process) -> Sample:
    """Look at every process of the tree."""
    chunks = sum(1 for _ in os.scandir(out / "data")) if (out / "data").exists() else 0
    sample = Sample(time.monotonic() - start, chunks, 0)
    for process in root.children(recursive=True):
        try:
            line, times = " ".join(process.cmdline()), process.cpu_times()
            sample.engines += "EngineActor" in line
            for part, word in PARTS.items():
                if word in line:
                    sample.cpu_s[part] = sample.cpu_s.get(part, 0.0) + times.user + times.system
                    if part == "driver":
                        sample.driver_mib = max(sample.driver_mib, process.memory_info().rss / MIB)
        except psutil.NoSuchProcess:
            continue
    return sample


def measure(num_engines: int, num_chunks: int, chunk_rows: int, folder: Path) -> dict[str, Any]:
    """One job with so many engines."""
    num_rows = num_chunks * chunk_rows
    per_shard = -(-num_rows // NUM_READERS)  # each is read by one task
    for first in range(0, num_rows, per_shard):
        rows = min(per_shard, num_rows - first)
        write_shard(folder / "in" / f"{first:08d}.parquet", image_table(rows, first), 100)
    engine = {"num_gpus": 0, "replicas": {"min": num_engines, "max": num_engines}}
    spec = simulated_spec(folder, **engine, simulation={"thinking_tokens": 1, "answer_tokens": 1})
    spec["prompts"] = [{"id": "p", "template": "What is in the picture?"}]
    spec["output"] = {"url": str(folder / "out"), "chunk_rows": chunk_rows}
    command = [R4B, "run", write_spec(folder, spec), "--json"]
    start, samples = time.monotonic(), []
    with (folder / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        while driver.poll() is None:
            samples.append(take_sample(start, folder / "out", psutil.Process()))
            time.sleep(LOOK_S)
    finally:
        kill_tree(driver.pid)
    if driver.returncode:
        raise SystemExit((folder / "log").read_text()[-3000:])
    return sum_up(num_engines, num_chunks, samples)


def sum_up(num_engines: int, num_chunks: int, samples: list[Sample]) -> dict[str, Any]:
    """Between the first look at which all engines were there and the last before the end."""
    steady = [one for one in samples if one.engines >= num_engines and 0 < one.chunks < num_chunks]
    if len(steady) < 2:
        return {"engines": num_engines, "problem": "the chunks were done before all engines were there"}
    first, last = steady[0], steady[-1]
    chunks = last.chunks - first.chunks
    costs = {f"{part}_ms": round(1e3 * (last.cpu_s[part] - first.cpu_s[part]) / chunks, 2) for part in PARTS}
    return {
        "engines": num_engines,
        "chunks": chunks,
        "seconds": round(last.seconds - first.seconds, 1),
        "all_engines_after_s": round(first.seconds, 1),
        **costs,
        "driver_mib": [round(steady[number * (len(steady) - 1) // 5].driver_mib) for number in range(6)],
    }


def start_head(port: int, num_engines: int, folder: str) -> "subprocess.Popen[bytes]":
    """Ray on loopback, with as few processors as the engines and some readers need: it starts a worker for each."""
    command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
    num_cpus = math.ceil(CPUS_PER_ENGINE * num_engines) + 3
    command += [f"--num-cpus={num_cpus}", "--num-gpus=0", "--object-store-memory=500000000"]
    command += [f"--temp-dir={folder}", "--include-dashboard=false", "--disable-usage-stats"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def main() -> None:
    """All numbers of engines, one after another, on one Ray head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--chunks", type=int, default=2000)
    parser.add_argument("--chunk-rows", type=int, default=4)
    options = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ["RAY_ADDRESS"] = f"127.0.0.1:{port}"
    ray_folder = tempfile.mkdtemp(prefix="ray-")
    head = start_head(port, max(options.engines), ray_folder)
    try:
        time.sleep(HEAD_START_S)
        for num_engines in options.engines:
            with tempfile.TemporaryDirectory(prefix="scale-", ignore_cleanup_errors=True) as folder:
                print(json.dumps(measure(num_engines, options.chunks, options.chunk_rows, Path(folder))), flush=True)
    finally:
        kill_tree(head.pid)
        shutil.rmtree(ray_folder, ignore_errors=True)


if __name__ == "__main__":
    main()
