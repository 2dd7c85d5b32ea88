"""deployments/kuberay: what the overlays give, against KubeRay's and Kubernetes' schemas and Ray's own autoscaler.

What no schema says is tested too: names and volumes that must agree, what KubeRay's source refuses, and the rest of the
project: pins, serve.yaml, job specs, the environment of `r4b serve`.
Not covered: a cluster. Nothing here has started a pod.
"""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from deployments.settings import parse_settings
from jobs.serve import SERVE_ENVIRONMENT
from jobs.spec_file import load_spec
from tests.kustomize import Resource, compose, find_containers

ROOT = Path(__file__).resolve().parent.parent
KUBERAY = ROOT / "deployments/kuberay"
SCHEMAS = ROOT.parent / "shared/schemas"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OVERLAYS = ("batch", "online", "example", "example-online")
GIB = 1 << 30


def composed(overlay: str) -> list[Resource]:
    return compose(KUBERAY / "overlays" / overlay)


def ray_resource(overlay: str) -> Resource:
    """The overlay's RayJob or RayService."""
    (found,) = (each for each in composed(overlay) if each["apiVersion"] == "ray.io/v1")
    return found


def ray_cluster(overlay: str) -> dict[str, Any]:
    spec: dict[str, Any] = ray_resource(overlay)["spec"]
    cluster: dict[str, Any] = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    return cluster


def groups(overlay: str) -> dict[str, dict[str, Any]]:
    """Head and worker groups by name."""
    cluster = ray_cluster(overlay)
    return {"head": cluster["headGroupSpec"], **{each["groupName"]: each for each in cluster["workerGroupSpecs"]}}


def pods(overlay: str) -> dict[str, dict[str, Any]]:
    """All pod templates, the job's submitter included."""
    found = {name: group["template"] for name, group in groups(overlay).items()}
    submitter = ray_resource(overlay)["spec"].get("submitterPodTemplate")
    return found | ({"submitter": submitter} if submitter else {})


def all_pods() -> list[Any]:
    return [pytest.param(o, name, id=f"{o}-{name}") for o in OVERLAYS for name in pods(o)]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_is_composed_as_kustomize_does(overlay: str) -> None:
    command = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    if shutil.which(command[0]) is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    run = subprocess.run([*command, str(KUBERAY / "overlays" / overlay)], capture_output=True, text=True, check=True)
    real = list(yaml.safe_load_all(run.stdout))

    def key(each: Resource) -> tuple[str, str]:
        return each["kind"], each["metadata"]["name"]

    assert sorted(real, key=key) == sorted(composed(overlay), key=key)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_resource_follows_kuberays_schema(overlay: str) -> None:
    resource = ray_resource(overlay)
    schema = SCHEMAS / f"ray.io_{resource['kind'].lower()}s.v1.schema.json"
    if not schema.exists():
        pytest.skip(f"KubeRay's schemas are not at {SCHEMAS}")
    jsonschema.validate(resource, json.loads(schema.read_text()))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_core_resources_follow_kubernetes_schemas(overlay: str) -> None:
    core = [each for each in composed(overlay) if each["apiVersion"] != "ray.io/v1"]
    assert {each["kind"] for each in core} == {"ServiceAccount", "ConfigMap", "PodDisruptionBudget"}
    for resource in core:
        kubernetes_validate.validate(resource, "1.37", strict=True)


@pytest.mark.parametrize(("overlay", "name"), all_pods())
def test_pod_template_is_a_pod_and_its_volumes_agree(overlay: str, name: str) -> None:
    pod = pods(overlay)[name]
    metadata = {"name": name, **pod.get("metadata", {})}
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod["spec"]}, "1.37", strict=True
    )
    volumes = [volume["name"] for volume in pod["spec"].get("volumes", [])]
    assert len(volumes) == len(set(volumes))
    for container in pod["spec"]["containers"]:
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == set(volumes)
        assert set(container["resources"]["limits"]) >= {"cpu", "memory"}
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


