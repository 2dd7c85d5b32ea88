"""Keys over HTTP: missing, wrong, revoked and rotated ones, without a restart, and in no log.

The server is shared, so its file of keys is put back as it was.
Not covered: how keys are read and compared (test_keys.py), and how long that takes (benchmarks/key_timing.py).
"""

import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import Served

LOOKS_EVERY_S = 1.0
FOLLOWS_S = 30.0
"""In which a change must hold."""


def write_keys(served: Served, *lines: str) -> None:
    """Replace the file in one step, as an operator does."""
    new = served.keys_file.with_suffix(".new")
    new.write_text("".join(f"{line}\n" for line in lines))
    new.chmod(0o600)
    os.replace(new, served.keys_file)


def status_with(served: Served, authorization: str) -> int:
    """What a request with this header gets."""
    return served.request("/v1/models", headers={"authorization": authorization})[0]


def wait_for(served: Served, key: str, status: int) -> None:
    """Ask until the answer is this one."""
    deadline = time.monotonic() + FOLLOWS_S
    while (got := status_with(served, f"Bearer {key}")) != status:
        assert time.monotonic() < deadline, f"still {got} for a key that should get {status}"


@pytest.fixture
def kept_keys(served: Served) -> Iterator[Served]:
    """The server; its keys are put back, and hold again, before the next test."""
    before = served.keys_file.read_text().splitlines()
    yield served
    write_keys(served, *before)
    wait_for(served, served.key, 200)


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("Bearer {key}", 200),
        ("bearer {key}", 200),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("{key}", 401),
        ("Basic {key}", 401),
        ("Bearer {key}x", 401),
        ("Bearer x{key}", 401),
        ("Bearer {key},{key}", 401),
        ("Bearer {upper}", 401),
        ("Bearer {cut}", 401),
        ("Bearer a-key-that-nobody-gave-out", 401),
    ],
)
def test_key_is_taken_whole_or_not_at_all(served: Served, authorization: str, status: int) -> None:
    key = served.key
    header = authorization.format(key=key, upper=key.upper(), cut=key[:-1])
    code, headers, body = served.request("/v1/models", headers={"authorization": header})
    assert code == status
    if status == 401:
        assert headers["www-authenticate"] == "Bearer"
        assert key.encode() not in body
        assert b"r4b" not in body


def test_key_rotated_and_revoked_without_a_restart(kept_keys: Served) -> None:
    old, new = kept_keys.key, secrets.token_hex(20)
    pid = kept_keys.process.pid
    write_keys(kept_keys, f"client {old}", f"client {new}")
    wait_for(kept_keys, new, 200)
    assert status_with(kept_keys, f"Bearer {old}") == 200
    write_keys(kept_keys, f"client {new}")
    wait_for(kept_keys, old, 401)
    assert status_with(kept_keys, f"Bearer {new}") == 200
    assert kept_keys.process.pid == pid


def test_keys_hold_while_their_file_is_broken(kept_keys: Served) -> None:
    new = secrets.token_hex(20)
    write_keys(kept_keys, kept_keys.key, new)
    wait_for(kept_keys, new, 200)
    write_keys(kept_keys, "short")
    deadline = time.monotonic() + 3 * LOOKS_EVERY_S
    while time.monotonic() < deadline:
        assert status_with(kept_keys, f"Bearer {new}") == 200


def test_no_key_is_in_any_log(kept_keys: Served) -> None:
    taken, refused = secrets.token_hex(20), secrets.token_hex(20)
    write_keys(kept_keys, kept_keys.key, taken)
    wait_for(kept_keys, taken, 200)
    wait_for(kept_keys, refused, 401)
    assert kept_keys.request(f"/v1/models?key={taken}")[0] == 200
    found = [path for path in log_files(kept_keys) if holds(path, taken, refused, kept_keys.key)]
    assert found == []


def log_files(served: Served) -> list[Path]:
    """All logs of this server: its own, and those of its Ray session."""
    beside = [path for path in served.log.parent.glob("*.log*") if path.is_file()]
    return [*beside, *(path for path in ray_logs(served) if path.is_file())]


def ray_logs(served: Served) -> list[Path]:
    """Of the Ray session whose raylet is a child of this server."""
    import psutil

    for child in psutil.Process(served.process.pid).children(recursive=True):
        for word in child.cmdline():
            if word.startswith("--session_dir="):
                return list((Path(word.partition("=")[2]) / "logs").rglob("*"))
    raise AssertionError("no process of this server names its Ray session")


def holds(path: Path, *words: str) -> bool:
    """Whether a log has one of these in it."""
    data = path.read_bytes()
    return any(word.encode() in data for word in words)
