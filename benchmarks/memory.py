"""How much memory `r4b run` takes over one large shard, by kind of process, with the simulated engine.

Writes a shard of photo-like JPEGs (smooth shapes and some noise), runs a job on it and looks at every process that the
job has, four times a second. A Parquet shard is one single row group, the worst there is. Resident memory is RSS: what
a process shares with others (Ray's object store) counts for each. The engine's own is none: it is simulated.
"""

import argparse
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

NUM_DIFFERENT = 64
MIB = 1 << 20


def draw_photo(seed: int, size: tuple[int, int]) -> bytes:
    """A JPEG that is about as hard to compress as a photo."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth, np.int16) + rng.normal(0, 12, (size[1], size[0], 3)).astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def photos(size: tuple[int, int], num_bytes: int) -> Iterator[bytes]:
    """Photos of so many bytes together, some different ones in turn."""
    different = [draw_photo(seed, size) for seed in range(NUM_DIFFERENT)]
    written = number = 0
    while written < num_bytes:
        photo = different[number % NUM_DIFFERENT]
        written += len(photo)
        number += 1
        yield photo


def write_tar(path: Path, size: tuple[int, int], num_bytes: int) -> int:
    number = 0
    with tarfile.open(path, "w") as archive:
        for number, photo in enumerate(photos(size, num_bytes), 1):
            info = tarfile.TarInfo(f"{number:08d}.jpg")
            info.size = len(photo)
            archive.addfile(info, io.BytesIO(photo))
    return number


def write_parquet(path: Path, size: tuple[int, int], num_bytes: int) -> int:
    """One row group of all photos; the table repeats one array, and so takes no memory to speak of."""
    some = pa.array([draw_photo(seed, size) for seed in range(NUM_DIFFERENT)], pa.binary())
    table = pa.table({"image": pa.chunked_array([some] * max(1, round(num_bytes / some.nbytes)))})
    pq.write_table(
        table, path, row_group_size=1 << 30, use_dictionary=False, compression="none", write_statistics=False
    )
    return int(table.num_rows)


@dataclass
class MemoryMeter:
    """Peaks of RSS, and of what no other process shares (USS), by kind of process."""

    pid: int
    resident: dict[str, int] = field(default_factory=dict)
    unshared: dict[str, int] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        while not self.done.wait(0.25):
            try:
                root = psutil.Process(self.pid)
                family = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in family:
                try:
                    kind, memory = kind_of(process, self.pid), process.memory_full_info()
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
                self.resident[kind] = max(self.resident.get(kind, 0), memory.rss)
                self.unshared[kind] = max(self.unshared.get(kind, 0), memory.uss)


def kind_of(process: psutil.Process, root: int) -> str:
    title = " ".join(process.cmdline()) or process.name()
    if process.pid == root:
        return "driver"
    if "EngineActor" in title:
        return "engine actor"
    if "pipeline.sandbox" in title:
        return "sandbox"
    return "read and commit workers" if title.startswith("ray::") or "default_worker" in title else "Ray services"


def run_job(folder: Path, chunk_rows: int) -> MemoryMeter:
    """The job over the shard in `folder/in`."""
    spec = {
        "name": "memory",
        "input": {"url": str(folder / "in")},
        "prompts": [{"template": "Describe this image."}],
        "engine": {"kind": "simulated", "num_gpus": 0},
        "output": {"url": str(folder / "out"), "chunk_rows": chunk_rows},
    }
    return run_metered(folder, spec)


def run_metered(folder: Path, spec: dict[str, Any]) -> MemoryMeter:
    """Run a job to its end, its memory metered; its progress goes to the terminal."""
    (folder / "job.yaml").write_text(yaml.safe_dump(spec))
    command = [str(Path(sys.executable).parent / "r4b"), "run", str(folder / "job.yaml")]
    process = subprocess.Popen(command)
    meter = MemoryMeter(process.pid)
    thread = threading.Thread(target=meter.watch)
    thread.start()
    process.wait()
    meter.done.set()
    thread.join()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}.")
    return meter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=["tar", "parquet"], default="tar")
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--size", default="1280x960", help="Of each photo, in pixels.")
    parser.add_argument("--chunk-rows", type=int, default=256)
    parser.add_argument("--folder", help="Where to write; a temporary folder by default.")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    folder = Path(args.folder or tempfile.mkdtemp())
    try:
        (folder / "in").mkdir(parents=True, exist_ok=True)
        write = write_tar if args.format == "tar" else write_parquet
        shard = folder / "in" / f"photos.{args.format}"
        rows = write(shard, (width, height), int(args.gigabytes * 1e9))
        groups = f", {pq.read_metadata(shard).num_row_groups} row group" if args.format == "parquet" else ""
        print(f"{shard.name}: {rows} photos of {args.size}, {shard.stat().st_size / 1e9:.2f} GB{groups}", flush=True)
        meter = run_job(folder, args.chunk_rows)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for kind in sorted(meter.resident):
        resident, unshared = meter.resident[kind] / MIB, meter.unshared[kind] / MIB
        print(f"{kind:<24} {resident:6.0f} MiB resident at most, {unshared:6.0f} MiB of it unshared")


if __name__ == "__main__":
    main()
