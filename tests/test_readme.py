"""The README's tree: a line for each module, and none for what is gone."""

import re
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("pipeline", "jobs", "deployments", "checkpoints", "benchmarks", "tests")


def tree() -> list[Path]:
    """The paths that the tree names; two spaces are a level."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is where")[1].split("```")[1]
    folders: list[str] = []
    named = []
    for indent, name in re.findall(r"^( *)(\S+)", text, re.MULTILINE):
        folders[len(indent) // 2 :] = [name]
        named.append(ROOT.joinpath(*folders))
    return named


def test_every_module_has_one_line() -> None:
    modules = chain.from_iterable((ROOT / folder).rglob("*.py") for folder in FOLDERS)
    named = [path for path in tree() if path.suffix == ".py"]
    assert sorted(named) == sorted(modules)


def test_nothing_is_named_that_is_not_there() -> None:
    assert [path for path in tree() if not path.exists()] == []
