"""`KeyRing`: which keys hold, when they change, and that none is ever shown.

Covers lists of keys, Authorization headers, rotation by every way of writing a file, files that break.
Not covered: how long a comparison takes (`benchmarks/key_timing.py`), HTTP (`test_gate`).
"""

import errno
import logging
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from deployments.keys import ENVIRONMENT, KeyRing, parse_bearer, parse_keys
from pipeline.errors import SpecError

OLD, NEW, THIRD = "old-key-0123456789", "new-key-9876543210", "third-key-555555555"


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def no_keys_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def no_key_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    assert not any(key in caplog.text for key in (OLD, NEW, THIRD))


def write(path: Path, *lines: str) -> Path:
    """A file that was settled long ago."""
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    return path


def replace(path: Path, *lines: str) -> None:
    """Another file in its place, in one step; with the same size and times if the lines are as long."""
    os.replace(write(path.with_name("new"), *lines), path)


def ids(ring: KeyRing, *keys: str) -> list[str | None]:
    return [ring.find(key.encode()) for key in keys]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([OLD], {OLD: sha256(OLD.encode()).hexdigest()[:8]}),
        (["", "# a comment", f"  labelling   {OLD}  ", "#" + NEW], {OLD: "labelling", NEW: None}),
        ([f"\ufefffirst {OLD}\r", f"second {NEW}\r"], {OLD: "first", NEW: "second"}),
        ([f"both {OLD}", f"both {NEW}"], {OLD: "both", NEW: "both"}),
        ([f"a\t{OLD}", NEW], {OLD: "a", NEW: sha256(NEW.encode()).hexdigest()[:8], THIRD: None}),
        (["k" * 10_000], {"k" * 10_000: sha256(b"k" * 10_000).hexdigest()[:8], "k" * 9_999: None}),
    ],
)
def test_key_ring_takes_the_keys_of_a_file(tmp_path: Path, lines: list[str], expected: dict[str, str | None]) -> None:
    ring = KeyRing(str(write(tmp_path / "keys", *lines)))
    assert {key: ring.find(key.encode()) for key in expected} == expected


@pytest.mark.parametrize(
    "token",
    [None, b"", b" ", OLD[:-1].encode(), OLD.encode() + b"x", OLD.upper().encode(), b"\xff\xfe" * 40, b"x" * 1_000_000]
    + [b"first", f"first {OLD}".encode(), sha256(OLD.encode()).digest(), sha256(OLD.encode()).hexdigest().encode()],
)
def test_key_ring_takes_nothing_but_a_whole_key(tmp_path: Path, token: bytes | None) -> None:
    assert KeyRing(str(write(tmp_path / "keys", f"first {OLD}"))).find(token) is None


def test_key_ring_takes_keys_of_environment_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, f" {OLD}, eval {NEW},,")
    path = write(tmp_path / "keys", f"third {THIRD}")
    assert ids(KeyRing(str(path)), NEW, THIRD) == ["eval", "third"]
    assert ids(KeyRing(), OLD, NEW, THIRD) == [sha256(OLD.encode()).hexdigest()[:8], "eval", None]


