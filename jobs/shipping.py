"""What of a job travels to a cluster: its spec, the project's own packages, and what pip knows about them.

Not covered: other packages, which the nodes have, and credentials, which never travel.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import yaml

import pipeline

PROJECT = "r4b"
PACKAGES = ("pipeline", "jobs", "deployments")
SPEC_NAME = "job.yaml"
RESULT_MARK = "r4b-result: "
"""Begins the line of a job's log that holds its result, as JSON."""


@dataclass(frozen=True)
class Shipment:
    """A spec as a dictionary, options of `r4b run`, and whether the nodes have the project already."""

    spec: dict[str, Any]
    flags: tuple[str, ...] = ()
    installed: bool = False

    @property
    def entrypoint(self) -> str:
        """The command on the head; `exec`, so that Ray's signal to stop reaches Python itself."""
        return " ".join(["exec python -m jobs.submitted", SPEC_NAME, "--expect", version(PROJECT), *self.flags])

    @contextmanager
    def packed(self) -> Iterator[str]:
        """A folder that becomes the working directory of the job's processes, first on their path."""
        with tempfile.TemporaryDirectory(prefix="r4b-submit-") as name:
            folder = Path(name)
            text = yaml.safe_dump(self.spec, sort_keys=False, allow_unicode=True)
            (folder / SPEC_NAME).write_text(text, encoding="utf-8")
            if not self.installed:
                copy_project(folder)
            yield name


def copy_project(folder: Path) -> None:
    """The packages' modules, and the metadata by which torch and vLLM find the project's plugins in each process."""
    root = Path(pipeline.__file__).parent.parent
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            target = folder / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    info = folder / f"{PROJECT}-{version(PROJECT)}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PROJECT}\nVersion: {version(PROJECT)}\n")
    (info / "entry_points.txt").write_text(distribution(PROJECT).read_text("entry_points.txt") or "")
