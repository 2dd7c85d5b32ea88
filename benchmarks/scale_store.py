"""What a large job asks of an object store, and how long planning and listing take.

    python -m benchmarks.scale_store plan --shards 1000 --rows 10000   # r4b plan over so many shards
    python -m benchmarks.scale_store list --parts 1000000              # the listing that a resumed job begins with
    python -m benchmarks.scale_store count --shards 20 --rows 1280     # requests of a whole job, by kind

`plan` and `count` use SeaweedFS on loopback. `list` uses a server of its own that makes up its pages, for a store with
a million objects takes long to fill: it shows what the client costs, and `--page-ms` adds what a far store
takes.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.builders import image_table, make_job
from tests.running import R4B, simulated_spec, write_spec
from tests.s3_server import S3Server, credentials_in_environment, free_ports, running_s3
from tests.store_proxy import running_proxy

CHUNK_ROWS = 64
PUTS_AT_ONCE = 16
DOLLARS = {"put": 0.005 / 1000, "list": 0.005 / 1000, "get": 0.0004 / 1000, "head": 0.0004 / 1000, "delete": 0.0}
"""Amazon's price of one request, S3 Standard, us-east-1."""
MIB = 1 << 20


def shard_bytes(num_rows: int) -> bytes:
    """A shard of tiny images, which differ in nothing: planning reads footers alone."""
    table = pa.table({"id": [f"row-{n}" for n in range(num_rows)], "image": [b"image"] * num_rows})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=100)
    return buffer.getvalue()


def put_copies(store: S3Server, url: str, data: bytes, copies: int) -> None:
    """The same shard under many names."""
    with ThreadPoolExecutor(PUTS_AT_ONCE) as pool:
        list(pool.map(lambda number: store.put(f"{url}/{number:06d}.parquet", data), range(copies)))


def spec_over(folder: Path, prefix: str, endpoint_url: str) -> str:
    """A job's spec on disk."""
    spec = simulated_spec(folder, simulation={"thinking_tokens": 1, "answer_tokens": 1})
    spec["prompts"] = [{"id": "p", "template": "What is in the picture?"}]
    spec["storage"] = {"endpoint_url": endpoint_url, "region": "us-east-1"}
    spec["input"] = {"url": f"{prefix}/in/"}
    return write_spec(folder, spec | {"output": {"url": f"{prefix}/out/", "chunk_rows": CHUNK_ROWS}})


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """`r4b plan`, its time and memory, and what it asked."""
    with running_s3() as store, credentials_in_environment(store), tempfile.TemporaryDirectory() as folder:
        prefix = store.fresh_prefix("plan")
        put_copies(store, f"{prefix}/in", shard_bytes(options.rows), options.shards)
        with running_proxy(store.endpoint_url) as proxy:
            path = spec_over(Path(folder), prefix, store.endpoint_url)
            start = time.monotonic()
            subprocess.run([R4B, "plan", path], check=True, stdout=subprocess.DEVNULL)
            seconds = time.monotonic() - start
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            subprocess.run([R4B, "plan", spec_over(Path(folder), prefix, proxy.url)], check=True, stdout=sys.stderr)
            asked = dict(proxy.asked)
    return {"rows": options.shards * options.rows, "seconds": round(seconds, 1), "mib": round(peak), "asked": asked}


@contextmanager
def made_up_listing(num_parts: int, page_ms: float) -> Iterator[str]:
    """A server in a process of its own that lists so many parts."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "benchmarks.made_up_listing", str(port), str(num_parts), str(page_ms)]
    server = subprocess.Popen(command)
    try:
        time.sleep(3)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def listing(options: argparse.Namespace) -> dict[str, Any]:
    """`committed_chunks`, in this process."""
    from pipeline.commits import Output, committed_chunks

    os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    with made_up_listing(options.parts, options.page_ms) as url:
        job = make_job("s3://bucket/in/", "s3://bucket/out/", storage={"endpoint_url": url, "region": "us-east-1"})
        before, start, cpu = peak_mib(), time.monotonic(), time.process_time()
        chunks = committed_chunks(Output(job, {}))
        seconds, cpu_s = time.monotonic() - start, time.process_time() - cpu
    assert len(chunks) == options.parts
    return {"parts": len(chunks), "seconds": round(seconds, 1), "cpu_s": round(cpu_s, 1), "mib": peak_mib() - before}


def peak_mib() -> int:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def count(options: argparse.Namespace) -> dict[str, Any]:
    """A whole job, then the same one with nothing left to do: requests by kind, and the price of 10^7 such rows."""
    found = {}
    with running_s3() as store, credentials_in_environment(store), tempfile.TemporaryDirectory() as folder:
        prefix = store.fresh_prefix("count")
        for number in range(options.shards):
            buffer = io.BytesIO()
            pq.write_table(image_table(options.rows, number * options.rows), buffer, row_group_size=100)
            store.put(f"{prefix}/in/{number:06d}.parquet", buffer.getvalue())
        with running_proxy(store.endpoint_url) as proxy:
            path = spec_over(Path(folder), prefix, proxy.url)
            for name in ("run", "again"):
                proxy.asked.clear()
                subprocess.run([R4B, "run", path, "--json"], check=True, stdout=subprocess.DEVNULL)
                found[name] = dict(proxy.asked)
    rows = options.shards * options.rows
    dollars = sum(DOLLARS[kind] * number for kind, number in found["run"].items()) * 1e7 / rows
    return {"rows": rows, "chunks": rows // CHUNK_ROWS, **found, "dollars_for_10^7_rows": round(dollars, 2)}


def main() -> None:
    """One of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_subparsers(required=True)
    for name, function in (("plan", plan), ("list", listing), ("count", count)):
        one = which.add_parser(name)
        one.set_defaults(function=function)
        if name == "list":
            one.add_argument("--parts", type=int, default=1_000_000)
            one.add_argument("--page-ms", type=float, default=0.0)
        else:
            one.add_argument("--shards", type=int, default=20)
            one.add_argument("--rows", type=int, default=1280, help="of each shard")
    options = parser.parse_args()
    print(json.dumps(options.function(options)))


if __name__ == "__main__":
    main()
