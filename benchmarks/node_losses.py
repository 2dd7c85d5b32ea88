"""A job that spreads over three nodes, of which it loses two in mid-run and then gets one: what is done again.

    python -m benchmarks.node_losses
    python -m benchmarks.node_losses --notice-s 60 --rows 10000

Nodes in network namespaces (root), the simulated engine. Prints lines of JSON: which nodes had engines and readers,
what happened when, and the output compared with the plan. With `--notice-s` the nodes crash so many seconds after they
were drained, as spot machines do. Exit code 1 if a row is missing, there twice, or an error, or, of nodes that had
notice, if a chunk was generated again.
"""

import argparse
import sys
import time
from collections import Counter

from benchmarks.cluster_output import WRONG
from benchmarks.cluster_scene import ACTOR, READER, Job, Scene, find_workers, running_scene, tell
from benchmarks.raylets import Node

NUM_NODES = 3
LOOK_S = 0.5


def watch(scene: Scene, job: Job, num_parts: int, notice_s: float) -> int:
    """Take two nodes away and add one, each at its time; gives how many of these steps were left."""
    steps = [(0.3, "remove"), (0.5, "remove"), (0.65, "add")]
    going: list[tuple[float, Node]] = []
    driver, start = job.start(), time.monotonic()
    while driver.poll() is None:
        done = job.output.look()
        while steps and done >= steps[0][0] * num_parts:
            _, step = steps.pop(0)
            engines = Counter(address for address, _ in find_workers(scene.cluster, ACTOR))
            readers = Counter(address for address, _ in find_workers(scene.cluster, READER))
            node = scene.cluster.add_node() if step == "add" else scene.cluster.nodes[len(going)]
            if step == "remove":
                going.append((time.monotonic() + notice_s, node))
                if notice_s:
                    node.drain(notice_s)
            seconds = round(time.monotonic() - start, 1)
            tell(seconds=seconds, parts=done, engines=engines, readers=readers, then=f"{step} {node.address}")
        for one in [one for one in going if one[0] <= time.monotonic() or one[1].ray.poll() is not None]:
            going.remove(one)
            scene.cluster.remove(one[1])
        scene.cluster.mend()
        time.sleep(LOOK_S)
    tell(seconds=round(time.monotonic() - start, 1), ended=driver.returncode, steps_left=len(steps))
    return len(steps)


def main() -> None:
    """Run it once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--chunk-rows", type=int, default=50)
    parser.add_argument("--notice-s", type=float, default=0.0)
    options = parser.parse_args()
    num_parts = -(-options.rows // options.chunk_rows)
    with running_scene("benchmarks.node_losses", NUM_NODES, options.rows) as scene:
        job = Job.make(scene, "losses", scene.make_spec("simulated", options.chunk_rows, 4, seconds_per_token=0.05))
        steps_left = watch(scene, job, num_parts, options.notice_s)
        judged = job.output.judge(options.rows)
        engines, chunks = job.count_losses()
        finished = job.output.is_finished()
        tell(**judged, engines_lost=engines, chunks_redone=chunks)
        tell(chunks=num_parts, drivers=job.drivers, finished=finished)
        job.end()
    wrong = steps_left or any(judged[name] for name in WRONG) or (options.notice_s and chunks)
    sys.exit(0 if finished and not wrong else 1)


if __name__ == "__main__":
    main()
