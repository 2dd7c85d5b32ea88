"""Jobs under seeded faults on a cluster of several nodes, resumed as an operator would, and their output checked.

    python -m benchmarks.chaos --runs 100 --seed 1                                   # the simulated engine
    python -m benchmarks.chaos --runs 10 --seed 1 --engine vllm --rows 600 --chunk-rows 20   # the small checkpoint

A seed decides which faults strike (`benchmarks.chaos_faults`), after how many parts and how they choose; which process
that is depends on the moment. `--runs 1 --seed N` has a run again. Input and output are in a real S3 store behind a
proxy that can break requests. A driver that was killed is started again with the same command, and nothing else is
ever done, but that nodes which end are replaced, as a cluster's own launcher would. A run is right if every planned row
stands in the output exactly once, answered (the simulated engine's answers as in an undisturbed run), the marks are
right, nothing seen at any time was half written, or changed or went later, and no driver failed that was not killed.
Prints a line of JSON for each run and one for all; exit code 1 if a run was not right. Needs root (network namespaces).
"""

import argparse
import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos_faults import Faults, find_faults
from benchmarks.cluster_output import WRONG
from benchmarks.cluster_scene import Job, Scene, running_scene, tell

NUM_NODES = 3
MAX_ENGINES = 5
MAX_DRIVERS = 15
MAX_SECONDS = {"simulated": 600.0, "vllm": 1500.0}
STALL_S = {"simulated": 5.0, "vllm": 60.0}
STORE_STALL_S = 3.0
LOOK_S = 0.5
FIRST_DELAY_S, DELAY_S = 15.0, 1.0
"""How much later than its part a fault may strike; before the first part, how much later than the driver's start."""


@dataclass(frozen=True)
class Due:
    """A fault that is to strike when so many parts are there and then some seconds have passed."""

    num_parts: int
    delay_s: float
    fault: str
    seed: str


@dataclass
class Outcome:
    """What a run came to."""

    seed: int
    faults: list[str] = field(default_factory=list)
    """That struck, each after how many parts, with the process or node that it struck."""
    missed: list[str] = field(default_factory=list)
    """Whose time did not come before the job's end, or that found nothing to strike."""
    broken_requests: int = 0
    drivers: int = 0
    failed: int = 0
    """Drivers that ended with an error and had not been killed."""
    seconds: float = 0.0
    finished: bool = False
    redone_chunks: int = 0
    """As the drivers told that came to their end; those that were killed told nothing."""
    engine_deaths: int = 0
    judged: dict[str, Any] = field(default_factory=dict)

    def is_right(self, answers: str | None) -> bool:
        """Whether all is as in an undisturbed run; None: its answers may have come out otherwise."""
        wrong = self.failed or any(self.judged[name] for name in WRONG)
        return self.finished and not wrong and answers in (None, self.judged["answers"])


def draw(seed: int, faults: list[str], num_parts: int) -> list[Due]:
    """What is to strike in a run. Two faults go by turns, so that a few runs have all of them."""
    rng = random.Random(seed)
    names = [faults[(2 * seed + number) % len(faults)] for number in (0, 1)]
    names += [rng.choice(faults) for _ in range(rng.randint(0, 3))]
    due = []
    for number, name in enumerate(names):
        after = rng.randint(0, num_parts)
        due.append(Due(after, rng.uniform(0, DELAY_S if after else FIRST_DELAY_S), name, f"{seed}-{number}"))
    return sorted(due, key=lambda one: (one.num_parts, one.delay_s))


