"""`LocalStore` and `S3Store` behave alike: one table of behaviours, run on a disk and on a real S3 store.

Also covers what only one of them has: errors that hold no secret, the number of requests, globs as regular expressions.
Not covered: an endpoint that cannot be reached (boto3 tries for half a minute).
"""

import fcntl
import io
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import botocore.auth
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError, ResponseStreamingError
from botocore.response import StreamingBody
from urllib3.exceptions import SSLError

from pipeline.errors import ShardChangedError, SpecError, StorageError, StoreUnavailableError
from pipeline.spec import StorageSpec
from pipeline.storage import LocalStore, S3Store, Store, absolute_url, glob_to_regex, join_url, open_store, split_s3
from tests.s3_server import S3Server

ODD_NAMES = (
    "with space.txt",
    "ümläut é.txt",
    "日本 😀.txt",
    "plus+percent%20hash#and&amp.txt",
    "quote'\".txt",
    "trailing. .txt",
    "=,;:@!$().txt",
)


@dataclass(frozen=True)
class Place:
    """A store and an empty folder or prefix in it."""

    store: Store
    url: str

    def at(self, name: str) -> str:
        return f"{self.url}/{name}"

    def put(self, *names: str) -> None:
        for name in names:
            self.store.put(self.at(name), name.encode())

    def names(self, url: str) -> list[str]:
        """Names below the place, as `list` gives them for a URL below it."""
        return [info.url.removeprefix(self.url + "/") for info in self.store.list(self.url + url)]

    def version(self, name: str) -> str:
        info = self.store.stat(self.at(name))
        assert info is not None
        return info.version


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place(LocalStore(), str(tmp_path / "place"))
    return s3_place(request.getfixturevalue("s3"))


def s3_place(server: S3Server) -> Place:
    url = f"{server.fresh_prefix('storage')}/place"
    return Place(open_store(url, StorageSpec(endpoint_url=server.endpoint_url)), url)


# Listing.


def test_list_folder_gives_all_below_it_sorted(place: Place) -> None:
    place.put("b.txt", "a/2.txt", "a/1.txt", "a/deep/er/0.txt", "c/1.txt")
    everything = ["a/1.txt", "a/2.txt", "a/deep/er/0.txt", "b.txt", "c/1.txt"]
    assert place.names("") == place.names("/") == everything
    assert place.names("/a") == place.names("/a/") == everything[:3]
    assert place.names("/a/deep") == ["a/deep/er/0.txt"]


def test_list_tells_url_size_and_the_version_that_stat_tells(place: Place) -> None:
    place.put("a/1.txt")
    (info,) = place.store.list(place.at("a/"))
    assert info == place.store.stat(place.at("a/1.txt"))
    assert (info.url, info.size) == (place.at("a/1.txt"), 7)


def test_list_one_object_is_itself_and_not_what_begins_like_it(place: Place) -> None:
    place.put("a.txt", "a.txt.bak", "a.txt-2", "ab/c.txt")
    assert place.names("/a.txt") == ["a.txt"]
    assert place.names("/a") == []


def test_list_nothing_there_is_empty(place: Place) -> None:
    place.put("a.txt")
    for url in ("/absent", "/absent/", "/absent/*.txt", "/a.txt/", "/a.txt/b"):
        assert place.names(url) == []


def test_list_odd_names_come_back_as_they_were_written(place: Place) -> None:
    place.put(*(f"odd dir é/{name}" for name in ODD_NAMES))
    assert set(place.names("/odd dir é")) == {f"odd dir é/{name}" for name in ODD_NAMES}
    for name in ODD_NAMES:
        assert place.names(f"/odd dir é/{name}") == [f"odd dir é/{name}"]
        assert place.store.read(place.at(f"odd dir é/{name}")) == f"odd dir é/{name}".encode()


@pytest.mark.parametrize("name", ["a[1].txt", "what?.txt", "star*.txt"])
def test_list_name_with_glob_characters_that_exists_is_itself(place: Place, name: str) -> None:
    place.put(name, "a1.txt", "whatx.txt", "starry.txt")
    assert place.names(f"/{name}") == [name]


