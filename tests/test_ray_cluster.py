"""ray_cluster.yaml, as written for AWS and with its `#gcp ` and `#local ` lines: read by Ray's own launcher code.

Commands are parsed by bash and by Ray's command line, and those that need no cloud are run. EC2's own model of
RunInstances checks the node configurations.
Not covered: the clouds. Nothing here has started an instance.
"""

import http.server
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "ray_cluster.yaml"
ENV_FILE = ROOT / "deployments/kuberay/base/ray.env"
PROVIDERS = ("aws", "gcp", "local")
WORKERS = ("gpu_worker", "cpu_worker")


def read_cluster(provider: str) -> dict[str, Any]:
    """The file, in which the lines of this provider are no comments; of two equal keys YAML takes the last."""
    config: dict[str, Any] = yaml.safe_load(re.sub(rf"^#{provider} ", "", FILE.read_text(), flags=re.M))
    return config


def prepare(provider: str) -> dict[str, Any]:
    """What `ray up` makes of it before it asks a cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(read_cluster(provider))
    validate_config(config)  # against ray-schema.json, and more
    return config


def commands(config: dict[str, Any]) -> list[str]:
    """Every command of a prepared configuration."""
    own = [each.get("worker_setup_commands", []) for each in config["available_node_types"].values()]
    kinds = ("initialization", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return [command for kind in kinds for command in config[f"{kind}_commands"]] + [one for each in own for one in each]


def ray_options(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """The options of `ray start`, as its own parser takes them."""
    from ray.scripts.scripts import start

    (command,) = (each for each in config[f"{kind}_start_ray_commands"] if "ray start" in each)
    words = shlex.split(command.partition("ray start ")[2])
    options: dict[str, Any] = start.make_context("start", words).params
    return options


@pytest.mark.parametrize("provider", PROVIDERS)
def test_ray_up_accepts_the_file(provider: str) -> None:
    config = prepare(provider)
    assert config["provider"]["type"] == provider
    assert config["upscaling_speed"] >= 100
    for command in commands(config):
        subprocess.run(["bash", "-n", "-c", command], check=True)
    assert config["head_start_ray_commands"][0] == config["worker_start_ray_commands"][0] == "ray stop"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_ray_starts_a_head_without_work_and_with_a_private_dashboard(provider: str) -> None:
    config = prepare(provider)
    head, worker = ray_options(config, "head"), ray_options(config, "worker")
    assert head["num_cpus"] == 0
    assert head["dashboard_host"] == "127.0.0.1"
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    for options in (head, worker):
        spill = options["object_spilling_directory"]
        assert any("install -d" in command and spill in command for command in config["head_setup_commands"])


@pytest.mark.parametrize("provider", ["aws", "gcp"])
def test_node_types_are_a_head_and_two_kinds_of_workers_from_zero(provider: str) -> None:
    config = prepare(provider)
    types = config["available_node_types"]
    assert set(types) == {"head", *WORKERS}
    assert config["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["head"]["max_workers"] == 0
    assert types["gpu_worker"]["resources"]["GPU"] == 1
    assert "GPU" not in types["cpu_worker"]["resources"]
    assert [types[name]["min_workers"] for name in WORKERS] == [0, 0]
    assert sum(types[name]["max_workers"] for name in WORKERS) <= config["max_workers"]


def test_workers_are_spot_instances_with_roles_and_no_keys() -> None:
    types = prepare("aws")["available_node_types"]
    assert all(types[name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for name in WORKERS)
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    profiles = {name: each["node_config"]["IamInstanceProfile"]["Name"] for name, each in types.items()}
    assert profiles == {"head": "r4b-head", "gpu_worker": "r4b-worker", "cpu_worker": "r4b-worker"}


def test_node_configurations_are_what_ec2_takes() -> None:
    """botocore's model of RunInstances, which Ray calls with these keys."""
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node_type in prepare("aws")["available_node_types"].items():
        report = botocore.validate.ParamValidator().validate(
            {**node_type["node_config"], "MinCount": 1, "MaxCount": 1}, shape
        )
        assert not report.has_errors(), f"{name}: {report.generate_report()}"


def test_ray_leaves_the_images_as_they_are() -> None:
    """Ray puts an old Ubuntu where it finds no image; a name for the newest one must pass through."""
    from ray.autoscaler._private.aws.config import _check_ami

    config = prepare("aws")
    before = {name: each["node_config"]["ImageId"] for name, each in config["available_node_types"].items()}
    _check_ami(config)
    assert {name: each["node_config"]["ImageId"] for name, each in config["available_node_types"].items()} == before
    assert all(image.startswith("resolve:ssm:/aws/service/") for image in before.values())
    assert "cloudwatch" not in config["provider"]  # only with it does Ray ask EC2 what an ImageId is