def count_parts(scene: Scene, spec: dict[str, Any]) -> int:
    """Of an output; shards hold a whole number of chunks."""
    return -(-scene.num_rows // int(spec["output"]["chunk_rows"]))


def run_once(scene: Scene, seed: int, spec: dict[str, Any], max_seconds: float, due: list[Due]) -> Outcome:
    """One job from its start to its end."""
    job = Job.make(scene, f"job-{seed}", spec, count_parts(scene, spec))
    scene.proxy.rng = random.Random(seed)
    scene.proxy.broken.clear()
    faults = Faults(scene.cluster, scene.proxy, 4 * spec["limits"]["stall_timeout_s"])
    outcome = Outcome(seed)
    start = time.monotonic()
    while not outcome.finished and job.drivers < MAX_DRIVERS and time.monotonic() - start < max_seconds:
        drive(job, start + max_seconds, faults, due, outcome)
    faults.end()
    while len(scene.cluster.nodes) > NUM_NODES:
        scene.cluster.remove(scene.cluster.nodes[0])
    outcome.seconds = round(time.monotonic() - start, 1)
    outcome.drivers = job.drivers
    outcome.missed = [one.fault for one in due]
    outcome.broken_requests = sum(scene.proxy.broken.values())
    outcome.judged = job.output.judge(scene.num_rows)
    outcome.finished = outcome.finished and job.output.is_finished()
    return outcome


def drive(job: Job, deadline: float, faults: Faults, due: list[Due], outcome: Outcome) -> None:
    """One driver to its end, while the faults strike that are due."""
    faults.driver, faults.was_killed = job.start(), False
    ready: dict[Due, float] = {}
    while faults.driver.poll() is None and time.monotonic() < deadline:
        num_parts = job.output.look()
        for one in [one for one in due if num_parts >= one.num_parts]:
            at = ready.setdefault(one, time.monotonic() + one.delay_s)
            if time.monotonic() >= at and (struck := faults.strike(one.fault, one.seed)):
                outcome.faults.append(f"{num_parts}:{struck}")
                due.remove(one)
            if faults.was_killed:
                break
        faults.cluster.mend()
        time.sleep(LOOK_S)
    code = faults.driver.poll()
    job.end()
    outcome.finished = code == 0
    outcome.failed += code != 0 and not faults.was_killed
    engines, chunks = job.count_losses()
    outcome.redone_chunks += chunks
    outcome.engine_deaths += engines


def sum_up(outcomes: list[Outcome], wrong: list[int], faults: list[str]) -> dict[str, Any]:
    """All runs together."""
    struck = Counter(told.partition(":")[2].partition("(")[0] for one in outcomes for told in one.faults)
    totals = {name: sum(one.judged[name] for one in outcomes) for name in WRONG}
    names = ("broken_requests", "drivers", "failed", "redone_chunks", "engine_deaths")
    told = {name: sum(getattr(one, name) for one in outcomes) for name in names}
    return {"runs": len(outcomes), "wrong": wrong, **totals, **told, "struck": {name: struck[name] for name in faults}}


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
    faults = find_faults(options.engine)
    outcomes = []
    with running_scene("benchmarks.chaos", NUM_NODES, options.rows, stall_s=STORE_STALL_S) as scene:
        spec = scene.make_spec(options.engine, options.chunk_rows, MAX_ENGINES, seconds_per_token=0.01)
        spec["engine"]["replicas"]["min"] = NUM_NODES  # each node has work from the start
        spec["limits"] = {"stall_timeout_s": STALL_S[options.engine], "preemption_grace_s": 3}
        max_seconds = MAX_SECONDS[options.engine]
        calm = run_once(scene, 0, spec, max_seconds, [])
        tell(**asdict(calm))
        answers = calm.judged["answers"] if options.engine == "simulated" else None
        for seed in range(options.seed, options.seed + options.runs):
            outcome = run_once(scene, seed, spec, max_seconds, draw(seed, faults, count_parts(scene, spec)))
            tell(**asdict(outcome), right=outcome.is_right(answers))
            outcomes.append(outcome)
            if options.logs is not None:
                shutil.copytree(scene.folder / f"job-{seed}", options.logs / f"job-{seed}", dirs_exist_ok=True)
    wrong = [outcome.seed for outcome in outcomes if not outcome.is_right(answers)]
    tell(**sum_up(outcomes, wrong, faults))
    sys.exit(1 if wrong or not calm.is_right(None) else 0)


if __name__ == "__main__":
    main()