TREE = (
    "a.png",
    "b.png",
    "b.txt",
    "ab.png",
    "d/a.png",
    "d/e/a.png",
    "d/e/b.txt",
)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.png", ["a.png", "ab.png", "b.png"]),
        ("?.png", ["a.png", "b.png"]),
        ("[ac].png", ["a.png"]),
        ("[!a].png", ["b.png"]),
        ("[a-c].*", ["a.png", "b.png", "b.txt"]),
        ("*/*.png", ["d/a.png"]),
        ("d/*", ["d/a.png"]),
        ("d/**/*.png", ["d/a.png", "d/e/a.png"]),
        ("**/*.png", ["a.png", "ab.png", "b.png", "d/a.png", "d/e/a.png"]),
        ("**/e/*", ["d/e/a.png", "d/e/b.txt"]),
        ("d/**", ["d/a.png", "d/e/a.png", "d/e/b.txt"]),
        ("d**.png", []),
        ("**.png", ["a.png", "ab.png", "b.png"]),
        ("*.jpg", []),
    ],
)
def test_list_glob_means_the_same_on_every_store(place: Place, pattern: str, names: list[str]) -> None:
    place.put(*TREE)
    assert sorted(place.names(f"/{pattern}")) == names


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.png", ["a.png"]),
        ("**/*.png", ["a.png", "d/a.png"]),
        ("d/?b.png", []),
        (".tmp-*", [".tmp-1.png"]),
        ("d/.*", ["d/.b.png"]),
    ],
)
def test_list_glob_leaves_hidden_files_unless_it_names_the_dot(place: Place, pattern: str, names: list[str]) -> None:
    place.put("a.png", "d/a.png", ".tmp-1.png", ".hidden/a.png", "d/.b.png", "d/.hidden/a.png")
    assert sorted(place.names(f"/{pattern}")) == names


def test_list_while_files_vanish_goes_on(place: Place) -> None:
    """Another writer's temporary files come and go while this one lists."""
    place.put("a.txt", "b.txt", "c.txt")
    listing = place.store.list(place.url + "/")
    assert next(listing).url == place.at("a.txt")
    place.store.delete(place.at("b.txt"))
    assert place.at("c.txt") in [info.url for info in listing]


def test_list_local_writers_leave_no_temporary_file_behind(tmp_path: Path) -> None:
    place = Place(LocalStore(), str(tmp_path))
    place.put("a.txt")
    assert place.store.put_if_absent(place.at("a.txt"), b"other") is False
    assert place.store.replace(place.at("a.txt"), b"other", "no such version") is False
    assert place.store.replace(place.at("absent.txt"), b"other", "no such version") is False
    assert os.listdir(tmp_path) == ["a.txt"]


def test_list_s3_of_more_than_one_page_is_complete(s3: S3Server) -> None:
    place = s3_place(s3)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: place.put(f"{n:04d}"), range(1010)))
    assert place.names("/") == [f"{n:04d}" for n in range(1010)]


# Writing.


def test_put_if_absent_takes_the_name_once(place: Place) -> None:
    assert place.store.put_if_absent(place.at("new/folder/a"), b"first") is True
    version = place.version("new/folder/a")
    assert place.store.put_if_absent(place.at("new/folder/a"), b"second, and longer") is False
    assert place.store.read(place.at("new/folder/a")) == b"first"
    assert place.version("new/folder/a") == version


def test_put_if_absent_of_sixteen_racing_threads_has_one_winner(place: Place) -> None:
    gate = threading.Barrier(16)

    def write(n: int) -> bool:
        gate.wait(timeout=30)
        return place.store.put_if_absent(place.at("race"), f"writer {n}".encode() * 1000)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(write, range(16)))
    assert sum(won) == 1
    assert place.store.read(place.at("race")) == f"writer {won.index(True)}".encode() * 1000
    assert place.names("/") == ["race"]


def test_put_overwrites_whatever_is_there(place: Place) -> None:
    place.store.put(place.at("a"), b"first")
    place.store.put(place.at("a"), b"second, and longer")
    assert place.store.read(place.at("a")) == b"second, and longer"


def test_put_nothing_makes_an_empty_object(place: Place) -> None:
    place.store.put(place.at("_SUCCESS"), b"")
    info = place.store.stat(place.at("_SUCCESS"))
    assert info is not None
    assert info.size == 0
    assert place.store.read(place.at("_SUCCESS")) == b""


