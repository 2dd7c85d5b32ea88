"""Two jobs on one cluster while a node dies and another comes; then two drivers on one output, the same way.

    python -m benchmarks.two_jobs                                          # each job may have half of the engines
    python -m benchmarks.two_jobs --replicas 4 --late 100 --rows 12000     # each may have all, the second comes later

Nodes in network namespaces (root), the simulated engine, whose speed does not depend on this host's. Prints a line of
JSON whenever the number of somebody's engines changed, and what each came to. Exit code 1 if a row is missing, there
twice, or an error.
"""

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from benchmarks.cluster_output import WRONG
from benchmarks.cluster_scene import ACTOR, Job, Scene, find_workers, running_scene, tell

NUM_NODES = 4
CPUS = 3
"""Of each node: one for its engine."""
NUM_SHARDS = 6
"""A reader keeps its half of a processor until its shard is read: six of the first job's leave room for the other's."""
LOSS_AT = 0.4
LOOK_S = 0.5


class Race:
    """Jobs that run at the same time, and how far each is."""

    def __init__(self, scene: Scene, jobs: list[Job], num_parts: int) -> None:
        self.scene, self.jobs, self.num_parts = scene, jobs, num_parts
        self.start = time.monotonic()
        self.ended: dict[int, float] = {}
        self.engines: Counter[str] = Counter()
        self.lost_node = False

    def run(self, late_s: float) -> None:
        """Start them, the second one later, and wait for both."""
        self.jobs[0].start()
        while len(self.ended) < len(self.jobs):
            if self.jobs[1].driver is None and self.now() >= late_s:
                self.jobs[1].start()
            self.look()
            self.scene.cluster.mend()
            time.sleep(LOOK_S)
        for job in self.jobs:
            job.end()

    def now(self) -> float:
        return round(time.monotonic() - self.start, 1)

    def look(self) -> None:
        parts = [job.output.look() for job in self.jobs]
        for number, job in enumerate(self.jobs):
            if job.driver is not None and job.driver.poll() is not None and number not in self.ended:
                self.ended[number] = self.now()
                tell(seconds=self.now(), job=number, ended=job.driver.returncode, parts=parts)
        engines = Counter(ray_job_of(process) for _, process in find_workers(self.scene.cluster, ACTOR))
        if engines != self.engines:
            tell(seconds=self.now(), engines=engines, parts=parts)
            self.engines = engines
        if not self.lost_node and min(parts) >= LOSS_AT * self.num_parts:
            self.lost_node = True
            self.scene.cluster.remove(self.scene.cluster.nodes[0])
            tell(seconds=self.now(), lost="a node", added=self.scene.cluster.add_node().address)


def ray_job_of(process: psutil.Process) -> str:
    """Ray's id of the driver that a worker works for."""
    try:
        return Path(os.readlink(f"/proc/{process.pid}/fd/1")).name.split("-")[2]  # worker-ID-JOB-PID.out
    except (OSError, IndexError):
        return "?"


def judge(job: Job, num_rows: int) -> dict[str, Any]:
    """What a job came to."""
    engines, chunks = job.count_losses()
    judged = job.output.judge(num_rows)
    return judged | {"finished": job.output.is_finished(), "engines_lost": engines, "chunks_redone": chunks}


def is_right(judged: dict[str, Any]) -> bool:
    """Whether every row is there, once and answered."""
    return judged["finished"] and not any(judged[name] for name in WRONG)


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--chunk-rows", type=int, default=50)
    parser.add_argument("--replicas", type=int, default=NUM_NODES // 2, help="each job's engines at most")
    parser.add_argument("--late", type=float, default=0.0, help="seconds between the two jobs' starts")
    parser.add_argument("--gpus", type=int, default=1, help="of each node")
    parser.add_argument("--what", choices=["jobs", "drivers", "both"], default="both")
    options = parser.parse_args()
    num_parts = -(-options.rows // options.chunk_rows)
    with running_scene(
        "benchmarks.two_jobs", NUM_NODES, options.rows, CPUS, options.gpus, -(-options.rows // NUM_SHARDS)
    ) as scene:
        spec = scene.make_spec("simulated", options.chunk_rows, options.replicas, seconds_per_token=0.05)
        spec["engine"]["replicas"]["min"] = min(options.replicas, NUM_NODES // 2)
        spec["limits"] = {"yield_after_s": 10, "stall_timeout_s": 50}
        judged = []
        if options.what != "drivers":
            jobs = [Job.make(scene, f"job-{number}", spec) for number in range(2)]
            Race(scene, jobs, num_parts).run(options.late)
            judged += [judge(job, options.rows) for job in jobs]
        if options.what != "jobs":
            one = Job.make(scene, "drivers", spec)
            other = Job(one.folder, one.path, one.output, drivers=1)
            Race(scene, [one, other], num_parts).run(0)
            judged.append(judge(one, options.rows))
    for came_to in judged:
        tell(**came_to)
    sys.exit(0 if all(map(is_right, judged)) else 1)


if __name__ == "__main__":
    main()
