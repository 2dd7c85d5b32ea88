"""The import rule of docs/DESIGN.md: imports point down only, and each heavy package has one place.

Covers every import statement, those inside functions too. Not covered: imports by name, as `importlib` does.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("pipeline", "jobs", "deployments")

RANKS = {
    "pipeline": 0,
    "pipeline.errors": 0,
    "pipeline.records": 0,
    "pipeline.thinking": 1,
    "pipeline.tiling": 1,
    "pipeline.addresses": 1,
    "pipeline.ahead": 1,
    "pipeline.transport": 1,
    "pipeline.scenes": 1,
    "pipeline.cpu_torch": 1,
    "pipeline.formats.jsonlines": 1,
    "pipeline.prompts": 2,
    "pipeline.images": 2,
    "pipeline.remote": 2,
    "pipeline.sandbox": 3,
    "pipeline.spec": 3,
    "pipeline.storage": 4,
    "pipeline.prompt_rows": 4,
    "pipeline.suspects": 4,
    "pipeline.shares": 4,
    "pipeline.lives": 4,
    "pipeline.outcomes": 4,
    "pipeline.deaths": 4,
    "pipeline.sharing": 5,
    "pipeline.watch": 6,
    "pipeline.surveys": 5,
    "pipeline.formats": 5,
    "pipeline.prompt_shards": 6,
    "pipeline.listing": 6,
    "pipeline.loading": 6,
    "pipeline.alignment": 7,
    "pipeline.asking": 7,
    "pipeline.plan": 8,
    "pipeline.report": 8,
    "pipeline.commits": 9,
    "pipeline.readers": 9,
    "pipeline.engine": 9,
    "pipeline.cluster": 9,
    "pipeline.matching": 10,
    "pipeline.engine_actor": 10,
    "pipeline.batch": 11,
    "pipeline.publish.versions": 5,
    "pipeline.publish.parts": 10,
    "pipeline.publish.index": 11,
    "pipeline.publish.files": 12,
    "pipeline.publish.publisher": 13,
    "pipeline.publish": 14,
    "jobs": 15,
    "deployments": 15,
}
"""A module imports only from lower ranks. A package stands for its modules unless they have ranks of their own."""

FAMILIES = ("pipeline.engine", "pipeline.spec", "pipeline.storage", "pipeline.formats", "jobs", "deployments")
"""Packages whose modules may import each other."""

ALLOWED_SIDEWAYS = {("pipeline.records", "pipeline.errors")}

OWNERS = {
    "vllm": {
        f"pipeline.engine.{name}"
        for name in ("vllm_engine", "online_llm", "openai_app", "chat_limits", "media", "plugin", "reasoning")
    },
    "ray.data": {"pipeline.batch"},
    "ray.serve": {"pipeline.engine.served", "deployments.app", "jobs.serve"},
    "ray": {
        "pipeline.batch",
        "pipeline.cluster",
        "pipeline.engine.served",
        "pipeline.engine_actor",
        "pipeline.sharing",
        "pipeline.lives",
        "pipeline.watch",
        "deployments.metrics",
        "jobs.serve",
        "jobs.ray_jobs",
    },
    "boto3": {"pipeline.storage.s3", "pipeline.storage.s3_client"},
    "botocore": {"pipeline.storage.s3", "pipeline.storage.s3_client", "pipeline.storage.s3_errors"},
    "aiohttp": {"pipeline.remote"},
}
"""The only modules that may import these packages."""

EXCEPTIONS = {("jobs.serve", "deployments")}
"""The command that serves, inside its functions."""

PLAIN_MODULES = ("pipeline.errors", "pipeline.records")
PLAIN_PACKAGES = frozenset(sys.stdlib_module_names) | {"pyarrow"}


def find_violations(sources: Mapping[str, str]) -> list[str]:
    """`importer -> imported` for each import in these modules (name -> source) that the rule forbids."""
    known = set(sources) | set(RANKS)
    return [
        f"{module} -> {target}"
        for module, source in sorted(sources.items())
        for target in imported_modules(module, source, known)
        if not _is_allowed(module, target)
    ]


def imported_modules(module: str, source: str, known: set[str]) -> Iterator[str]:
    """Full names of what a module imports; `from a import b` is `a.b` where that is a module, else `a`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node, module in known and any(name.startswith(module + ".") for name in known))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                ours = base.split(".")[0] in FOLDERS
                yield full if (full in known or not ours) else base


