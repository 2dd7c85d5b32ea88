"""`cpu_torch`: a CUDA build of torchvision beside a CPU build of torch imports, in processes of their own.

Covers the installed packages as they are; where they are CPU builds, the last two tests have less to show.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from pipeline.cpu_torch import find_version_file, is_cuda_build

VISION_CUDA = """\
__version__ = '0.28.0+cu130'
git_version = '8fb87713a24951e639c494b0f2a8a81b5f8e33a6'
from torchvision.extension import _check_cuda_version
if _check_cuda_version() > 0:
    cuda = _check_cuda_version()
"""
VISION_CPU = VISION_CUDA.replace("+cu130", "+cpu")
OLD_CUDA = "__version__ = '0.15.2'\ncuda: Optional[str] = '11.7'\n"
OLD_CPU = "__version__ = '0.15.2'\ncuda = None\n"


@pytest.mark.parametrize(
    ("text", "is_cuda"),
    [
        (VISION_CUDA, True),
        (VISION_CPU, False),
        ("__version__ = '0.28.0'\n", False),
        ('__version__ = "2.11.0+cu128"\n', True),
        ("__version__: str = '2.11.0+cu128'\n", True),
        ("__version__ = '2.11.0+cpu.cxx11.abi'\n", False),
        ("__version__ = '2.11.0+git1234cu13'\n", False),
        (OLD_CUDA, True),
        (OLD_CPU, False),
        ("__version__ = '1.0'\nfoo = 'torch+cu130'\n", False),
        ("", False),
    ],
)
def test_is_cuda_build_reads_version_py(tmp_path: Path, text: str, is_cuda: bool) -> None:
    path = tmp_path / "version.py"
    path.write_text(text)
    assert is_cuda_build(path) is is_cuda


def test_is_cuda_build_of_nothing_is_false(tmp_path: Path) -> None:
    assert is_cuda_build(None) is False
    assert is_cuda_build(tmp_path / "absent.py") is False
    assert is_cuda_build(tmp_path) is False


def test_find_version_file_of_packages_there_and_absent() -> None:
    assert find_version_file("no_such_package_anywhere") is None
    path = find_version_file("torch")
    assert path is not None
    assert path.is_file()
    assert "__version__" in path.read_text()


def run_python(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run code in a fresh interpreter with this environment and no other."""
    base = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**base, **environment},
    )


def test_adapt_lets_torchvision_and_the_processor_import_and_work() -> None:
    code = """
import torch, torchvision
from torchvision.transforms.v2 import functional
from transformers import LlavaNextImageProcessor
from PIL import Image
assert functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape == (3, 4, 4)
out = LlavaNextImageProcessor()(Image.new("RGB", (30, 20)), return_tensors="pt")
assert out["pixel_values"].ndim == 5
print("all imported", torch.version.cuda)
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.startswith("all imported")


def test_adapt_makes_cuda_builds_of_audio_packages_look_absent() -> None:
    code = """
import torch
from pipeline.cpu_torch import adapt, find_version_file, is_cuda_build
adapt()  # once more does no harm
for name in ("torchaudio", "torchcodec"):
    hidden = torch.version.cuda is None and is_cuda_build_of[name]
    try:
        __import__(name)
    except ImportError as error:
        assert hidden and "None in sys.modules" in str(error), (name, error)
    else:
        assert not hidden, name
print("as it should be")
"""
    # By path: in this process torch may have been imported, and the packages been hidden, already.
    files = {
        name: Path(sysconfig.get_paths()["purelib"]) / name / "version.py" for name in ("torchaudio", "torchcodec")
    }
    builds = {name: is_cuda_build(path) for name, path in files.items()}
    installed = [name for name, path in files.items() if path.is_file()]
    code = f"is_cuda_build_of = {builds!r}\n{code.replace(repr(('torchaudio', 'torchcodec')), repr(tuple(installed)))}"
    run = run_python(code)
    assert run.returncode == 0, run.stderr[-2000:]


def test_without_adapt_a_cuda_build_of_torchvision_does_not_import() -> None:
    """That the module is needed at all: torch reads its entry point unless this variable is 0."""
    run = run_python("import torch, torchvision", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    torch_has_cuda = is_cuda_build(find_version_file("torch"))
    if is_cuda_build(find_version_file("torchvision")) and not torch_has_cuda:
        assert run.returncode != 0
        assert "torchvision::nms" in run.stderr
    else:
        assert run.returncode == 0, run.stderr[-2000:]
