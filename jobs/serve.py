"""`r4b serve`: a deployment on this machine, until Ctrl-C.

Ray, Serve and HAProxy are started here and end with the command. A cluster is `serve deploy`'s (docs/serving.md).
Not covered: what a deployment is (`deployments`), which is imported only when it is served.
"""

import contextlib
import io
import ipaddress
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.spec_file import apply_override, read_yaml
from pipeline.cluster import silent_stderr
from pipeline.engine.models import check_model, is_local
from pipeline.errors import JobError, SpecError
from pipeline.storage import absolute_url

SERVE_ENVIRONMENT = {
    # Serve's Python proxy halves the throughput; HAProxy goes to the replicas directly (docs/serving.md has figures).
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A replica that leaves stays reachable this long; HAProxy on the same machine learns of it within a second.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    # Where a replica ended without a word, and HAProxy still has the whole request, another one answers. Asking a model
    # twice does no harm.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    # With each change of replicas HAProxy is replaced, and the old one is ended after this, with all that still runs by
    # it: longer than any request, and than graceful_shutdown_timeout_s. Ray's 120 s would cut long thoughts.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    # On a machine that starts an engine meanwhile, 5 s are not always enough for HAProxy to come up.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    # Ten looks a second at what has to be done are a twentieth of a core, here shared with an engine.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_worker_niceness": "0",  # at Ray's 15 anything else on the machine starves the engine
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's C++ core writes to our terminal
}


# Serve's own are fixed, and a second server on the same machine would not start.
SERVE_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
REACHABLE_S = 60
SERVE_LOGS = {"enable_access_log": False, "log_level": "WARNING"}


def load_settings(path: str | None, overrides: Sequence[str], auth: bool) -> dict[str, Any]:
    """The settings' mapping, checked; raises SpecError."""
    from deployments.settings import parse_settings

    data = {} if path is None else read_yaml(path)
    for override in overrides:
        apply_override(data, override)
    if not auth:
        apply_override(data, "auth.required=false")
    settings = parse_settings(data, path or "the settings")
    check_model(settings.engine)
    if is_local(settings.engine.model):
        apply_override(data, f"engine.model={absolute_url(settings.engine.model)}")
    for key, path in (("auth.keys_file", settings.auth.keys_file), ("access_log", settings.access_log)):
        if path is not None:
            apply_override(data, f"{key}={absolute_url(path)}")
    if settings.auth.required:
        check_keys(settings.auth.keys_file)
    return dict(data)


def asks_for_keys(settings: dict[str, Any]) -> bool:
    """Whether a deployment with these settings lets in only who has a key."""
    from deployments.settings import parse_settings

    return parse_settings(settings, "the settings").auth.required


def check_keys(path: str | None) -> None:
    """Raise SpecError, before the engine starts, when no key can be read."""
    from deployments.keys import KeyRing

    KeyRing(path)


def check_listening(host: str, port: int, auth: bool) -> None:
    """Raise SpecError for an address that cannot be listened on, or that is open to others without keys."""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise SpecError(
            f"--host: {host} is not an IP address; 127.0.0.1 is this machine, 0.0.0.0 all of it."
        ) from error
    if not auth and not is_loopback:
        raise SpecError(f"--host: without keys the server listens on loopback only, and this is {host}.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SpecError(f"--port: {host}:{port} cannot be listened on: {error.strerror}.") from error


def serve_here(settings: dict[str, Any], host: str, port: int, on_ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; raises JobError when the deployment does not start."""
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_heeding_signals(stop))
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        stack.enter_context(local_serve(host, port))
        stack.enter_context(_heeding_signals(stop))  # Ray put its own over ours: SIGTERM would end the process at once
        deploy(settings, host, port)
        on_ready()
        stop.wait()


@contextlib.contextmanager
def local_serve(host: str, port: int, **ray_options: Any) -> Iterator[None]:
    """Ray and Serve on this machine, with nothing deployed yet; raises JobError."""
    with _serve_environment():
        import ray
        from ray import serve

        try:
            _start_ray(ray, ray_options)
            with silent_stderr():
                serve.start(http_options={"host": host, "port": port}, logging_config=SERVE_LOGS)
            yield
        except ray.exceptions.RayError as error:
            raise JobError(f"Ray Serve: {' '.join(str(error).split())[:500]}") from error
        finally:
            # Ray prints to both that it tries again to end what has ended.
            with silent_stderr(), contextlib.redirect_stdout(io.StringIO()):
                try:
                    serve.shutdown()
                finally:
                    ray.shutdown()


def deploy(settings: dict[str, Any], host: str, port: int) -> None:
    """Deploy, or update what is deployed, replica by replica; returns when it answers, raises JobError."""
    from ray import serve

    from deployments.app import NAME, build

    try:
        with silent_stderr():
            serve.run(build(settings), name=NAME, logging_config=SERVE_LOGS)
    except RuntimeError as error:
        raise JobError(f"The deployment did not start: {_last_words(serve, NAME) or error}") from error
    _wait_until_reachable(host, port)


def _start_ray(ray: Any, options: dict[str, Any]) -> None:
    fixed = {"address": "local", "include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        with silent_stderr():
            ray.init(**fixed, **options)
    except Exception as error:  # Ray raises plain ones
        raise JobError(f"Ray cannot be started here: {' '.join(str(error).split())[:300]}") from error


def _wait_until_reachable(host: str, port: int) -> None:
    """Serve says that the replica runs a moment before HAProxy knows of it."""
    local = "127.0.0.1" if host == "0.0.0.0" else "[::1]" if host == "::" else f"[{host}]" if ":" in host else host
    for _ in range(REACHABLE_S * 5):
        try:
            urllib.request.urlopen(f"http://{local}:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise JobError(f"The deployment runs, but nothing answers at {local}:{port}.")


def _last_words(serve: Any, name: str) -> str:
    """The replica's own error: the last line of the traceback that Serve tells."""
    status = serve.status().applications.get(name)
    messages = [deployment.message for deployment in status.deployments.values()] if status else []
    lines = [line.strip() for line in "\n".join(messages).splitlines() if line.strip()]
    return lines[-1].partition("Error: ")[2][:1000] if lines else ""


@contextlib.contextmanager
def _heeding_signals(stop: threading.Event) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the waiting, or the start if that is not done yet."""

    def handle(number: int, frame: Any) -> None:
        stop.set()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _serve_environment() -> Iterator[None]:
    """Serve and HAProxy read the environment; HAProxy's sockets, which control it, go where only we may look."""
    folder = tempfile.mkdtemp(prefix="r4b-serve-")
    paths = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    }
    binary = Path(sys.executable).with_name("r4b-haproxy")
    values = {
        **SERVE_ENVIRONMENT,
        **{name: str(_free_port()) for name in SERVE_PORTS},
        **{name: str(Path(folder) / path) for name, path in paths.items()},
        **({"RAY_SERVE_HAPROXY_BINARY_PATH": str(binary)} if binary.exists() else {}),
    }
    for name, value in values.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
