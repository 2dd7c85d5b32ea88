"""What the cluster benchmarks share: nodes in network namespaces, an S3 store behind a proxy, small images, jobs."""

import contextlib
import io
import json
import os
import re
import secrets
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from benchmarks.cluster_output import WatchedOutput
from benchmarks.raylets import HEAD, Raylets, inside_own_network, kill_family, running_raylets
from tests.builders import image_table
from tests.running import R4B, real_spec, simulated_spec, write_spec
from tests.s3_server import S3Server, credentials_in_environment, running_s3
from tests.store_proxy import StoreProxy, running_proxy

ACTOR, ENGINE, READER, WRITER = "EngineActor", "EngineCore", "read_batches", "commit_batch"
"""Words in the titles of the processes."""
LOSSES = re.compile(r"(\d+) engines were lost and replaced.*; (\d+) chunks were generated again")


@dataclass(frozen=True)
class Scene:
    """Where jobs run."""

    cluster: Raylets
    store: S3Server
    proxy: StoreProxy
    folder: Path
    input_url: str
    num_rows: int

    def make_spec(self, engine: str, chunk_rows: int, max_replicas: int, **simulation: Any) -> dict[str, Any]:
        """A job with a GPU for each engine, over all rows; `output.url` is missing."""
        spec = real_spec(self.folder) if engine == "vllm" else simulated_spec(self.folder, simulation=simulation)
        spec["engine"] = spec["engine"] | {"num_gpus": 1, "replicas": {"min": 1, "max": max_replicas}}
        spec["prompts"] = [{"id": "p", "template": "What is in the picture?"}]
        spec["storage"] = {"endpoint_url": self.proxy.url, "region": "us-east-1"}
        return spec | {"input": {"url": self.input_url}, "output": {"chunk_rows": chunk_rows}}


@dataclass
class Job:
    """A spec on disk, its output, and its drivers, one after another."""

    folder: Path
    path: str
    output: WatchedOutput
    drivers: int = 0
    driver: "subprocess.Popen[bytes] | None" = None

    @classmethod
    def make(cls, scene: Scene, name: str, spec: dict[str, Any], num_parts: int | None = None) -> "Job":
        """Give it an output and a folder of its own."""
        output = WatchedOutput(scene.store, scene.store.fresh_prefix(name), num_parts)
        folder = scene.folder / name
        folder.mkdir()
        return cls(folder, write_spec(folder, spec | {"output": {**spec["output"], "url": output.url}}), output)

    def start(self) -> "subprocess.Popen[bytes]":
        """One more driver."""
        self.drivers += 1
        command = [R4B, "run", self.path, "--json"]
        with self.log.open("w") as log:
            self.driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True)
        return self.driver

    @property
    def log(self) -> Path:
        """Of the last driver."""
        return self.folder / f"driver-{self.drivers}.log"

    def count_losses(self) -> tuple[int, int]:
        """What the last driver told: engines lost, chunks generated again."""
        told = LOSSES.findall(self.log.read_text())
        return sum(int(engines) for engines, _ in told), sum(int(chunks) for _, chunks in told)

    def end(self) -> None:
        """Kill what is left of the driver."""
        if self.driver is not None:
            kill_family(self.driver)


@contextlib.contextmanager
def running_scene(
    module: str,
    num_nodes: int,
    num_rows: int,
    num_cpus: float = 2,
    num_gpus: float = 1,
    rows_per_shard: int = 500,
    **proxy: Any,
) -> Iterator[Scene]:
    """A cluster with a head and so many nodes, and shards of so many rows in a store that the nodes reach."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    inside_own_network(module)
    with (
        tempfile.TemporaryDirectory(prefix="scene-", ignore_cleanup_errors=True) as folder,
        running_s3() as store,
        credentials_in_environment(store),
        running_proxy(store.endpoint_url, host=HEAD, **proxy) as front,
        running_raylets(num_nodes, num_cpus, num_gpus) as cluster,
    ):
        input_url = store.fresh_prefix("in") + "/"
        put_shards(store, input_url, num_rows, rows_per_shard)
        yield Scene(cluster, store, front, Path(folder), input_url, num_rows)


def put_shards(store: S3Server, url: str, num_rows: int, rows_per_shard: int) -> None:
    """Shards of small images."""
    for first in range(0, num_rows, rows_per_shard):
        buffer = io.BytesIO()
        pq.write_table(image_table(min(rows_per_shard, num_rows - first), first), buffer, row_group_size=100)
        store.put(f"{url}{first:07d}.parquet", buffer.getvalue())


def find_workers(cluster: Raylets, title: str, at_least_s: float = 0.0) -> Iterator[tuple[str, psutil.Process]]:
    """Node addresses and processes with this word in their titles, which have worked for as long."""
    for node in cluster.nodes:
        for process in node.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                line = " ".join(process.cmdline())
                is_worker = line.startswith("ray::") or "VLLM::" in line
                if title in line and is_worker and process.cpu_times().user >= at_least_s:
                    yield node.address, process


def tell(**figures: Any) -> None:
    """A line of JSON."""
    print(json.dumps(figures), flush=True)
