"""What Ray, reading and committing cost: `r4b run` against a bare AsyncLLM loop on the same rows, in alternation.

    python -m benchmarks.batch_overhead --rows 1000 --pairs 3

For each pair: rows/s of both from the moment the engine was ready, their ratio, and the CPU seconds spent in that
time outside the engine's own processes. Small machines drift by a quarter within an hour: read the ratios.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from jobs.demo import prepare_demo

ENGINE_NAMES = ("EngineCore", "VllmWorker", "Worker")


@dataclass
class CpuMeter:
    """Samples the CPU seconds of a process tree, by group, four times a second."""

    pid: int
    samples: dict[tuple[str, int], list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    done: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        while not self.done.wait(0.25):
            try:
                root = psutil.Process(self.pid)
                processes = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in processes:
                try:
                    times = process.cpu_times()
                    self.samples[group_of(process, self.pid), process.pid].append(
                        (time.time(), times.user + times.system)
                    )
                except psutil.NoSuchProcess:
                    continue

    def seconds(self, start: float, stop: float) -> dict[str, float]:
        """CPU seconds by group between two moments."""
        totals: dict[str, float] = defaultdict(float)
        for (group, _), points in self.samples.items():
            inside = [cpu for moment, cpu in points if start <= moment <= stop + 1]
            before = [cpu for moment, cpu in points if moment < start]
            if inside:
                totals[group] += inside[-1] - (before[-1] if before else 0.0)
        return dict(totals)


def group_of(process: psutil.Process, root: int) -> str:
    title = " ".join(process.cmdline()) or process.name()
    if any(name in title for name in ENGINE_NAMES) and "MapWorker" not in title:
        return "engine"
    if process.pid == root:
        return "main process"
    if "EngineActor" in title:
        return "engine actor"
    if title.startswith("ray::"):
        return "ray workers"
    return "ray services"


def measure(command: list[str]) -> tuple[dict[str, Any], CpuMeter]:
    """Run a command that prints JSON, with its CPU metered."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    meter = CpuMeter(process.pid)
    thread = threading.Thread(target=meter.watch)
    thread.start()
    output, errors = process.communicate()
    meter.done.set()
    thread.join()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors[-3000:]}")
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result, meter


def run_pair(folder: Path, number: int) -> tuple[float, float]:
    """One bare run and one r4b run; the order changes from pair to pair."""
    spec = yaml.safe_load((folder / "job.yaml").read_text())
    spec["output"]["url"] = str(folder / f"output-{number}")
    job_file = folder / f"job-{number}.yaml"
    job_file.write_text(yaml.safe_dump(spec))
    modules = {"bare": "benchmarks.bare_loop", "r4b": "benchmarks.timed_run"}
    names = ["bare", "r4b"] if number % 2 == 0 else ["r4b", "bare"]
    rates = {}
    for name in names:
        result, meter = measure([sys.executable, "-m", modules[name], str(job_file)])
        rates[name] = result["rows"] / (result["done_at"] - result["ready_at"])
        cpu = meter.seconds(result["ready_at"], result["done_at"])
        outside = sum(seconds for group, seconds in cpu.items() if group != "engine")
        detail = ", ".join(f"{group} {seconds:.1f}" for group, seconds in sorted(cpu.items()))
        print(f"pair {number} {name:<5} {rates[name]:6.1f} rows/s, CPU outside the engine {outside:5.1f} s ({detail})")
    print(f"pair {number} ratio {rates['r4b'] / rates['bare']:.3f}", flush=True)
    return rates["bare"], rates["r4b"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_demo(folder, args.rows)
        pairs = [run_pair(folder, number) for number in range(args.pairs)]
    bare, r4b = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    ratio = statistics.median(ours / theirs for theirs, ours in pairs)
    print(f"median: bare {bare:.1f} rows/s, r4b run {r4b:.1f} rows/s, ratio of pairs {ratio:.3f}")


if __name__ == "__main__":
    main()
