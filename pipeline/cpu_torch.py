"""Lets CUDA builds of torchvision, torchaudio and torchcodec stand beside a CPU build of torch.

vLLM depends on all three, and the wheels that pip finds are CUDA builds, whose compiled operators cannot load with
CPU torch: importing torchvision (every llava-family model does) dies with "operator torchvision::nms does not
exist", importing torchaudio (transformers' processors do, where it is installed) with "Could not load this library".
R-4B needs none of these operators. So torchvision gets the two operator schemas that its import asks for, and
the audio packages are made to look absent.

Torch calls `adapt` through the entry point group `torch.backends` (pyproject.toml) at the end of every
`import torch`, hence in each process that vLLM or Ray starts. It does nothing when torch has CUDA; a package that is
absent or a CPU build, which works as it is, is left alone.
Not covered: a process that imports transformers before torch, which vLLM never does; import torch first.
"""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_declared: list[Any] = []
"""The torch library that holds the schemas; they live as long as it does."""


def adapt() -> None:
    """Make this process's imports work on CPU torch; safe to call again."""
    import torch

    if torch.version.cuda is not None:
        return
    if not _declared and is_cuda_build(find_version_file("torchvision")):
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for schema in SCHEMAS:
            library.define(schema)
        _declared.append(library)
    for name in ("torchaudio", "torchcodec"):
        if name not in sys.modules and is_cuda_build(find_version_file(name)):
            sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to say "not importable"


def find_version_file(package: str) -> Path | None:
    """The path of the package's version.py, found without importing the package; None when it is not installed."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None


def is_cuda_build(version_file: Path | None) -> bool:
    """Whether version.py tells of CUDA: a `+cu130` in the version or, in older wheels, a quoted `cuda`."""
    if version_file is None or not version_file.is_file():
        return False
    text = version_file.read_text()
    return re.search(r"^__version__.*\+cu\d|^cuda\b[^=\n]*=\s*['\"]", text, re.MULTILINE) is not None
