"""`r4b run` for `batch_overhead`: the same call as the command's, with the moments that the benchmark needs.

    python -m benchmarks.timed_run JOB.yaml

Prints one JSON line: when the first engine was ready, when the last chunk was committed, how many rows.
"""

import json
import sys
import time

from jobs.spec_file import load_spec
from pipeline.batch import run_batch
from pipeline.records import ChunkReport


def main() -> None:
    ready: list[float] = []

    def on_commit(report: ChunkReport) -> None:
        if report.engine_ready_at is not None:
            ready.append(report.engine_ready_at)

    manifest = run_batch(load_spec(sys.argv[1]), on_commit=on_commit)
    print(json.dumps({"ready_at": min(ready), "done_at": time.time(), "rows": manifest.num_rows}))


if __name__ == "__main__":
    main()
