"""Ten times more clients than a deployment takes requests, for a minute; then none, then a few.

    python -m benchmarks.overload --seconds 60

Prints what became of each request, how long the accepted ones took, the memory of all server processes before, in
the middle and after, and whether it answers as before when the load is gone.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.load import Asked, Load, describe, latency_s, outcomes, ttft_ms
from benchmarks.online_overhead import question_body
from tests.serving import KEY, Served, serving, small_settings

CAPACITY = 8
"""Requests that the replica takes; as many again wait in its queue at most."""
FACTOR = 10


def settings(folder: Path) -> dict[str, Any]:
    """A small capacity, so that ten times as much fits one machine."""
    made = small_settings(access_log=str(folder / "access.log"))
    made["scaling"] = {"max_ongoing_requests": CAPACITY, "retry_after_s": 1}
    return made


def memory_mib(served: Served) -> float:
    """Resident memory of the command and all that it started."""
    root = psutil.Process(served.process.pid)
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / (1 << 20)


async def press(served: Served, seconds: float) -> tuple[list[Asked], list[float]]:
    """The overload; gives its requests and the memory every few seconds."""
    load = Load(served.base_url, KEY, question_body())
    memory: list[float] = []

    async def watch() -> None:
        while not load.stopping.is_set():
            memory.append(memory_mib(served))
            await asyncio.sleep(5)

    watching = asyncio.create_task(watch())
    await load.run(FACTOR * CAPACITY, seconds)
    await watching
    return load.asked, memory


async def ask_a_few(served: Served, seconds: float) -> list[Asked]:
    """Two clients."""
    load = Load(served.base_url, KEY, question_body())
    await load.run(2, seconds)
    return load.asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, serving(Path(name), settings(Path(name))) as served:
        before = asyncio.run(ask_a_few(served, 10))
        print(f"before: {outcomes(before)}; first token, ms: {describe(ttft_ms(before), 0)}", flush=True)
        asked, memory = asyncio.run(press(served, options.seconds))
        turned_away = [one for one in asked if one.outcome in ("503", "429")]
        print(f"{FACTOR * CAPACITY} clients on {CAPACITY} places, {options.seconds:g} s: {outcomes(asked)}")
        print(f"accepted: seconds each: {describe(latency_s(asked))}; first token, ms: {describe(ttft_ms(asked), 0)}")
        print(f"turned away with Retry-After: {sum(one.has_retry_after for one in turned_away)} of {len(turned_away)}")
        print(f"memory, MiB: {', '.join(f'{value:.0f}' for value in memory)}", flush=True)
        time.sleep(2)
        after = asyncio.run(ask_a_few(served, 10))
        print(f"after: {outcomes(after)}; first token, ms: {describe(ttft_ms(after), 0)}; {memory_mib(served):.0f} MiB")
    others = set(outcomes(asked)) - {"answered", "503", "429"}
    good = not others and all(one.has_retry_after for one in turned_away) and set(outcomes(after)) == {"answered"}
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
