"""The part of kustomize that deployments/kuberay uses, in a few lines, for machines without the program.

A key that is not known here is an error, so nothing is left out in silence; where kustomize is installed, a test
compares the two.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "configMapGenerator", "generatorOptions", "patches"}
Resource = dict[str, Any]


def compose(folder: Path) -> list[Resource]:
    """All resources of a kustomization, patched."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = set(kustomization) - KNOWN
    if unknown or kustomization.get("generatorOptions") not in (None, {"disableNameSuffixHash": True}):
        raise ValueError(f"{folder}: not covered: {unknown or kustomization['generatorOptions']}")
    resources = [each for name in kustomization["resources"] for each in _load(folder / name)]
    for generator in kustomization.get("configMapGenerator", []):
        _add_config_map(resources, generator, folder)
    for patch in kustomization.get("patches", []):
        text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text()
        for resource in _find(resources, patch["target"]):
            for operation in yaml.safe_load(text):
                apply_json_patch(resource, **operation)
    for resource in resources:
        if "namespace" in kustomization:
            resource["metadata"]["namespace"] = kustomization["namespace"]
        for container in find_containers(resource):
            container["image"] = _rename(container["image"], kustomization.get("images", []))
    return resources


def apply_json_patch(resource: Resource, op: str, path: str, value: Any = None) -> None:
    """One operation of RFC 6902; raises KeyError or IndexError where there is no such place."""
    *steps, last = [step.replace("~1", "/").replace("~0", "~") for step in path.split("/")[1:]]
    place: Any = resource
    for step in steps:
        place = place[int(step)] if isinstance(place, list) else place[step]
    key: Any = int(last) if isinstance(place, list) else last
    if op in ("replace", "remove"):
        place[key]  # must be there
    if op == "remove":
        del place[key]
    elif op == "add" and isinstance(place, list):
        place.insert(key, value)
    elif op in ("add", "replace"):
        place[key] = value
    else:
        raise ValueError(f"{op}: not covered")


def find_containers(node: Any) -> Iterator[dict[str, Any]]:
    """Containers anywhere in a resource, KubeRay's included."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node if isinstance(node, list) else []):
        if key in ("containers", "initContainers"):
            yield from value
        else:
            yield from find_containers(value)


def _load(path: Path) -> list[Resource]:
    if path.is_dir():
        return compose(path)
    # YAML's aliases are one object in several places; a patch changes one place
    return [unshare(each) for each in yaml.safe_load_all(path.read_text())]


def unshare(node: Any) -> Any:
    """The same value, in which nothing is in two places."""
    if isinstance(node, dict):
        return {key: unshare(value) for key, value in node.items()}
    return [unshare(value) for value in node] if isinstance(node, list) else node


def _find(resources: list[Resource], target: dict[str, str]) -> list[Resource]:
    kind, name = target["kind"], target.get("name")
    found = [each for each in resources if each["kind"] == kind and name in (None, each["metadata"]["name"])]
    if not found:
        raise ValueError(f"nothing to patch: {target}")
    return found


def _add_config_map(resources: list[Resource], generator: dict[str, Any], folder: Path) -> None:
    lines = [line for name in generator.get("envs", []) for line in (folder / name).read_text().splitlines()]
    pairs = [line for line in lines if line and not line.startswith("#")] + generator.get("literals", [])
    data = {key: value for key, _, value in (pair.partition("=") for pair in pairs)}
    data |= {name: (folder / name).read_text() for name in generator.get("files", [])}
    made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data}
    if generator.get("behavior") == "replace":
        (there,) = _find(resources, {"kind": "ConfigMap", "name": generator["name"]})
        there["data"] = data
    else:
        resources.append(made)


def _rename(image: str, rules: list[dict[str, str]]) -> str:
    name, _, tag = image.rpartition(":")
    for rule in rules:
        if rule["name"] == name:
            return f"{rule.get('newName', name)}:{rule.get('newTag', tag)}"
    return image
