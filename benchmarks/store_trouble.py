"""A job on a store that breaks one request in five all the time, and one on a store that refuses all for a while.

    python -m benchmarks.store_trouble

SeaweedFS on loopback behind a proxy; 500, 503 SlowDown, resets (half of them after the store has done what was asked),
stalls of ten seconds, bodies cut in half on their way out and in. Prints for each job what was broken, what came out,
and the requests that arrived in each ten seconds. Exit code 1 if an output is not right, if the first job did not meet
every kind of trouble, reading and writing, or if the store that refuses is asked more than five times a second.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.cluster_output import WRONG, WatchedOutput
from benchmarks.cluster_scene import put_shards, tell
from tests.running import r4b, simulated_spec, write_spec
from tests.s3_server import S3Server, credentials_in_environment, running_s3
from tests.store_proxy import KINDS, StoreProxy, running_proxy

SHARE = 0.2
STEP_S = 10
CHUNK_ROWS = 50
MAX_RATE = 5.0
"""Requests per second to a store that refuses all, once a job has noticed."""
NOTICED_S = 5
TIMEOUT_S = 1200


def run_job(store: S3Server, proxy: StoreProxy, input_url: str, num_rows: int, during: Any = None) -> bool:
    """One job to its end, and whether its output is right; `during` runs beside it and is given the output."""
    output = WatchedOutput(store, store.fresh_prefix("out"))
    with tempfile.TemporaryDirectory() as folder:
        spec = simulated_spec(Path(folder), simulation={"seconds_per_token": 0.02})
        spec["prompts"] = [{"id": "p", "template": "What is in the picture?"}]
        spec["storage"] = {"endpoint_url": proxy.url, "region": "us-east-1"}
        spec |= {"input": {"url": input_url}, "output": {"url": output.url, "chunk_rows": CHUNK_ROWS}}
        path, start = write_spec(Path(folder), spec), int(time.monotonic() - proxy.started)
        proxy.broken.clear()
        if during is not None:
            threading.Thread(target=during, args=(output,), daemon=True).start()
        finished = r4b("run", path, "--json", timeout=TIMEOUT_S)
    steps: Counter[int] = Counter()
    for second, number in proxy.arrived.items():
        if second >= start:
            steps[(second - start) // STEP_S] += number
    per_second = [round(steps[step] / STEP_S, 1) for step in range(max(steps) + 1)]
    judged = output.judge(num_rows)
    broken = {"broken": dict(proxy.broken), "broken_writes": proxy.broken_writes}
    tell(ended=finished.code, **judged, **broken, requests_per_s=per_second)
    if finished.code:
        print(finished.stderr, file=sys.stderr)
    return finished.code == 0 and output.is_finished() and not any(judged[name] for name in WRONG)


def break_a_share(store: S3Server, proxy: StoreProxy, input_url: str, num_rows: int) -> bool:
    """One request in five is broken, in every way."""
    proxy.rate = SHARE
    right = run_job(store, proxy, input_url, num_rows)
    proxy.rate = 0.0
    return right and set(proxy.broken) == set(KINDS) and proxy.broken_writes > 0


def refuse_all(store: S3Server, proxy: StoreProxy, input_url: str, num_rows: int, seconds: float) -> bool:
    """From the first part on, every request is refused for a while."""
    begun: list[float] = []

    def refuse(output: WatchedOutput) -> None:
        while not output.look():
            time.sleep(0.2)
        begun.append(time.monotonic() - proxy.started)
        proxy.kinds, proxy.rate = ("503",), 1.0
        time.sleep(seconds)
        proxy.rate = 0.0

    right = run_job(store, proxy, input_url, num_rows, refuse)
    if not begun:  # it made no part in all its time
        return False
    window = range(int(begun[0]) + NOTICED_S, int(begun[0] + seconds))
    rate = sum(proxy.arrived[second] for second in window) / len(window)
    tell(refused_for_s=seconds, requests_per_s_meanwhile=round(rate, 2))
    return right and rate < MAX_RATE


def main() -> None:
    """Both jobs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--refused-s", type=float, default=60.0)
    options = parser.parse_args()
    with (
        running_s3() as store,
        credentials_in_environment(store),
        running_proxy(store.endpoint_url, seed=1, kinds=KINDS, stall_s=10) as proxy,
    ):
        input_url = store.fresh_prefix("in") + "/"
        put_shards(store, input_url, options.rows, 500)
        right = break_a_share(store, proxy, input_url, options.rows)
        right &= refuse_all(store, proxy, input_url, options.rows, options.refused_s)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
