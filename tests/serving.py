"""`r4b serve` of the small checkpoint as a user starts it, on loopback, for tests that speak HTTP to it."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.demo import CHECKPOINT, CPU_ENGINE_ARGS
from tests.running import R4B, kill_tree

KEY = "a-key-for-tests-0123456789"
START_S = 240.0


@dataclass(frozen=True)
class Served:
    """A running server: `base_url` without /v1, a valid `key`, the process, its log (stderr) and the keys' file."""

    base_url: str
    key: str
    process: "subprocess.Popen[bytes]"
    log: Path
    keys_file: Path

    def request(
        self,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
        method: str | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (names in lower case) and body of one request; `body` is JSON or bytes as they are."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"authorization": f"Bearer {self.key}", "content-type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.base_url + path, data, sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.status, _lower(response.headers), response.read()
        except urllib.error.HTTPError as error:
            return error.code, _lower(error.headers), error.read()


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def small_settings(**changes: Any) -> dict[str, Any]:
    """Settings of the small checkpoint on a CPU; `changes` are whole sections."""
    engine = {"model": str(CHECKPOINT), "num_gpus": 0, "max_num_seqs": 32, "args": dict(CPU_ENGINE_ARGS)}
    return {"engine": engine, "limits": {"max_tokens": 512}, **changes}


@contextmanager
def serving(
    folder: Path, settings: Mapping[str, Any], *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """Start `r4b serve` and wait until it says that it serves; ended by SIGINT, and killed if that does not do."""
    keys_file = folder / "keys.txt"
    keys_file.write_text(f"{KEY}\n")
    keys_file.chmod(0o600)
    auth = {"keys_file": str(keys_file), **settings.get("auth", {})}
    (folder / "serve.yaml").write_text(yaml.safe_dump({**settings, "auth": auth}))
    port = free_port()
    log = folder / "serve.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [R4B, "serve", str(folder / "serve.yaml"), "--port", str(port), *options],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        )
    try:
        _wait_until_serving(process, log)
        yield Served(f"http://127.0.0.1:{port}", KEY, process, log, keys_file)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
        kill_tree(process.pid)
        process.wait()


def _wait_until_serving(process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    while "Serving at http" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"r4b serve did not come up:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.2)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