@pytest.mark.parametrize(("overlay", "name"), all_pods())
def test_pod_runs_without_rights(overlay: str, name: str) -> None:
    spec = pods(overlay)[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    # only the head speaks to Kubernetes: it scales the cluster
    assert spec.get("automountServiceAccountToken", True) is (name == "head")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_that_pods_use_are_there(overlay: str) -> None:
    resources = composed(overlay)
    accounts = {each["metadata"]["name"] for each in resources if each["kind"] == "ServiceAccount"}
    maps = {each["metadata"]["name"]: each["data"] for each in resources if each["kind"] == "ConfigMap"}
    for group in groups(overlay).values():
        spec = group["template"]["spec"]
        assert spec["serviceAccountName"] in accounts
        sources = spec["containers"][0]["envFrom"]
        assert {source["configMapRef"]["name"] for source in sources if "configMapRef" in source} <= set(maps)
        assert {volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume} <= set(maps)
        mounts = {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        assert group["rayStartParams"]["object-spilling-directory"] in mounts
        assert any(maps["r4b-env"]["HF_HOME"].startswith(f"{mount}/") for mount in mounts)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rays_autoscaler_reads_the_cluster(overlay: str) -> None:
    """Ray's own reading of a RayCluster, with the resources that it will plan with."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = {"metadata": {"name": "x", "namespace": "y"}, "spec": ray_cluster(overlay)}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"] == {"CPU": 7, "GPU": 1, "memory": 26 * GIB}
    assert types["cpu"]["resources"] == {"CPU": 15, "memory": 54 * GIB}
    assert types["gpu"]["max_workers"] == {"batch": 8, "online": 8, "example": 32, "example-online": 16}[overlay]
    assert types["gpu"]["min_workers"] == {"online": 1, "example-online": 2}.get(overlay, 0)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_cluster_scales_asks_for_a_token_and_has_shared_memory(overlay: str) -> None:
    cluster = ray_cluster(overlay)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for group in groups(overlay).values():
        spec = group["template"]["spec"]
        assert "restartPolicy" not in spec  # KubeRay refuses any but Never with autoscaler v2
        shared = next(volume for volume in spec["volumes"] if volume["name"] == "shared-mem")["emptyDir"]
        limit = spec["containers"][0]["resources"]["limits"]["memory"]
        assert shared["medium"] == "Memory"
        # Ray's object store takes three tenths of a container's memory
        assert int(shared["sizeLimit"].removesuffix("Gi")) >= 0.3 * int(limit.removesuffix("Gi"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_workers_may_be_spot_machines_and_the_head_may_not(overlay: str) -> None:
    specs = {name: group["template"]["spec"] for name, group in groups(overlay).items()}
    needs = specs["head"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = needs["nodeSelectorTerms"]
    spot = {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority", "karpenter.sh/capacity-type"}
    assert spot < {each["key"] for each in term["matchExpressions"]}
    assert "tolerations" not in specs["head"]
    for name in ("gpu", "cpu"):
        tolerated = {each["key"] for each in specs[name]["tolerations"]}
        assert tolerated - {"nvidia.com/gpu"} == spot
        assert ("nvidia.com/gpu" in tolerated) is (name == "gpu")


@pytest.mark.parametrize("overlay", ["batch", "example"])
def test_pod_that_shows_the_log_may_fail_and_is_no_spot_machine(overlay: str) -> None:
    resource = ray_resource(overlay)["spec"]
    assert resource["submitterConfig"]["backoffLimit"] >= 20
    head = groups(overlay)["head"]["template"]["spec"]
    assert resource["submitterPodTemplate"]["spec"]["affinity"] == head["affinity"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_ask_for_the_disk_that_they_need(overlay: str) -> None:
    for name in ("gpu", "cpu"):
        (container,) = groups(overlay)[name]["template"]["spec"]["containers"]
        cache = next(each for each in groups(overlay)[name]["template"]["spec"]["volumes"] if each["name"] == "cache")
        asked = int(container["resources"]["requests"]["ephemeral-storage"].removesuffix("Gi"))
        assert asked >= 20 + int(cache["emptyDir"]["sizeLimit"].removesuffix("Gi"))


@pytest.mark.parametrize("overlay", ["online", "example-online"])
def test_replica_is_taken_away_after_several_slow_answers_only(overlay: str) -> None:
    found = groups(overlay)
    (container,) = found["gpu"]["template"]["spec"]["containers"]
    probe = container["readinessProbe"]
    *_, command = probe["exec"]["command"]
    assert subprocess.run(["bash", "-nc", command]).returncode == 0
    patience = [int(seconds) for seconds in re.findall(r"-T (\d+) ", command)]
    assert probe["timeoutSeconds"] > sum(patience)
    assert probe["failureThreshold"] > 1
    (port,) = (each["containerPort"] for each in container["ports"] if each["name"] == "serve")
    assert f"http://localhost:{port}/-/healthz" in command
    assert "readinessProbe" not in found["cpu"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_drains_within_the_pods_grace(overlay: str) -> None:
    maps = {each["metadata"]["name"]: each["data"] for each in composed(overlay) if each["kind"] == "ConfigMap"}
    for name, group in groups(overlay).items():
        spec = group["template"]["spec"]
        own = {each["name"]: each.get("value") for each in spec["containers"][0].get("env", [])}
        drain = int((maps["r4b-env"] | own)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        pause = spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["", "0"])
        assert drain + int(pause[-1]) < spec.get("terminationGracePeriodSeconds", 30)
        if "online" in overlay and name == "gpu":
            assert drain > serve_arguments()["scaling"]["graceful_shutdown_timeout_s"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_disruption_budgets_count_pods_that_exist(overlay: str) -> None:
    labels = [group["template"]["metadata"]["labels"] for group in groups(overlay).values()]
    budgets = [each["spec"] for each in composed(overlay) if each["kind"] == "PodDisruptionBudget"]
    guarded = []
    for budget in budgets:
        # pods of a RayCluster have no scale subresource, so percentages and maxUnavailable are errors
        assert set(budget) == {"minAvailable", "selector", "unhealthyPodEvictionPolicy"}
        assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        assert isinstance(budget["minAvailable"], int)
        wanted = budget["selector"]["matchLabels"]
        matched = [each for each in labels if wanted.items() <= each.items()]
        assert len(matched) == 1
        guarded += [each["app.kubernetes.io/component"] for each in matched]
    assert guarded == (["head", "gpu"] if "online" in overlay else ["head"])


def serve_arguments() -> dict[str, Any]:
    (application,) = yaml.safe_load((ROOT / "deployments/serve.yaml").read_text())["applications"]
    arguments: dict[str, Any] = application["args"]
    return arguments


def test_service_runs_serve_yaml() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(ray_resource("online")["spec"]["serveConfigV2"])
    assert config == yaml.safe_load((ROOT / "deployments/serve.yaml").read_text())
    ServeDeploySchema.model_validate(config)
    settings = parse_settings(config["applications"][0]["args"], "serveConfigV2")
    gpu = groups("online")["gpu"]
    assert settings.scaling.max_replicas <= gpu["maxReplicas"]
    assert settings.actor_resources["num_gpus"] == 1
    spec = gpu["template"]["spec"]
    secret = next(volume["secret"] for volume in spec["volumes"] if volume["name"] == "api-keys")
    mount = next(each for each in spec["containers"][0]["volumeMounts"] if each["name"] == "api-keys")
    assert settings.auth.keys_file == f"{mount['mountPath']}/{secret['items'][0]['path']}"


@pytest.mark.parametrize("overlay", ["batch", "example"])
def test_job_runs_the_spec_that_is_mounted(overlay: str, tmp_path: Path) -> None:
    resource = ray_resource(overlay)["spec"]
    spec = groups(overlay)["head"]["template"]["spec"]
    source = next(volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume)
    (config_map,) = (each for each in composed(overlay) if each["metadata"]["name"] == source)
    mount = next(each["mountPath"] for each in spec["containers"][0]["volumeMounts"] if each["name"] == "job")
    (name,) = config_map["data"]
    assert resource["entrypoint"] == f"r4b run {mount}/{name}"
    (tmp_path / name).write_text(config_map["data"][name])
    job = load_spec(str(tmp_path / name))
    assert job.engine.replicas.max == groups(overlay)["gpu"]["maxReplicas"]
    assert job.output.url.startswith("s3://")
    assert resource["backoffLimit"] > 0
    assert resource["shutdownAfterJobFinishes"] is True


def test_versions_are_those_of_the_project() -> None:
    (pin,) = (each for each in PROJECT["dependencies"] if each.startswith("ray["))
    ray_version = pin.partition("==")[2]
    for overlay in OVERLAYS:
        assert ray_cluster(overlay)["rayVersion"] == ray_version
        images = {container["image"] for container in find_containers(ray_resource(overlay))}
        assert {image.rpartition(":")[2] for image in images} == {f"{PROJECT['version']}-ray{ray_version}"}
        assert len(images) == 1


def test_environment_is_that_of_r4b_serve() -> None:
    (config_map,) = (each for each in composed("online") if each["metadata"]["name"] == "r4b-env")
    here = {name: value for name, value in SERVE_ENVIRONMENT.items() if name != "RAY_BACKEND_LOG_LEVEL"}
    assert here.items() <= config_map["data"].items()
    assert config_map["data"]["RAY_SERVE_HAPROXY_BINARY_PATH"].endswith("/bin/r4b-haproxy")
    assert not any(value.startswith(("'", '"')) for value in config_map["data"].values())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_stands_in_a_file(overlay: str) -> None:
    assert not any(each["kind"] == "Secret" for each in composed(overlay))
    for container in find_containers(ray_resource(overlay)):
        for variable in container.get("env", []):
            if re.search("TOKEN|KEY|SECRET|PASSWORD", variable["name"]):
                assert set(variable) == {"name", "valueFrom"}
    texts = [path.read_text() for path in KUBERAY.rglob("*") if path.is_file()] + [
        (ROOT / "ray_cluster.yaml").read_text(),
        (ROOT / "deployments/Dockerfile").read_text(),
    ]
    for text in texts:
        assert not re.search(r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20}|PRIVATE KEY|[0-9a-f]{64}|sk-[A-Za-z0-9]{16}", text)


def test_every_file_is_used() -> None:
    """A manifest that no kustomization names would never be applied."""
    for folder in (path.parent for path in KUBERAY.rglob("kustomization.yaml")):
        text = (folder / "kustomization.yaml").read_text()
        for path in folder.iterdir():
            if path.is_file() and path.name != "kustomization.yaml":
                assert path.name in text
