"""Running `r4b` as a user does, and jobs to run: shards of scenes, specs as dictionaries.

Processes are started in a session of their own and ended by their ids.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from jobs.demo import CHECKPOINT, CPU_ENGINE_ARGS, scene_rows
from pipeline.records import read_part

R4B = str(Path(sys.executable).with_name("r4b"))


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str


def r4b(*args: str, cwd: Path | None = None, timeout: float = 400) -> Finished:
    """Run the command to its end."""
    with started_r4b(*args, cwd=cwd) as process:
        stdout, stderr = process.communicate(timeout=timeout)
    return Finished(process.returncode, stdout, stderr)


@contextmanager
def started_r4b(*args: str, cwd: Path | None = None) -> Iterator["subprocess.Popen[str]"]:
    """Start the command; whatever is left of it afterwards is killed."""
    process = subprocess.Popen(
        [R4B, *args],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        yield process
    finally:
        kill_tree(process.pid)
        process.communicate()


def kill_tree(pid: int) -> None:
    """SIGKILL a process and everything that it started, all at once as far as that goes."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    psutil.wait_procs(family, timeout=30)


def write_scene_shards(folder: Path, num_rows: int, rows_per_shard: int = 100) -> None:
    """Parquet shards of held-out scenes with id, image, question, kind and truth."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, num_rows, rows_per_shard):
        rows = min(rows_per_shard, num_rows - first)
        pq.write_table(scene_rows(first, rows), folder / f"scenes-{first:06d}.parquet", row_group_size=32)


def simulated_spec(folder: Path, **engine: Any) -> dict[str, Any]:
    """A job over `folder/in` into `folder/out` on the simulated engine."""
    simulation = {"thinking_tokens": 30, "answer_tokens": 5, **engine.pop("simulation", {})}
    return {
        "name": "test",
        "input": {"url": str(folder / "in")},
        "prompts": [{"id": "question", "template": "{{ question }}"}],
        "engine": {"kind": "simulated", "model": "sim", "num_gpus": 0, "max_num_seqs": 32, **engine}
        | {"simulation": simulation},
        "output": {"url": str(folder / "out"), "chunk_rows": 16, "keep_columns": ["truth"]},
    }


def real_spec(folder: Path) -> dict[str, Any]:
    """The same job on the small checkpoint through vLLM, on this CPU."""
    engine = {"model": str(CHECKPOINT), "num_gpus": 0, "max_num_seqs": 64, "args": CPU_ENGINE_ARGS}
    sampling = {"temperature": 0.0, "max_tokens": 256}
    return simulated_spec(folder) | {"engine": engine, "sampling": sampling}


def write_spec(folder: Path, spec: dict[str, Any]) -> str:
    """The spec as a YAML file; returns its path."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(spec))
    return str(path)


def read_output(folder: Path) -> pa.Table:
    """All parts of an output on disk, in one table."""
    tables = []
    for path in sorted((folder / "data").glob("*.parquet")):
        with path.open("rb") as file:
            tables.append(read_part(file))
    return pa.concat_tables(tables)


def keys_of(table: pa.Table) -> list[tuple[str, str]]:
    """(sample_id, prompt_id) of each row."""
    return list(zip(table.column("sample_id").to_pylist(), table.column("prompt_id").to_pylist(), strict=True))
