"""deployments/Dockerfile: linted, and (slow) its pip steps run as they stand in an environment of their own.

Not covered: building the image, which needs Docker, and the `gpu` extra, which needs a GPU to be of use.
"""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "deployments/Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """Names and texts, on one line each, without comments."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.M).replace("\\\n", " ")
    pairs = (line.split(None, 1) for line in text.splitlines() if line.strip())
    return [(name, " ".join(rest.split())) for name, rest in pairs]


def is_ignored(path: str) -> bool:
    """What .dockerignore keeps from Docker; the last line that fits decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            parts = [path.rsplit("/", cut)[0] for cut in range(path.count("/") + 1)]
            if any(fnmatch.fnmatch(part, pattern) or fnmatch.fnmatch(f"/{part}", pattern) for part in parts):
                ignored = not line.startswith("!")
    return ignored


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    run = subprocess.run([program, "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "")


def test_image_is_pinned_and_its_user_is_not_root() -> None:
    steps = instructions()
    (base,) = (text for name, text in steps if name == "FROM")
    name, _, tag = base.partition(":")
    assert name == "python"
    assert re.fullmatch(r"3\.1[12](\.\d+)?-slim-bookworm", tag)
    assert [text for name, text in steps if name == "USER"] == ["1000"]
    assert steps[-1][0] == "CMD"
    extras = [text.partition("=")[2] for name, text in steps if name == "ARG" and text.startswith("EXTRA")]
    assert extras == ["gpu"]
    assert {"cpu", "gpu"} <= set(PROJECT["optional-dependencies"])


def test_dependencies_are_installed_before_sources_are_copied() -> None:
    order = [text for name, text in instructions() if name == "COPY" or "pip install" in text]
    assert order[0] == "COPY pyproject.toml ./".removeprefix("COPY ")
    assert "pip install" in order[1]
    assert "pip install" in order[-1]
    assert "--no-deps" in order[-1]


def test_empty_project_has_each_package() -> None:
    """What setuptools is told of must be there, before the sources are."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    (step,) = (text for name, text in instructions() if name == "RUN" and "mkdir" in text)
    made = set(step.split("mkdir -p ")[1].split(" && ")[0].split())
    assert {package.replace(".", "/") for package in packages if "." in package} | {"jobs"} <= made


def test_docker_sees_what_is_copied_and_no_more() -> None:
    sources = [source for name, text in instructions() if name == "COPY" for source in text.split()[:-1]]
    assert all((ROOT / source).exists() and not is_ignored(source) for source in sources)
    for path in (
        ".git/config",
        ".venv/bin/python",
        "keys.txt",
        "demo-output/x",
        "jobs/__pycache__/cli.pyc",
        "tests/a.py",
    ):
        assert is_ignored(path)
    assert not is_ignored("deployments/playground/index.html")


def pip_steps(prefix: Path, context: Path) -> Iterator[str]:
    """Bring each COPY about, and give each step that makes or fills the environment, as a line for a shell."""
    for name, text in instructions():
        if name == "COPY":
            *sources, target = text.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    ignore = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / source, context / target, dirs_exist_ok=True, ignore=ignore)
                else:
                    shutil.copy(ROOT / source, context / target)
        elif name == "RUN" and "/opt/r4b/bin/pip" in text:
            yield re.sub(r"^python ", f"{sys.executable} ", text).replace("/opt/r4b", str(prefix))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pip_steps_give_a_working_environment(tmp_path: Path) -> None:
    """With the `cpu` extra, from the indexes that pip is set up with; about three gigabytes."""
    prefix, context = tmp_path / "r4b", tmp_path / "context"
    context.mkdir()
    for step in pip_steps(prefix, context):
        subprocess.run(["sh", "-ec", step], cwd=context, env={**os.environ, "EXTRA": "cpu"}, check=True)
    environment = {"PATH": f"{prefix}/bin:{os.environ['PATH']}", "HOME": str(tmp_path)}

    def run(*words: str) -> str:
        command = [f"{prefix}/bin/{words[0]}", *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        return done.stdout

    assert PROJECT["version"] in run("r4b", "--version")
    spec = run("r4b", "plan", "--help")
    assert "SPEC" in spec
    code = "import json, deployments.app, pipeline.engine.vllm_engine, ray; print(json.dumps(ray.__version__))"
    (pin,) = (each for each in PROJECT["dependencies"] if each.startswith("ray["))
    assert json.loads(run("python", "-c", code).splitlines()[-1]) == pin.partition("==")[2]
    assert (prefix / "bin/r4b-haproxy").exists()
    assert (next(prefix.glob("lib/*/site-packages")) / "deployments/playground/index.html").exists()