@pytest.mark.parametrize("value", [None, "", " , ,", "#"])
def test_key_ring_without_any_key_is_refused(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv(ENVIRONMENT, value)
    with pytest.raises(SpecError, match=ENVIRONMENT):
        KeyRing()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tooshort-secret", "line 2: a key has at least 16 characters, this one has 15"),
        ("name tooshort-secret", "at least 16"),
        ("secret-secret-secret name", "at least 16"),
        ("secret-secret-secret secret-secret-secret2", "at most 15"),
        ("na/me secret-secret-secret", "at most 15"),
        ("name secret-secret-secret more", "spaces"),
        ("secret-sécret-secret", "ASCII"),
        ("secret,secret-secret", "commas"),
        ("secret\0secret-secret", "ASCII"),
    ],
)
def test_key_ring_refuses_a_line_by_its_number_and_shows_no_secret(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        KeyRing(str(write(tmp_path / "keys", OLD, line)))
    assert words in str(caught.value)
    assert "line 2" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "cret" not in repr(caught.value.__cause__)


def test_key_ring_refuses_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe" + OLD.encode("utf-16-le"))
    (tmp_path / "large").write_bytes(b"#" * (1 << 20) + b"\n" + OLD.encode())
    write(tmp_path / "empty")
    for name, words in (
        ("binary", "UTF-8"),
        ("large", "larger"),
        ("empty", "no API key"),
        ("none", "No such"),
        ("", "directory"),
    ):
        with pytest.raises(SpecError, match=words):
            KeyRing(str(tmp_path / name))


def test_key_ring_follows_a_file_that_is_replaced(tmp_path: Path, clock: Clock) -> None:
    path = write(tmp_path / "keys", OLD)
    ring = KeyRing(str(path), clock)
    for key, gone in ((NEW, OLD), (THIRD, NEW)):
        replace(path, key)
        clock.now += 1.0
        assert ring.find(gone.encode()) is None
        assert ring.find(key.encode()) is not None


def test_key_ring_reads_no_file_more_than_once_a_second(tmp_path: Path, clock: Clock) -> None:
    path = write(tmp_path / "keys", OLD)
    ring = KeyRing(str(path), clock)
    replace(path, NEW)
    clock.now += 0.99
    assert ring.find(OLD.encode()) is not None
    clock.now += 0.02
    assert ring.find(OLD.encode()) is None
    replace(path, OLD)
    clock.now += 0.99
    assert ring.find(OLD.encode()) is None


def test_key_ring_sees_a_file_written_in_place_twice_in_a_moment(tmp_path: Path, clock: Clock) -> None:
    """Same inode, same size, and perhaps the same tick of the clock."""
    path = tmp_path / "keys"
    path.write_text(OLD)
    ring = KeyRing(str(path), clock)
    for key in (NEW, OLD, NEW, OLD, NEW):
        facts = path.stat()
        path.write_text(key)
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        clock.now += 1.0
        assert [ring.find(one.encode()) is not None for one in (OLD, NEW)] == [key == OLD, key == NEW]


def test_key_ring_follows_a_link_that_is_switched(tmp_path: Path, clock: Clock) -> None:
    """As Kubernetes changes a mounted secret."""
    write(tmp_path / "one", OLD)
    write(tmp_path / "two", NEW)
    path = tmp_path / "keys"
    path.symlink_to("one")
    ring = KeyRing(str(path), clock)
    (tmp_path / "link").symlink_to("two")
    os.replace(tmp_path / "link", path)
    clock.now += 1.0
    assert ring.find(NEW.encode()) is not None
    assert ring.find(OLD.encode()) is None


@pytest.mark.parametrize("lines", [[], ["# nothing"], ["short"], ["\ud800"], [NEW, "a b c"], None])
def test_key_ring_keeps_its_keys_while_the_file_is_broken(
    tmp_path: Path, clock: Clock, lines: list[str] | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "keys", OLD)
    ring = KeyRing(str(path), clock)
    if lines is None:
        path.unlink()
    else:
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    for _ in range(5):
        clock.now += 1.0
        assert ring.find(OLD.encode()) is not None
        assert ring.find(NEW.encode()) is None
    assert [record.levelname for record in caplog.records if record.levelno >= logging.WARNING] == ["WARNING"]
    replace(path, NEW)
    clock.now += 1.0
    assert ring.find(OLD.encode()) is None
    assert ring.find(NEW.encode()) is not None


def test_key_ring_keeps_its_keys_while_the_file_may_not_be_read(tmp_path: Path, clock: Clock) -> None:
    path = write(tmp_path / "keys", OLD)
    ring = KeyRing(str(path), clock)
    path.unlink()
    path.mkdir()
    clock.now += 1.0
    assert ring.find(OLD.encode()) is not None


def test_key_ring_revocation_that_could_not_be_read_is_read_again(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_files(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    path = write(tmp_path / "keys", OLD)
    ring = KeyRing(str(path), clock)
    replace(path, NEW)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", out_of_files)
        clock.now += 1.0
        assert ring.find(OLD.encode()) is not None
    clock.now += 1.0
    assert ring.find(OLD.encode()) is None


def test_key_ring_revoked_key_is_refused_and_the_others_stay(tmp_path: Path, clock: Clock) -> None:
    path = write(tmp_path / "keys", f"a {OLD}", f"b {NEW}")
    ring = KeyRing(str(path), clock)
    replace(path, f"b {NEW}", f"c {THIRD}")
    clock.now += 1.0
    assert ids(ring, OLD, NEW, THIRD) == [None, "b", "c"]


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True), (0o602, True)])
def test_key_ring_warns_of_a_file_that_others_can_read(
    tmp_path: Path, mode: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "keys", OLD)
    path.chmod(mode)
    KeyRing(str(path))
    assert any(record.levelno == logging.WARNING for record in caplog.records) == warned


def test_key_ring_holds_and_shows_no_key(tmp_path: Path) -> None:
    ring = KeyRing(str(write(tmp_path / "keys", f"first {OLD}")))
    assert OLD not in repr(vars(ring))
    assert OLD.encode() not in repr(vars(ring)).encode()


@pytest.mark.parametrize(
    ("values", "token"),
    [
        ([b"Bearer abc"], b"abc"),
        ([b"bearer abc"], b"abc"),
        ([b"BEARER   abc  "], b"abc"),
        ([b"Bearer \xc3\xa9\xff"], b"\xc3\xa9\xff"),
        ([b"Bearer " + b"k" * 100_000], b"k" * 100_000),
        ([b"Bearer a b"], b"a b"),
        ([], None),
        ([b""], None),
        ([b"abc"], None),
        ([b"Bearer"], None),
        ([b"Bearer "], None),
        ([b"Bearer\tabc"], None),
        ([b"Bearerabc"], None),
        ([b"Basic YTpi"], None),
        ([b"\xff\xff abc"], None),
        ([b"Bearer abc", b"Bearer abc"], None),
        ([b"Bearer abc", b"Basic YTpi"], None),
    ],
)
def test_parse_bearer_finds_the_only_token(values: list[bytes], token: bytes | None) -> None:
    names = (b"authorization", b"Authorization")
    headers = [(b"host", b"x"), *((names[index % 2], value) for index, value in enumerate(values))]
    assert parse_bearer(headers) == token


def test_parse_keys_gives_digests_only() -> None:
    (key,) = parse_keys([f"first {OLD}"], "line")
    assert (key.key_id, key.digest) == ("first", sha256(OLD.encode()).digest())
