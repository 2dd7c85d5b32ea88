"""From a YAML file and `--set key=value` options to a checked JobSpec.

Not covered: what the keys mean (`pipeline/spec/`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.engine.models import is_local
from pipeline.errors import SpecError
from pipeline.spec import JobSpec, parse_spec
from pipeline.storage import absolute_url


def load_spec(path: str, overrides: Sequence[str] = ()) -> JobSpec:
    """Read, override, check; raises SpecError."""
    data = read_yaml(path)
    for override in overrides:
        apply_override(data, override)
    return resolve_paths(parse_spec(data, path))


def resolve_paths(job: JobSpec) -> JobSpec:
    """Local paths made absolute: the job runs in many processes, and is looked at from other folders later."""
    urls = [absolute_url(url) for url in job.input.urls]
    changes: dict[str, Any] = {
        "input": job.input.model_copy(update={"url": urls if isinstance(job.input.url, list) else urls[0]}),
        "output": job.output.model_copy(update={"url": absolute_url(job.output.url)}),
    }
    if job.prompt_shards is not None:
        prompts = job.prompt_shards
        changes["prompts"] = prompts.model_copy(update={"url": absolute_url(prompts.url)})
    if job.engine.kind == "vllm" and is_local(job.engine.model):
        changes["engine"] = job.engine.model_copy(update={"model": absolute_url(job.engine.model)})
    return job.model_copy(update=changes)


def read_yaml(path: str) -> Any:
    """The file's content; raises SpecError that names the line."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        raise SpecError(f"{path}: the job spec cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: the job spec is not UTF-8 text.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise SpecError(f"{path}: not valid YAML: {getattr(error, 'problem', error)}{where}.") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML takes the last of two equal keys; a spec that says a thing twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        names = [key.value for key in keys]
        for key in keys:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


def apply_override(data: Any, override: str) -> None:
    """Set `a.b.0.c=value` in place; the value is read as YAML, so numbers, lists and null are what they look like."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise SpecError(f"--set {override}: write it as key=value, such as engine.max_num_seqs=128.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(f"--set {override}: the value is not valid YAML.") from error
    *path, last = key.split(".")
    place = data
    for name in path:
        place = _step_into(place, name, override)
    _assign(place, last, value, override)


def _step_into(place: Any, name: str, override: str) -> Any:
    if isinstance(place, list) and name.isascii() and name.isdigit() and int(name) < len(place):
        return place[int(name)]
    if isinstance(place, dict):
        return place.setdefault(name, {})
    raise SpecError(f"--set {override}: there is no key {name!r} there.")


def _assign(place: Any, name: str, value: Any, override: str) -> None:
    if isinstance(place, dict):
        place[name] = value
    elif isinstance(place, list) and name.isascii() and name.isdigit() and int(name) < len(place):
        place[int(name)] = value
    else:
        raise SpecError(f"--set {override}: there is no key {name!r} there.")