def test_replace_needs_the_present_version(place: Place) -> None:
    place.store.put(place.at("a"), b"one")
    first = place.version("a")
    assert place.store.replace(place.at("a"), b"wrong version", "0" * 32) is False
    assert place.store.read(place.at("a")) == b"one"
    assert place.store.replace(place.at("a"), b"right version", first) is True
    assert place.store.replace(place.at("a"), b"stale", first) is False
    assert place.store.read(place.at("a")) == b"right version"
    assert place.store.replace(place.at("absent"), b"no such object", first) is False
    assert place.names("/") == ["a"]


def test_replace_of_racing_threads_has_one_winner(place: Place) -> None:
    place.store.put(place.at("a"), b"old")
    version = place.version("a")
    gate = threading.Barrier(8)

    def write(n: int) -> bool:
        gate.wait(timeout=30)
        return place.store.replace(place.at("a"), b"x" * (10 + n), version)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert sum(won) == 1
    assert place.store.read(place.at("a")) == b"x" * (10 + won.index(True))


def test_delete_removes_and_may_be_repeated(place: Place) -> None:
    place.put("a", "b")
    place.store.delete(place.at("a"))
    place.store.delete(place.at("a"))
    assert place.names("/") == ["b"]


def test_stat_of_nothing_and_of_a_folder_is_none(place: Place) -> None:
    place.put("folder/a")
    for name in ("absent", "folder", "folder/a/b", "absent/a"):
        assert place.store.stat(place.at(name)) is None


# Reading.


def test_open_range_reads_equal_the_bytes(place: Place) -> None:
    data = os.urandom(200_000)
    place.store.put(place.at("a"), data)
    with place.store.open(place.at("a")) as file:
        assert file.seekable()
        assert file.readable()
        assert file.seek(0, io.SEEK_END) == len(data)
        assert file.read() == b""
        assert file.seek(-8, io.SEEK_END) == len(data) - 8
        assert file.read(4) == data[-8:-4]
        assert file.tell() == len(data) - 4
        assert file.read(100) == data[-4:]
        for start, size in ((0, 1), (1, 70_000), (65_535, 2), (131_072, 65_536), (199_999, 5), (10, 0)):
            assert file.seek(start) == start
            assert file.read(size) == data[start : start + size]
        file.seek(100)
        file.seek(50, io.SEEK_CUR)
        assert file.read(7) == data[150:157]
        file.seek(len(data) + 1000)
        assert file.read(10) == b""
        file.seek(150_000)
        assert file.read() == data[150_000:]
    assert place.store.read(place.at("a")) == data
    assert place.store.read(place.at("a"), place.version("a")) == data


def test_open_pyarrow_reads_parquet_through_it(place: Place) -> None:
    table = pa.table({"n": list(range(20_000)), "text": [f"row {n}" for n in range(20_000)]})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=3000)
    place.store.put(place.at("a.parquet"), sink.getvalue())
    with place.store.open(place.at("a.parquet")) as file:
        shard = pq.ParquetFile(file, pre_buffer=True)
        assert shard.read_row_groups([2, 6], use_threads=False).equals(
            pa.concat_tables([table.slice(6000, 3000), table.slice(18_000, 2000)])
        )


def test_open_of_another_version_or_of_nothing_is_shard_changed(place: Place) -> None:
    place.store.put(place.at("a"), b"one")
    version = place.version("a")
    assert place.store.read(place.at("a"), version) == b"one"
    place.store.put(place.at("a"), b"other")
    for read in (place.store.open, place.store.read):
        with pytest.raises(ShardChangedError, match=r"place/a changed after the job was planned"):
            read(place.at("a"), version)
    place.store.delete(place.at("a"))
    for wanted in (version, None):
        with pytest.raises(ShardChangedError, match=r"place/a is gone"):
            place.store.open(place.at("a"), wanted)


def test_open_object_replaced_while_it_is_read_never_mixes_versions(place: Place) -> None:
    place.store.put(place.at("a"), b"1" * 300_000)
    with place.store.open(place.at("a")) as file:
        assert file.read(10) == b"1" * 10
        place.store.put(place.at("a"), b"22" * 300_000)
        try:
            rest = file.read()
        except ShardChangedError as error:
            assert "changed or vanished while it was read" in str(error)  # noqa: PT017 - a disk need not raise
        else:
            assert rest == b"1" * 299_990