@pytest.mark.parametrize("provider", ["aws", "gcp"])
def test_gpu_workers_alone_install_the_gpu_extra(provider: str) -> None:
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    config = AutoscalingConfig(prepare(provider), skip_content_hash=True)
    gpu, cpu = (config.get_worker_setup_commands(name) for name in WORKERS)
    assert gpu[:-1] == cpu[:-1]
    assert gpu[-1].endswith("~/r4b'[gpu]'")
    assert "[gpu]" not in cpu[-1]
    assert "gpu" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_synced_files_are_all_that_the_package_needs() -> None:
    from ray._private.authentication.authentication_token_setup import _get_default_token_path

    mounts = read_cluster("aws")["file_mounts"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    sources = {remote.removeprefix("~/r4b/"): local for remote, local in mounts.items() if remote.startswith("~/r4b/")}
    assert all(local == f"./{name}" and (ROOT / name).exists() for name, local in sources.items())
    needed = {package.partition(".")[0] for package in project["tool"]["setuptools"]["packages"]}
    assert set(sources) == needed | {
        "pyproject.toml",
        project["project"]["readme"],
        *project["project"]["license-files"],
    }
    (token,) = (remote for remote in mounts if remote.startswith("~/.ray/"))
    assert Path(token).expanduser() == _get_default_token_path()
    assert mounts[token] == token


def run_setup(provider: str, home: Path, prefix: Path) -> dict[str, str]:
    """Run what writes the environment, in a home of its own; returns what a command of the launcher then sees."""
    (home / "r4b/deployments/kuberay/base").mkdir(parents=True)
    shutil.copy(ENV_FILE, home / "r4b/deployments/kuberay/base/ray.env")
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    chosen = [each for each in prepare(provider)["head_setup_commands"] if "ray.sh" in each]
    for command in [*chosen, *chosen]:  # twice: `ray up` may run them again
        command = command.replace("/opt/r4b", str(prefix))
        subprocess.run(["bash", "-c", command], env=environment, check=True)
    line = [sys.executable, "-c", "import json, os; print('\\n' + json.dumps(dict(os.environ)))"]
    shell = ["bash", "--login", "-c", "-i", f"source ~/.bashrc; export OMP_NUM_THREADS=1 && ({shlex.join(line)})"]
    out = subprocess.run(shell, env=environment, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    seen: dict[str, str] = yaml.safe_load(out.stdout.strip().splitlines()[-1])
    return seen


@pytest.mark.parametrize("provider", ["aws", "local"])
def test_setup_gives_every_command_the_environment(provider: str, tmp_path: Path) -> None:
    prefix = tmp_path / "venv"
    prefix.mkdir()
    seen = run_setup(provider, tmp_path / "home", prefix)
    pairs = (line.partition("=") for line in ENV_FILE.read_text().splitlines() if not line.startswith("#"))
    wanted = {name: value.replace("/opt/r4b", str(prefix)) for name, _, value in pairs}
    wanted["RAY_SERVE_HAPROXY_BINARY_PATH"] = "/opt/r4b/bin/r4b-haproxy"  # copied from the file as it is
    assert wanted.items() <= seen.items()
    assert seen["RAY_AUTH_MODE"] == "token"
    assert seen["PATH"].split(":")[0] == f"{prefix}/bin"
    assert (tmp_path / "home/.bashrc").read_text().count("ray.sh") == 1


class Metadata(http.server.BaseHTTPRequestHandler):
    """A cloud's metadata service that announces the end at the second question, to who asks as it wants to be asked."""

    asked = 0

    def do_PUT(self) -> None:
        self.answer(200 if "X-aws-ec2-metadata-token-ttl-seconds" in self.headers else 400, b"a-token")

    def do_GET(self) -> None:
        Metadata.asked += 1
        over = Metadata.asked > 1
        if self.path.endswith("/spot/instance-action"):
            allowed = self.headers.get("X-aws-ec2-metadata-token") == "a-token"
            self.answer((200 if over else 404) if allowed else 401, b"{}")
        else:
            allowed = self.headers.get("Metadata-Flavor") == "Google"
            self.answer(200 if allowed else 403, b"TRUE" if over else b"FALSE")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("provider", ["aws", "gcp"])
def test_worker_drains_when_its_spot_instance_ends(provider: str, tmp_path: Path) -> None:
    from ray.scripts.scripts import drain_node

    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    program = tmp_path / "ray"
    program.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/called.part && mv {tmp_path}/called.part {tmp_path}/called\n'
    )
    program.chmod(0o755)
    Metadata.asked = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = prepare(provider)["worker_start_ray_commands"][2]
        for old, new in (
            ("http://169.254.169.254", f"http://127.0.0.1:{server.server_port}"),
            ("sleep 5", "sleep 0.1"),
            ("/tmp/", f"{tmp_path}/"),
            ("setsid nohup ", ""),
        ):
            assert old in command
            command = command.replace(old, new)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-c", f"{command} wait"], env=environment, check=True, timeout=60)
        server.shutdown()
    assert Metadata.asked == 2
    name, *words = (tmp_path / "called").read_text().splitlines()
    assert name == "drain-node"
    options = drain_node.make_context(name, words).params
    assert options["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert 0 < options["deadline_remaining_seconds"] < 120
