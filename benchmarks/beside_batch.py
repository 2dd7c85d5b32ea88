"""People's requests with and without a batch job of 2,000 rows through the same deployment.

    python -m benchmarks.beside_batch --rows 2000

Two clients ask for a minute, then go on while the job runs (`engine.pool: serve`), then ask for another minute. Prints
the median time to the first token of each part, and whether the rows of the job are all there once.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb
import yaml

from benchmarks.load import Asked, Load, describe, outcomes, ttft_ms
from benchmarks.online_overhead import question_body
from jobs.demo import CHECKPOINT
from tests.running import R4B, write_scene_shards
from tests.serving import KEY, serving, small_settings

CLIENTS, PAUSE_S = 2, 0.2


def job(folder: Path) -> dict[str, Any]:
    """Questions about scenes, sent to the deployment."""
    return {
        "name": "beside-people",
        "input": {"url": str(folder / "input")},
        "prompts": [{"id": "question", "template": "{{ question }}"}],
        "sampling": {"temperature": 0.0, "max_tokens": 256},
        "engine": {"pool": "serve", "model": str(CHECKPOINT), "max_num_seqs": 32},
        "output": {"url": str(folder / "output"), "chunk_rows": 50},
    }


def run_job(folder: Path) -> float:
    """Seconds that the job took."""
    started = time.monotonic()
    run = subprocess.run([R4B, "run", str(folder / "job.yaml")], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"The job failed:\n{run.stderr[-3000:]}")
    return time.monotonic() - started


async def ask(url: str, seconds: float) -> list[Asked]:
    """The clients alone."""
    load = Load(url, KEY, question_body())
    await load.run(CLIENTS, seconds, PAUSE_S)
    return load.asked


async def ask_beside(url: str, folder: Path) -> tuple[list[Asked], float]:
    """The clients while the job runs."""
    load = Load(url, KEY, question_body())
    seconds = await load.run_while(CLIENTS, lambda: run_job(folder), PAUSE_S)
    return load.asked, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rows-beside", type=int, default=1, help="scaling.batch_rows_beside_requests")
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scene_shards(folder / "input", options.rows, 500)
        (folder / "job.yaml").write_text(yaml.safe_dump(job(folder)))
        scaling = {"batch_rows_beside_requests": options.rows_beside}
        settings = small_settings(access_log=str(folder / "access.log"), scaling=scaling)
        with serving(folder, settings) as served:
            asyncio.run(ask(served.base_url, 5))
            before = asyncio.run(ask(served.base_url, options.seconds))
            beside, seconds = asyncio.run(ask_beside(served.base_url, folder))
            after = asyncio.run(ask(served.base_url, options.seconds))
        rows, ids, errors = duckdb.sql(
            f"SELECT count(*), count(DISTINCT sample_id), count(error_type) FROM '{folder}/output/data/*.parquet'"
        ).fetchall()[0]
    for title, asked in (("before", before), ("beside the job", beside), ("after", after)):
        print(f"{title}: {outcomes(asked)}; first token, ms: {describe(ttft_ms(asked), 0)}")
    alone = statistics.median(ttft_ms(before) + ttft_ms(after))
    ratio = statistics.median(ttft_ms(beside)) / alone
    print(f"the job: {rows} rows, {ids} ids, {errors} errors, {seconds:.0f} s; medians' ratio {ratio:.2f}")
    raise SystemExit(0 if ratio <= 1.5 and rows == ids == options.rows and errors == 0 else 1)


if __name__ == "__main__":
    main()