def test_open_shard_changed_reaches_through_pyarrow(s3: S3Server) -> None:
    place = s3_place(s3)
    sink = io.BytesIO()
    pq.write_table(pa.table({"n": list(range(100_000))}), sink)
    place.store.put(place.at("a"), sink.getvalue())
    with place.store.open(place.at("a")) as file:
        shard = pq.ParquetFile(file, pre_buffer=True)
        place.store.put(place.at("a"), sink.getvalue() + b"grown")
        with pytest.raises(ShardChangedError, match="changed or vanished while it was read"):
            shard.read(use_threads=False)


def test_read_s3_object_takes_one_request_for_its_bytes(s3: S3Server) -> None:
    place = s3_place(s3)
    data = os.urandom(3_000_000)
    place.store.put(place.at("a"), data)
    sent: list[str] = []
    store = S3Store(StorageSpec(endpoint_url=s3.endpoint_url), timeout_s=29.0)  # its own client: clients are shared
    store.client.meta.events.register("before-send.s3", lambda **event: sent.append(event["event_name"]))
    assert store.read(place.at("a")) == data
    assert len([name for name in sent if name.endswith("GetObject")]) <= 2
    assert len(sent) <= 3


# What only a disk has.


def test_local_folder_for_a_file_and_file_for_a_folder_are_storage_errors(tmp_path: Path) -> None:
    store = LocalStore()
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(StorageError, match=r"folder cannot be read: Is a directory"):
        store.read(str(tmp_path / "folder"))
    for write in (store.put, store.put_if_absent):
        with pytest.raises(StorageError, match=r"/file cannot be written: "):
            write(str(tmp_path / "file" / "x"), b"data")


def test_local_replace_waits_for_the_lock_and_then_looks_at_the_version(tmp_path: Path) -> None:
    """A disk has no compare-and-swap: without the lock another writer could come between look and write."""
    store, path = LocalStore(), str(tmp_path / "a")
    store.put(path, b"old")
    info = store.stat(path)
    assert info is not None
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(store.replace(path, b"mine", info.version)))
    holder = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        store.put(path, b"of another writer")
    finally:
        os.close(holder)
    thread.join(30)
    assert results == [False]
    assert store.read(path) == b"of another writer"


def test_local_files_are_readable_for_others(tmp_path: Path) -> None:
    store = LocalStore()
    store.put(str(tmp_path / "a"), b"x")
    store.put_if_absent(str(tmp_path / "b"), b"x")
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o644, 0o644]


