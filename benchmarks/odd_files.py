"""Every file of a folder, whatever it is, through a job: a row for each, and a table of what became of them.

Meant for corpora of odd and broken images, such as those that image libraries test themselves with. First each file is
decoded alone in the sandbox, to find the slowest; then all go through `r4b run` with the small checkpoint on vLLM, by a
JSONL manifest that names them.
"""

import argparse
import contextlib
import json
import tempfile
import time
from pathlib import Path

import duckdb

from benchmarks.memory import MIB, MemoryMeter, run_metered
from jobs.demo import CHECKPOINT, CPU_ENGINE_ARGS
from pipeline.errors import SampleError
from pipeline.images import ImageLimits
from pipeline.sandbox import ImageSandbox, SandboxLimits
from pipeline.tiling import R4B_TILING


def time_decoding(files: list[Path]) -> tuple[float, Path]:
    """Seconds of the slowest file, and which it is."""
    sandbox = ImageSandbox(ImageLimits(), SandboxLimits(), R4B_TILING)
    slowest = (0.0, files[0])
    for path in files:
        start = time.monotonic()
        with contextlib.suppress(SampleError):  # what it says is counted in the job
            sandbox.prepare(path.read_bytes()[: ImageLimits().max_bytes + 1])
        slowest = max(slowest, (time.monotonic() - start, path))
    sandbox.close()
    return slowest


def run_job(folder: Path, files: list[Path], root: Path) -> MemoryMeter:
    lines = [{"id": str(path.relative_to(root)), "image": str(path)} for path in files]
    (folder / "files.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = {
        "name": "odd-files",
        "input": {"url": str(folder / "files.jsonl")},
        "prompts": [{"template": "Describe this image."}],
        "sampling": {"max_tokens": 64},
        "engine": {"model": str(CHECKPOINT), "num_gpus": 0, "max_num_seqs": 64, "args": CPU_ENGINE_ARGS},
        "output": {"url": str(folder / "out"), "chunk_rows": 64},
        "limits": {"max_error_rate": 1.0},
    }
    return run_metered(folder, spec)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    root = parser.parse_args().folder.resolve()
    files = sorted(path for path in root.rglob("*") if path.is_file())
    seconds, path = time_decoding(files)
    with tempfile.TemporaryDirectory() as folder:
        meter = run_job(Path(folder), files, root)
        rows = duckdb.sql(
            f"SELECT coalesce(error_type, 'answered') AS outcome, count(*) AS files, any_value(sample_id) AS example "
            f"FROM '{folder}/out/data/*.parquet' GROUP BY 1 ORDER BY 2 DESC"
        ).fetchall()
    print(f"{len(files)} files, {sum(count for _, count, _ in rows)} rows")
    for outcome, count, example in rows:
        print(f"{outcome:<26} {count:>5}  such as {example}")
    print(f"slowest to decode: {seconds:.1f} s, {path.relative_to(root)}")
    for kind in ("sandbox", "read and commit workers"):
        print(f"{kind}: {meter.resident[kind] / MIB:.0f} MiB resident at most")


if __name__ == "__main__":
    main()
