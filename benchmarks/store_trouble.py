"""A job on a store that breaks one request in five all the time, and one on a store that refuses all for a while.

    python -m benchmarks.store_trouble

SeaweedFS on loopback behind a proxy; 500, 503 SlowDown, resets (half of them after the store has done what was asked),
stalls of ten seconds, bodies cut in half. Prints for each job what was broken, what came out, and the requests that
arrived in each ten seconds. Exit code 1 if a row is missing, there twice, or an error.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.cluster_output import WatchedOutput
from benchmarks.cluster_scene import put_shards, tell
from tests.running import R4B, simulated_spec, write_spec
from tests.s3_server import S3Server, credentials_in_environment, running_s3
from tests.store_proxy import KINDS, StoreProxy, running_proxy

SHARE = 0.2
STEP_S = 10
CHUNK_ROWS = 50


def run_job(store: S3Server, proxy: StoreProxy, input_url: str, num_rows: int, during: Any = None) -> bool:
    """One job to its end; `during` runs beside it and is given its output."""
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
        finished = subprocess.run([R4B, "run", path, "--json"], capture_output=True, text=True, check=False)
    steps: Counter[int] = Counter()
    for second, number in proxy.arrived.items():
        if second >= start:
            steps[(second - start) // STEP_S] += number
    per_second = [round(steps[step] / STEP_S, 1) for step in range(max(steps) + 1)]
    judged = output.judge(num_rows)
    tell(ended=finished.returncode, **judged, broken=dict(proxy.broken), requests_per_s=per_second)
    if finished.returncode:
        print(finished.stderr, file=sys.stderr)
    return not (finished.returncode or judged["lost"] or judged["twice"] or judged["errors"])


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
        proxy.rate = SHARE
        right = run_job(store, proxy, input_url, options.rows)

        def refuse(output: WatchedOutput) -> None:
            while not output.look():
                time.sleep(0.2)
            proxy.kinds, proxy.rate = ("503",), 1.0
            time.sleep(options.refused_s)
            proxy.rate = 0.0

        proxy.rate = 0.0
        right = run_job(store, proxy, input_url, options.rows, refuse) and right
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