def test_local_names_that_are_not_utf8_are_listed_and_read(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    (info,) = LocalStore().list(str(tmp_path))
    assert os.fsencode(info.url).endswith(b"/caf\xe9.png")
    assert LocalStore().read(info.url, info.version) == b"x"


def test_local_listing_sorts_files_and_folders_as_s3_keys_do(tmp_path: Path) -> None:
    place = Place(LocalStore(), str(tmp_path))
    names = ["a b.txt", "a", "a-1/x", "a0", "b.d/x", "b/x", "b0"]
    place.put(*names)
    assert place.names("/") == sorted(names)


def test_local_dangling_link_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    (tmp_path / "a").write_bytes(b"x")
    assert [os.path.basename(info.url) for info in LocalStore().list(str(tmp_path))] == ["a"]


# What only S3 has.


def everything_of(error: BaseException) -> str:
    """All that a traceback would show, chained errors included."""
    return "".join(traceback.format_exception(error)) + repr(error) + repr(error.__cause__) + str(vars(error))


@pytest.mark.parametrize(
    ("credentials", "says", "timeout_s"),  # the time, different from others, keeps the clients of other tests away
    [
        ({"AWS_SECRET_ACCESS_KEY": "hidden-but-wrong-secret"}, r"the store answered \S+ \(403\)", 11.0),
        ({"AWS_ACCESS_KEY_ID": "UNKNOWN", "AWS_SECRET_ACCESS_KEY": "hidden"}, r"the store answered \S+ \(403\)", 12.0),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no S3 credentials found where boto3", 13.0),
    ],
    ids=["wrong secret", "unknown key", "none"],
)
def test_s3_bad_credentials_are_storage_errors_without_the_secret(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, credentials: dict[str, str | None], says: str, timeout_s: float
) -> None:
    place = s3_place(s3)
    place.put("a")
    for name, value in credentials.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers the credentials it found before
    store = S3Store(StorageSpec(endpoint_url=s3.endpoint_url), timeout_s)
    for call in (
        lambda: list(store.list(place.url + "/")),
        lambda: store.read(place.at("a")),
        lambda: store.stat(place.at("a")),
        lambda: store.put(place.at("b"), b"x"),
        lambda: store.put_if_absent(place.at("b"), b"x"),
        lambda: store.replace(place.at("a"), b"x", "0" * 32),
        lambda: store.delete(place.at("a")),
    ):
        with pytest.raises(StorageError, match=says) as caught:
            call()
        assert str(caught.value).startswith(place.url)
        for secret in (credentials["AWS_SECRET_ACCESS_KEY"], s3.secret_key):
            assert secret is None or secret not in everything_of(caught.value)
    assert place.names("/") == ["a"]


def test_s3_missing_bucket_is_a_storage_error_that_names_it(s3: S3Server) -> None:
    store = s3_place(s3).store
    url = "s3://no-such-bucket/a"
    for call in (
        lambda: list(store.list("s3://no-such-bucket/")),
        lambda: store.put(url, b"x"),
        lambda: store.put_if_absent(url, b"x"),
    ):
        with pytest.raises(StorageError, match=r"^s3://no-such-bucket/.*: the store answered NoSuchBucket \(404\)"):
            call()
    assert store.stat(url) is None


def test_s3_name_that_no_bucket_can_have_is_a_storage_error(s3: S3Server) -> None:
    store = s3_place(s3).store
    for call in (lambda: list(store.list("s3://No Bucket/")), lambda: store.stat("s3://No Bucket/a")):
        with pytest.raises(StorageError, match=r"^s3://No Bucket/"):
            call()


@contextmanager
def answering(*answers: tuple[int, str]) -> Iterator[tuple[str, list[str]]]:
    """A server that gives these answers (status, S3's error code) in turn, the last one for ever; and the requests."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.do_PUT()

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, code = answers[min(len(requests), len(answers) - 1)]
            requests.append(self.path)
            body = (
                code.encode()
                if code.startswith("<")
                else b""
                if not code
                else f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
            )
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"etag"')
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def any_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        if name not in os.environ:
            monkeypatch.setenv(name, "any")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)


@pytest.mark.usefixtures("any_credentials")
def test_s3_put_that_the_store_refuses_is_never_taken_for_done() -> None:
    with answering((409, "OperationAborted")) as (endpoint, _):
        store = S3Store(StorageSpec(endpoint_url=endpoint))
        with pytest.raises(StorageError, match="OperationAborted"):
            store.put("s3://bucket/_SUCCESS", b"")


@pytest.mark.usefixtures("any_credentials")
@pytest.mark.parametrize("code", ["PreconditionFailed", ""])  # not every store explains a 412
def test_s3_put_if_absent_of_a_taken_name_is_false(code: str) -> None:
    with answering((412, code)) as (endpoint, _):
        assert S3Store(StorageSpec(endpoint_url=endpoint)).put_if_absent("s3://bucket/a", b"x") is False


@pytest.mark.usefixtures("any_credentials")
def test_s3_put_if_absent_in_conflict_is_not_taken_for_a_taken_name() -> None:
    """S3 answers 409 where another request on the name was under way: nobody may have written."""
    with answering((409, "ConditionalRequestConflict")) as (endpoint, _):
        store = S3Store(StorageSpec(endpoint_url=endpoint))
        with pytest.raises(StorageError, match="ConditionalRequestConflict"):
            store.put_if_absent("s3://bucket/a", b"x")


@pytest.mark.usefixtures("any_credentials")
def test_s3_put_if_absent_in_conflict_is_tried_again() -> None:
    with answering((409, "ConditionalRequestConflict"), (200, "")) as (endpoint, requests):
        assert S3Store(StorageSpec(endpoint_url=endpoint)).put_if_absent("s3://bucket/a", b"x") is True
    assert len(requests) == 2


@pytest.mark.usefixtures("any_credentials")
def test_s3_throttled_write_is_tried_again() -> None:
    with answering((503, "SlowDown"), (200, "")) as (endpoint, requests):
        store = S3Store(StorageSpec(endpoint_url=endpoint))
        assert store.put_if_absent("s3://bucket/a", b"x") is True
    assert len(requests) == 2


@pytest.mark.usefixtures("any_credentials")
def test_s3_denied_write_is_told_at_once() -> None:
    with answering((403, "AccessDenied")) as (endpoint, requests):
        store = S3Store(StorageSpec(endpoint_url=endpoint))
        with pytest.raises(StorageError, match=r"s3://bucket/a: the store answered AccessDenied \(403\)"):
            store.put_if_absent("s3://bucket/a", b"x")
    assert len(requests) == 1


@pytest.mark.usefixtures("any_credentials")
@pytest.mark.parametrize(
    ("answer", "unavailable"),
    [
        ((403, "AccessDenied"), False),
        ((400, "ExpiredToken"), True),
        ((403, "ExpiredToken"), True),
        ((403, "InvalidAccessKeyId"), True),
        ((403, "RequestTimeTooSkewed"), True),
    ],
)
def test_s3_refusal_of_one_object_differs_from_one_of_all(answer: tuple[int, str], unavailable: bool) -> None:
    with answering(answer) as (endpoint, requests), pytest.raises(StorageError, match=answer[1]) as caught:
        list(S3Store(StorageSpec(endpoint_url=endpoint)).list("s3://bucket/folder/"))
    assert isinstance(caught.value, StoreUnavailableError) is unavailable
    assert len(requests) == 1  # a store that never answered is not waited for


@pytest.mark.usefixtures("any_credentials")
@pytest.mark.parametrize("code", ["ExpiredToken", "RequestTimeTooSkewed", "SlowDown"])
def test_s3_listing_outlasts_the_outage_of_a_store_that_has_answered(code: str) -> None:
    listing = "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
    with answering((200, listing), *[(400, code)] * 2, (200, listing)) as (endpoint, requests):
        store = S3Store(StorageSpec(endpoint_url=endpoint))
        assert [list(store.list("s3://bucket/folder/")) for _ in range(2)] == [[], []]
    assert len(requests) >= 4


@pytest.mark.usefixtures("any_credentials")
@pytest.mark.parametrize("token", ["", "<NextContinuationToken>same</NextContinuationToken>"])
def test_s3_listing_that_leads_nowhere_is_told(token: str) -> None:
    listing = f"<ListBucketResult><IsTruncated>true</IsTruncated>{token}</ListBucketResult>"
    with answering((200, listing)) as (endpoint, _), pytest.raises(StoreUnavailableError, match="does not go on"):
        list(S3Store(StorageSpec(endpoint_url=endpoint)).list("s3://bucket/folder/"))


def test_s3_clock_that_is_wrong_is_told(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    place = s3_place(s3)
    place.put("a")
    hour = timedelta(hours=1)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: datetime.now(UTC).replace(tzinfo=None) + hour)
    monkeypatch.setattr("pipeline.storage.s3_errors.time.time", partial(_time_after, hour.total_seconds(), time.time))
    store = S3Store(StorageSpec(endpoint_url=s3.endpoint_url), timeout_s=14.0)  # one that has not answered yet
    monkeypatch.setattr("pipeline.storage.s3.answered_endpoints", set())
    with pytest.raises(StoreUnavailableError, match=r"clock is 3[56]\d\d s ahead of the store's") as caught:
        store.stat(place.at("a"))
    assert "RequestTimeTooSkewed" in str(caught.value)


def test_s3_large_file_whose_tries_take_long_is_tried_again(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    place = s3_place(s3)
    offset = [0.0]
    tries: list[tuple[int, str] | None] = []
    answers = [(409, "ConditionalRequestConflict"), (503, "SlowDown"), (404, "NoSuchUpload"), None]

    class Slow:
        def upload_fileobj(self, *args: Any, **kwargs: Any) -> None:
            offset[0] += 1000.0
            answer = answers[len(tries)]
            tries.append(answer)
            if answer is not None:
                status, code = answer
                response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
                raise ClientError(response, "CompleteMultipartUpload")

    clock = time.monotonic
    monkeypatch.setattr("tenacity.time.monotonic", lambda: clock() + offset[0])
    monkeypatch.setattr("pipeline.storage.s3.s3_client", lambda *args, **kwargs: Slow())
    assert place.store.put_file_if_absent(place.at("a"), io.BytesIO(bytes(17 << 20)))
    assert tries == answers


def _time_after(seconds: float, clock: Callable[[], float]) -> float:
    return clock() + seconds


@pytest.mark.parametrize(
    "error", [ResponseStreamingError(error="connection reset"), SSLError("bad record mac")], ids=["cut", "garbled"]
)
def test_s3_body_cut_while_it_is_read_is_fetched_again(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    place = s3_place(s3)
    place.put("a")
    real, failures = StreamingBody.read, iter([True, False])

    def read_or_fail(body: StreamingBody, *args: Any) -> bytes:
        if next(failures, False):
            raise error
        data: bytes = real(body, *args)
        return data

    monkeypatch.setattr(StreamingBody, "read", read_or_fail)
    assert place.store.read(place.at("a")) == b"a"
    assert next(failures, None) is None


@pytest.mark.parametrize(
    "settings", [{"endpoint_url": "localhost:8333"}, {"endpoint_url": "http://127.0.0.1:9", "region": "us east"}]
)
def test_s3_settings_that_make_no_client_are_a_spec_error(settings: dict[str, str]) -> None:
    with pytest.raises(SpecError, match="storage: no S3 client can be made"):
        open_store("s3://bucket/a", StorageSpec(**settings))


# Names.


@pytest.mark.parametrize("url", ["gs://bucket/a", "s3a://bucket/a", "S3://bucket/a", "https://host/a"])
def test_absolute_url_of_a_scheme_that_is_not_read_is_a_spec_error(url: str) -> None:
    with pytest.raises(SpecError, match="is not read here"):
        absolute_url(url)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("*.png", ["a.png", "a b.png"], ["a/b.png", "a.png.bak", "a.PNG"]),
        ("a?c", ["abc", "a.c", "a\nc"], ["ac", "a/c", "abbc"]),
        ("**/a", ["a", "x/a", "x/y/a"], ["xa", "a/x"]),
        ("x/**/a", ["x/a", "x/y/a", "x/y/z/a"], ["a", "xa", "y/x/a"]),
        ("x/**", ["x/a", "x/y/a"], ["x", "y/x/a"]),
        ("[abc]", ["a", "c"], ["d", "ab", ""]),
        ("[a-c]x", ["ax", "cx"], ["dx", "-x"]),
        ("[!a-c]x", ["dx", "-x"], ["ax", "/x"]),
        ("[!!a]", ["b"], ["!", "a"]),
        ("[]a]", ["]", "a"], ["b"]),
        ("[!]a]", ["b"], ["]", "a"]),
        ("[^a]", ["^", "a"], ["b"]),
        ("x[a.]", ["xa", "x."], ["xb"]),
        ("[\\w]", ["\\", "w"], ["a"]),
        ("[z-a]", [], ["z", "a", "-"]),
        ("a[b", ["a[b"], ["ab"]),
        ("a.b+(c)|{1}$^", ["a.b+(c)|{1}$^"], ["aXb+(c)|{1}$^"]),
        ("", [""], ["a"]),
    ],
)
def test_glob_to_regex_matches_as_on_a_disk(pattern: str, yes: list[str], no: list[str]) -> None:
    regex = glob_to_regex(pattern)
    assert [name for name in [*yes, *no] if regex.fullmatch(name)] == yes


@pytest.mark.parametrize(
    ("url", "bucket", "key"),
    [("s3://b/a/c.txt", "b", "a/c.txt"), ("s3://b/", "b", ""), ("s3://b", "b", ""), ("s3://b//a", "b", "/a")],
)
def test_split_s3_gives_bucket_and_key(url: str, bucket: str, key: str) -> None:
    assert split_s3(url) == (bucket, key)


@pytest.mark.parametrize(
    ("url", "absolute"),
    [
        ("a/b", "/base/a/b"),
        ("./a/../b/", "/base/b/"),
        ("/a", "/a"),
        ("/", "/"),
        ("file:///a/b", "/a/b"),
        ("~/a", "/home/me/a"),
        ("s3://b/../a/", "s3://b/../a/"),
    ],
)
def test_absolute_url_keeps_urls_and_trailing_slashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, absolute: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute_url(url) == absolute.replace("/base", str(tmp_path))


def test_join_url_puts_one_slash_between() -> None:
    assert join_url("s3://b/out/", "data", "x.parquet") == join_url("s3://b/out", "data", "x.parquet")
    assert join_url("s3://b/out/", "data", "x.parquet") == "s3://b/out/data/x.parquet"


def test_open_store_goes_by_the_url(s3: S3Server) -> None:
    spec = StorageSpec(endpoint_url=s3.endpoint_url)
    assert isinstance(open_store("s3://b/a", spec), S3Store)
    for url in ("/a", "a", "file:///a"):
        assert isinstance(open_store(url, spec), LocalStore)
