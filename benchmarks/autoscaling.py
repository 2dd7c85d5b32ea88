"""Replicas that follow the load, on a local cluster with three accelerators that only Ray believes in.

    python -m benchmarks.autoscaling --seconds 150

Load until there are three replicas, then none until there is one (or, with --from-zero, none). Prints a timeline of
replicas and what became of each request.
"""

import argparse
import asyncio
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.load import Load, describe, latency_s, outcomes
from benchmarks.online_overhead import question_body
from jobs.serve import deploy, local_serve
from tests.serving import KEY, free_port, small_settings

HOST = "127.0.0.1"
GPUS = 3


class Timeline:
    """Replicas by state, once a second, as Serve tells them."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.points: list[tuple[float, int, str]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        from ray import serve

        while not self._done.wait(1.0):
            application = serve.status().applications.get("r4b")
            if application is None or "R4B" not in application.deployments:
                continue
            states = {str(state): count for state, count in application.deployments["R4B"].replica_states.items()}
            text = ", ".join(f"{count} {state.lower()}" for state, count in sorted(states.items()) if count)
            if not self.points or self.points[-1][2] != text:
                self.points.append((time.monotonic() - self.started, states.get("RUNNING", 0), text))
                print(f"{self.points[-1][0]:6.0f} s  {text or 'none'}", flush=True)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.0f} s  -- {text}", flush=True)

    @property
    def running(self) -> int:
        """Replicas that answer now; -1 before the first look."""
        return self.points[-1][1] if self.points else -1

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def settings(folder: Path, min_replicas: int) -> dict[str, Any]:
    """One accelerator for each replica; few requests make it busy, so that a small machine can show it."""
    keys = folder / "keys.txt"
    keys.write_text(f"{KEY}\n")
    made = small_settings(auth={"keys_file": str(keys)}, access_log=str(folder / "access.log"))
    made["engine"]["num_gpus"] = 1
    made["scaling"] = {
        "min_replicas": min_replicas,
        "max_replicas": GPUS,
        "target_ongoing_requests": 4,
        "upscale_delay_s": 3,
        "downscale_delay_s": 15,
        "graceful_shutdown_timeout_s": 60,
    }
    return made


async def wait_for(timeline: Timeline, num_replicas: int, seconds: float) -> bool:
    """Whether there are so many replicas in time."""
    for _ in range(int(seconds)):
        if timeline.running == num_replicas:
            return True
        await asyncio.sleep(1)
    return False


async def scale(url: str, timeline: Timeline, low: int, clients: int, seconds: float) -> bool:
    """Load up, load away; whether replicas followed and every request was answered."""
    load = Load(url, KEY, question_body())
    timeline.say(f"{clients} clients")
    running = asyncio.create_task(load.run(clients, 3600))
    went_up = await wait_for(timeline, GPUS, seconds)
    await asyncio.sleep(10)
    load.stopping.set()
    timeline.say("no clients")
    went_down = await wait_for(timeline, low, seconds)
    running.cancel()
    timeline.say(f"requests: {outcomes(load.asked)}; seconds each: {describe(latency_s(load.asked))}")
    return went_up and went_down and set(outcomes(load.asked)) == {"answered"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240, help="For each way, at most.")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--from-zero", action="store_true")
    options = parser.parse_args()
    low, port = (0 if options.from_zero else 1), free_port()
    with tempfile.TemporaryDirectory() as folder, local_serve(HOST, port, num_gpus=GPUS, num_cpus=2 * GPUS):
        deploy(settings(Path(folder), low), HOST, port)
        timeline = Timeline()
        try:
            if options.from_zero:
                timeline.say("waiting for none")
                asyncio.run(wait_for(timeline, 0, options.seconds))
            good = asyncio.run(scale(f"http://{HOST}:{port}", timeline, low, options.clients, options.seconds))
        finally:
            timeline.stop()
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
