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
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos_faults import FAULTS, Faults
from benchmarks.cluster_scene import Job, Scene, running_scene, tell

NUM_NODES = 3
MAX_DRIVERS = 15
MAX_SECONDS = {"simulated": 600.0, "vllm": 1500.0}
STALL_S = {"simulated": 5.0, "vllm": 60.0}
STORE_STALL_S = 3.0
LOOK_S = 0.5


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


def run_once(scene: Scene, seed: int, spec: dict[str, Any], max_seconds: float, calm: bool = False) -> Outcome:
    """One job from its start to its end; a calm one has no faults."""
    rng = random.Random(seed)
    num_parts = -(-scene.num_rows // spec["output"]["chunk_rows"])
    due = sorted((rng.randrange(1, num_parts), rng.choice(FAULTS)) for _ in range(0 if calm else rng.randint(2, 5)))
    job = Job.make(scene, f"job-{seed}", spec)
    faults = Faults(scene.cluster, scene.proxy, rng)
    outcome = Outcome(seed)
    start = time.monotonic()
    while not outcome.finished and job.drivers < MAX_DRIVERS and time.monotonic() - start < max_seconds:
        drive(job, start + max_seconds, faults, due, outcome)
    faults.end()
    while len(scene.cluster.nodes) > NUM_NODES:
        scene.cluster.remove(scene.cluster.nodes[0])
    job.output.look()
    outcome.seconds = round(time.monotonic() - start, 1)
    outcome.drivers = job.drivers
    outcome.missed = [fault for _, fault in due]
    outcome.half_written = len(job.output.half_written)
    outcome.finished = outcome.finished and job.output.is_finished()
    for name, value in job.output.judge(scene.num_rows).items():
        setattr(outcome, name, value)
    return outcome


def drive(job: Job, deadline: float, faults: Faults, due: list[tuple[int, str]], outcome: Outcome) -> None:
    """One driver to its end, while the faults strike that are due."""
    faults.driver = job.start()
    while faults.driver.poll() is None and time.monotonic() < deadline:
        num_parts = job.output.look()
        while due and num_parts >= due[0][0]:
            outcome.faults.append(f"{num_parts}:{faults.strike(due.pop(0)[1])}")
        faults.cluster.mend()
        time.sleep(LOOK_S)
    job.end()
    outcome.finished = faults.driver.returncode == 0
    engines, chunks = job.count_losses()
    outcome.redone_chunks += chunks
    outcome.engine_deaths += engines


def main() -> None:
    """Run all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next has the next")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--chunk-rows", type=int, default=100)
    parser.add_argument("--engine", choices=["simulated", "vllm"], default="simulated")
    parser.add_argument("--logs", type=Path, help="a folder to keep the drivers' logs in")
    options = parser.parse_args()
    outcomes = []
    with running_scene("benchmarks.chaos", NUM_NODES, options.rows, stall_s=STORE_STALL_S) as scene:
        spec = scene.make_spec(options.engine, options.chunk_rows, NUM_NODES, seconds_per_token=0.01)
        spec["limits"] = {"stall_timeout_s": STALL_S[options.engine], "preemption_grace_s": 3}
        max_seconds = MAX_SECONDS[options.engine]
        calm = run_once(scene, 0, spec, max_seconds, calm=True)
        tell(**asdict(calm))
        answers = calm.answers if options.engine == "simulated" else None
        for seed in range(options.seed, options.seed + options.runs):
            outcome = run_once(scene, seed, spec, max_seconds)
            tell(**asdict(outcome), right=outcome.is_right(answers))
            outcomes.append(outcome)
            if options.logs is not None:
                shutil.copytree(scene.folder / f"job-{seed}", options.logs / f"job-{seed}")
    wrong = [outcome.seed for outcome in outcomes if not outcome.is_right(answers)]
    names = ("lost", "twice", "errors", "half_written", "redone_chunks", "engine_deaths", "drivers")
    tell(runs=len(outcomes), wrong=wrong, **{name: sum(getattr(one, name) for one in outcomes) for name in names})
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
