"""How long `r4b plan` takes, and how much memory, over a bucket of very many small objects (SeaweedFS on loopback)."""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from tests.s3_server import credentials_in_environment, running_s3

UPLOADS_AT_ONCE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=200_000)
    args = parser.parse_args()
    with (
        running_s3() as server,
        credentials_in_environment(server),
        tempfile.TemporaryDirectory() as folder,
    ):
        prefix = server.fresh_prefix("plan-size")
        start = time.monotonic()
        with ThreadPoolExecutor(UPLOADS_AT_ONCE) as pool:
            names = (f"{prefix}/in/{n // 1000:04d}/image-{n:08d}.png" for n in range(args.objects))
            for _ in pool.map(lambda name: server.put(name, b"x"), names):
                pass
        print(f"{args.objects} objects put in {time.monotonic() - start:.0f} s", flush=True)
        spec = {
            "input": {"url": f"{prefix}/in/"},
            "prompts": [{"template": "Describe this image."}],
            "engine": {"kind": "simulated", "num_gpus": 0},
            "output": {"url": f"{prefix}/out"},
            "storage": {"endpoint_url": server.endpoint_url},
        }
        path = Path(folder) / "job.yaml"
        path.write_text(yaml.safe_dump(spec))
        start = time.monotonic()
        subprocess.run([str(Path(sys.executable).parent / "r4b"), "plan", str(path)], check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"planned in {time.monotonic() - start:.1f} s; no process this waited for had more than {peak:.0f} MiB")


if __name__ == "__main__":
    main()
