"""What a model is, before any engine starts: whether it exists, and an identity for the fingerprint.

Not covered: loading weights.
"""

import ast
import hashlib
import importlib.util
import json
import os
from pathlib import Path

from pipeline.errors import SpecError
from pipeline.spec import EngineSpec
from pipeline.tiling import R4B_TILING, Tiling, tiling_of_config

SAMPLE_BYTES = 1 << 20
ENGINE_ARG_CLASSES = ("EngineArgs", "AsyncEngineArgs")


def check_model(spec: EngineSpec) -> None:
    """Raise SpecError, in seconds, if the model cannot be found or an engine argument is unknown."""
    if spec.kind == "simulated":
        return
    if not is_local(spec.model):
        _check_hub(spec)
    elif not (Path(spec.model) / "config.json").is_file():
        raise SpecError(f"engine.model: {spec.model} is not a folder with a config.json, and no hub id either.")
    if spec.args:
        _check_args(spec)


def is_local(model: str) -> bool:
    """A hub id is `name` or `owner/name`; everything that exists here or looks like a path is a path."""
    return os.path.exists(model) or model.startswith((".", "/", "~")) or model.count("/") > 1


def _check_hub(spec: EngineSpec) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    where = f"engine.model: {spec.model}" + (f" at revision {spec.revision}" if spec.revision else "")
    try:
        huggingface_hub.hf_hub_download(spec.model, "config.json", revision=spec.revision, etag_timeout=10)
    except (LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, HfHubHTTPError):
            raise SpecError(f"{where} is not on the model hub, or needs a token (HF_TOKEN).") from error
        raise SpecError(f"{where} is neither a folder here nor cached, and the model hub cannot be reached.") from error
    except HFValidationError as error:
        raise SpecError(f"{where} is neither a folder here nor a hub id.") from error


def find_tiling(spec: EngineSpec) -> Tiling | None:
    """How the model cuts images, by its config.json; None if it does not. `check_model` has found the model before."""
    if spec.kind == "simulated":
        return R4B_TILING
    path = Path(spec.model) / "config.json"
    if not is_local(spec.model):
        import huggingface_hub

        path = Path(huggingface_hub.hf_hub_download(spec.model, "config.json", revision=spec.revision, etag_timeout=10))
    try:
        return tiling_of_config(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError(f"engine.model: {spec.model} has a config.json that cannot be used: {error!r}.") from error


def _check_args(spec: EngineSpec) -> None:
    known = read_engine_arg_names()
    if known and (unknown := sorted(set(spec.args) - known)):
        raise SpecError(f"engine.args.{unknown[0]}: vLLM's AsyncEngineArgs has no argument of this name.")


def read_engine_arg_names() -> frozenset[str]:
    """vLLM's engine arguments, from its source: to import vLLM takes 17 s and half a gigabyte on two cores.

    None at all where vLLM is not installed, on a head node for instance: the replicas check them when they start.
    """
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        return frozenset()
    module = ast.parse(Path(vllm.origin).with_name("engine").joinpath("arg_utils.py").read_text(encoding="utf-8"))
    classes = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name in ENGINE_ARG_CLASSES]
    fields = [line.target for node in classes for line in node.body if isinstance(line, ast.AnnAssign)]
    return frozenset(field.id for field in fields if isinstance(field, ast.Name))


def identify_model(spec: EngineSpec) -> str:
    """The hub id, or for a folder a digest of its files, so that the same checkpoint elsewhere is the same model.

    Large files count by size and by their first and last MiB, which hold the header of a safetensors file.
    """
    if spec.kind == "simulated" or not is_local(spec.model):
        return spec.model
    digest = hashlib.sha256()
    for path in sorted(Path(spec.model).iterdir()):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".jinja", ".txt", ".bin"):
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(SAMPLE_BYTES)
                file.seek(max(0, size - SAMPLE_BYTES))
                digest.update(f"{path.name}:{size}:".encode() + head + file.read(SAMPLE_BYTES))
    return f"folder sha256:{digest.hexdigest()[:32]}"
