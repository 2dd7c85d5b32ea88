"""A job on a cluster that starts with no GPU: nodes come as they are asked for, and go when they are idle.

    python -m benchmarks.cluster_growth --nodes 4

Ray's autoscaler with its fake provider, whose nodes are processes on this host; the simulated engine. Prints a line
whenever something changed, then how long it took from the first free GPU to its first row, and back to no node.
Needs root (a network namespace).
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
import yaml

from benchmarks.raylets import HEAD, PORT, Raylets, inside_own_network, kill_family, wait_for_head
from tests.builders import image_table, write_shard
from tests.running import R4B, kill_tree, simulated_spec, write_spec

HEAD_ID = "f" * 51 + "00000"
IDLE_MINUTES = 0.3
TELL_S = 10.0


def cluster_config(num_nodes: int) -> dict[str, Any]:
    """A head that runs no work, and GPU nodes from none to `num_nodes`."""
    empty_lists = (
        "cluster_synced_files rsync_exclude rsync_filter initialization_commands setup_commands head_setup_commands "
        "worker_setup_commands head_start_ray_commands worker_start_ray_commands"
    )
    worker = {"resources": {"CPU": 2, "GPU": 1, "object_store_memory": 200_000_000}, "node_config": {}}
    return {
        "cluster_name": "fake",
        "max_workers": num_nodes,
        "provider": {
            "type": "fake_multinode",
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "gcs_address": f"{HEAD}:{PORT}",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu_worker": worker | {"min_workers": 0, "max_workers": num_nodes},
        },
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": IDLE_MINUTES,
        "upscaling_speed": 100,
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "auth": {"ssh_user": "nobody"},
        "docker": {},
    } | {name: [] for name in empty_lists.split()}


class Timeline:
    """What there is, looked at again and again; prints what changed, and how fast rows came since it last printed."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.start = time.monotonic()
        self.last: tuple[int, ...] = ()
        self.told_at, self.told_rows = 0.0, 0
        self.first: dict[str, float] = {}
        self.parts: dict[str, int] = {}

    def look(self) -> tuple[int, int]:
        """GPU nodes and engines now."""
        now = time.monotonic() - self.start
        gpus = sum(int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"])
        free = int(ray.available_resources().get("GPU", 0)) if gpus else 0
        for path in self.out.glob("data/*.parquet"):
            if path.name not in self.parts:
                self.parts[path.name] = pq.read_metadata(path).num_rows
        rows = sum(self.parts.values())
        for name, seen in (("first GPU", gpus), ("first row", rows), ("all GPUs in use", gpus and not free)):
            if seen and name not in self.first:
                self.first[name] = round(now, 1)
        if (gpus, gpus - free) != self.last or now - self.told_at >= TELL_S:
            rate = (rows - self.told_rows) / (now - self.told_at) if now > self.told_at else 0.0
            print(f"{now:6.1f} s  GPU nodes {gpus}, engines {gpus - free}, rows {rows}, rows/s {rate:.1f}", flush=True)
            self.last, self.told_at, self.told_rows = (gpus, gpus - free), now, rows
        return gpus, gpus - free


def main() -> None:
    """Run one job, and wait until its nodes are gone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--rows", type=int, default=5000)
    options = parser.parse_args()
    os.environ |= {"RAY_FAKE_CLUSTER": "1", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    inside_own_network("benchmarks.cluster_growth")
    folder = Path(tempfile.mkdtemp(prefix="growth-"))
    for first in range(0, options.rows, 500):
        write_shard(folder / "in" / f"{first:06d}.parquet", image_table(500, first), 100)
    engine = {"num_gpus": 1, "replicas": {"min": 1, "max": options.nodes}, "simulation": {"seconds_per_token": 0.05}}
    spec = simulated_spec(folder, **engine) | {"output": {"url": str(folder / "out"), "chunk_rows": 32}}
    spec["prompts"] = [{"id": "p", "template": "What is in the picture?"}]
    path = write_spec(folder, spec)
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster_config(options.nodes)))
    head = Raylets(folder).start_head(f"--autoscaling-config={folder / 'cluster.yaml'}")
    os.environ["RAY_ADDRESS"] = f"{HEAD}:{PORT}"
    driver = None
    try:
        wait_for_head()
        del os.environ["RAY_OVERRIDE_NODE_ID_FOR_TESTING"]
        ray.init(log_to_driver=False)
        timeline = Timeline(folder / "out")
        with (folder / "driver.log").open("w") as log:
            driver = subprocess.Popen([R4B, "run", path], stdout=log, stderr=log, start_new_session=True)
            while driver.poll() is None:
                timeline.look()
                time.sleep(0.25)
        ended = time.monotonic() - timeline.start
        print(f"{ended:6.1f} s  the job ended with {driver.returncode}", flush=True)
        while (num_nodes := timeline.look()[0]) and time.monotonic() - timeline.start < ended + 180:
            time.sleep(0.25)
        gone = round(time.monotonic() - timeline.start - ended, 1)
        rows = sum(timeline.parts.values())
        print(json.dumps({**timeline.first, "rows": rows, "job": round(ended, 1), "nodes gone after": gone}))
        is_right = driver.returncode == 0 and rows == options.rows and not num_nodes
    finally:
        if driver is not None:
            kill_tree(driver.pid)
        ray.shutdown()
        kill_family(head)
        subprocess.run(["rm", "-rf", str(folder)], check=False)
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