def _absolute(module: str, node: ast.ImportFrom, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _is_allowed(module: str, target: str) -> bool:
    package = target.split(".")[0]
    owned = next((name for name in OWNERS if _is_in(target, name)), None)  # ray.data stands before ray
    if owned is not None:
        return module in OWNERS[owned]
    if package not in FOLDERS:
        return module not in PLAIN_MODULES or package in PLAIN_PACKAGES
    if _rank(target) is None or _rank(module) is None:
        return False
    if any(_is_in(module, family) and _is_in(target, family) for family in FAMILIES):
        return True
    if any(module == source and _is_in(target, folder) for source, folder in EXCEPTIONS):
        return True
    return (_rank(target) or 0) < (_rank(module) or 0) or (module, target) in ALLOWED_SIDEWAYS


def _rank(module: str) -> int | None:
    """None for a module of pipeline that the table lacks: a new module needs a decision."""
    if module in RANKS:
        return RANKS[module]
    family = next((family for family in FAMILIES if _is_in(module, family)), None)
    return RANKS[family] if family else None


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def read_sources() -> dict[str, str]:
    """All modules of the project by name."""
    sources = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            sources[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return sources


def test_find_violations_of_the_project_are_none() -> None:
    assert find_violations(read_sources()) == []


def test_read_sources_finds_the_project() -> None:
    sources = read_sources()
    assert {"pipeline", "pipeline.batch", "pipeline.engine", "pipeline.engine.vllm_engine", "jobs.cli"} <= set(sources)
    assert {name for name in sources if name not in RANKS and _rank(name) is None} == set()


def test_find_violations_sees_the_imports_that_the_owners_make() -> None:
    """The rule would hold of itself if nothing were found."""
    sources = read_sources()
    known = set(sources) | set(RANKS)
    for package, owners in OWNERS.items():
        for owner in owners:
            targets = list(imported_modules(owner, sources[owner], known))
            assert any(_is_in(target, package) for target in targets), (package, owner)


@pytest.mark.parametrize(
    ("module", "line", "target"),
    [
        ("pipeline.records", "import pipeline.storage", "pipeline.storage"),
        ("pipeline.records", "from pipeline.storage import open_store", "pipeline.storage"),
        ("pipeline.records", "from pipeline import storage", "pipeline.storage"),
        ("pipeline.records", "from . import storage", "pipeline.storage"),
        ("pipeline.records", "from .storage import open_store", "pipeline.storage"),
        ("pipeline.records", "import numpy", "numpy"),
        ("pipeline.errors", "from pipeline.records import Task", "pipeline.records"),
        ("pipeline.errors", "import pydantic", "pydantic"),
        ("pipeline.plan", "import vllm", "vllm"),
        ("pipeline.plan", "from pipeline.commits import part_url", "pipeline.commits"),
        ("pipeline.plan", "from pipeline.report import make_report", "pipeline.report"),
        ("pipeline.readers", "def read():\n    import ray.data", "ray.data"),
        ("pipeline.readers", "def read():\n    from ray import data", "ray.data"),
        ("pipeline.readers", "from pipeline.commits import Output", "pipeline.commits"),
        ("pipeline.commits", "from pipeline.batch import run_batch", "pipeline.batch"),
        ("pipeline.commits", "if True:\n    try:\n        import boto3\n    except ImportError: pass", "boto3"),
        ("pipeline.commits", "from botocore.exceptions import ClientError", "botocore.exceptions.ClientError"),
        ("pipeline.images", "from pipeline.prompts import render_prompt", "pipeline.prompts"),
        ("pipeline.engine.models", "from vllm import LLM", "vllm.LLM"),
        ("pipeline.engine.contract", "from pipeline.readers import read_chunk", "pipeline.readers"),
        ("pipeline.engine.contract", "from ..batch import run_batch", "pipeline.batch"),
        ("pipeline.engine", "from ..batch import run_batch", "pipeline.batch"),
        ("pipeline.batch", "from jobs.spec_file import load_spec", "jobs.spec_file"),
        ("pipeline.batch", "import vllm.config", "vllm.config"),
        ("pipeline.cluster", "import ray.data", "ray.data"),
        ("pipeline.plan", "import ray", "ray"),
        ("pipeline.spec", "from pipeline.brand_new import x", "pipeline.brand_new"),
        ("deployments.app", "import jobs.cli", "jobs.cli"),
        ("deployments", "from jobs import cli", "jobs.cli"),
        ("jobs.cli", "def serve():\n    from deployments.app import build", "deployments.app"),
        ("jobs.cli", "import ray", "ray"),
        ("pipeline", "from pipeline.batch import run_batch", "pipeline.batch"),
    ],
)
def test_find_violations_catches_a_planted_import(module: str, line: str, target: str) -> None:
    sources = read_sources()
    sources[module] = f"{sources.get(module, '')}\n{line}\n"
    sources.setdefault("deployments.app", "")
    imported = [found.split(" -> ")[1] for found in find_violations(sources) if found.startswith(f"{module} -> ")]
    assert target in imported or any(name.startswith(target + ".") for name in imported)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (
            "pipeline.records",
            "import json, hashlib\nimport pyarrow.parquet as pq\nfrom pipeline.errors import SampleError",
        ),
        ("pipeline.readers", "from pipeline.plan import make_plan\nfrom pipeline import storage, errors"),
        ("pipeline.engine.models", "from pipeline.engine import contract\nfrom .simulated import SimulatedEngine"),
        ("pipeline.engine", "from .contract import Engine"),
        ("pipeline.images", "import numpy, PIL.Image"),
        ("jobs.cli", "from jobs import demo\nfrom pipeline import batch\nimport click"),
        ("deployments.app", "from pipeline.engine import open_engine"),
    ],
)
def test_find_violations_lets_imports_downward_pass(module: str, line: str) -> None:
    sources = read_sources()
    sources[module] = f"{sources.get(module, '')}\n{line}\n"
    assert find_violations(sources) == []
