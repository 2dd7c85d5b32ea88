"""`RemoteFetcher` against servers that do what they like.

The servers listen on loopback, which each test opens with `allow_networks`; what must not be connected to is asked
for by number or through a faked DNS. Covers addresses, redirects, sizes, time, retries, types, secrets, threads.
Not covered: the rules of addresses and URLs (`test_addresses`), TLS that works, hosts on the internet.
"""

import asyncio
import contextlib
import email.utils
import gzip
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SampleError
from pipeline.remote import FetchLimits, RemoteFetcher, parse_retry_after
from tests.builders import png_bytes

PNG = png_bytes()
LOOPBACK = ("127.0.0.0/8",)
SECRET = "hunter2"


@dataclass(frozen=True)
class Request:
    """What the server was asked, and when."""

    path: str
    headers: dict[str, str]
    at: float


Script = Callable[[asyncio.StreamWriter], Awaitable[None]]
Answer = bytes | Script


class Site:
    """A server on loopback that sends, byte for byte, what `answers` holds for a path; a list is used up, to its last.

    It knows nothing of HTTP but where a request ends.
    """

    def __init__(self) -> None:
        self.answers: dict[str, Answer | list[Answer]] = {}
        self.requests: list[Request] = []
        self.num_connections = 0
        self.greeting = b""
        """Sent to each connection before it asks."""
        self.port = 0

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        writer.write(self.greeting)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not writer.is_closing():
                request = parse_request(await reader.readuntil(b"\r\n\r\n"))
                self.requests.append(request)
                answer = self.answers.get(request.path.partition("?")[0], reply(status=404))
                if isinstance(answer, list):
                    answer = answer.pop(0) if len(answer) > 1 else answer[0]
                if isinstance(answer, bytes):
                    writer.write(answer)
                    await writer.drain()
                else:
                    await answer(writer)
        writer.close()


def parse_request(head: bytes) -> Request:
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Request(first.split(" ")[1], headers, time.monotonic())


@contextlib.contextmanager
def running_site() -> Iterator[Site]:
    site, loop = Site(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(site.serve, "127.0.0.1", 0), loop).result()
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        asyncio.run_coroutine_threadsafe(end_server(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def end_server(server: asyncio.Server) -> None:
    server.close()
    connections = asyncio.all_tasks() - {asyncio.current_task()}
    for task in connections:
        task.cancel()
    await asyncio.gather(*connections, return_exceptions=True)


@pytest.fixture
def site() -> Iterator[Site]:
    with running_site() as running:
        yield running


MakeFetcher = Callable[..., RemoteFetcher]


@pytest.fixture
def make_fetcher() -> Iterator[MakeFetcher]:
    """Fetchers that may go to loopback, unless told otherwise; all closed in the end."""
    with contextlib.ExitStack() as stack:

        def make(**limits: Any) -> RemoteFetcher:
            fetcher = RemoteFetcher(FetchLimits(**{"allow_networks": LOOPBACK, "timeout_s": 10.0, **limits}))
            stack.callback(fetcher.close)
            return fetcher

        yield make


def reply(body: bytes = b"", status: int = 200, content_type: str | None = "image/png", **headers: str) -> bytes:
    """A whole answer; `Retry_After="1"` is the header Retry-After."""
    fields = {"Content_Length": str(len(body)), **headers}
    if content_type is not None:
        fields["Content_Type"] = content_type
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join([f"HTTP/1.1 {status} Said", *lines, "", ""]).encode() + body


def redirect(location: str, status: int = 302) -> bytes:
    return reply(status=status, Location=location)


HEAD_ONLY = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"


def trickle(start: bytes, piece: bytes) -> Script:
    """`start`, and then one piece each 50 ms, without end."""

    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.05)

    return send


def after(delay_s: float, answer: bytes) -> Script:
    """A server that needs `delay_s` for its answer."""

    async def send(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(delay_s)
        writer.write(answer)
        await writer.drain()

    return send


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()


def and_hang_up(answer: bytes) -> Script:
    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    return send


def fail(fetcher: RemoteFetcher, url: str) -> SampleError:
    with pytest.raises(SampleError) as caught:
        fetcher.fetch(url)
    return caught.value


# --- which addresses may be connected to

LOOPBACK_HOSTS = [
    *("127.0.0.1", "localhost", "LOCALHOST", "127.1", "0x7f000001", "0x7f.1", "0177.0.0.1", "2130706433"),
    *("017700000001", "127.0.0.1.", "0.0.0.0", "0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
    *("①②⑦.0.0.1", "127。0。0。1", "ｌocalhost"),
]


@pytest.mark.parametrize("host", LOOPBACK_HOSTS)
def test_fetch_loopback_in_any_spelling_is_refused_unconnected(
    site: Site, make_fetcher: MakeFetcher, host: str
) -> None:
    site.answers["/"] = reply(PNG)
    assert fail(make_fetcher(allow_networks=()), site.url(host=host)).error_type == "url_refused"
    assert site.num_connections == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_fetch_opened_network_gives_the_bytes(site: Site, make_fetcher: MakeFetcher, host: str) -> None:
    site.answers["/"] = reply(PNG)
    assert make_fetcher().fetch(site.url(host=host)) == PNG


@pytest.fixture
def dns(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Addresses of names that end in .test; the system's own resolver answers for all others."""
    names: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if not str(host).endswith(".test"):
            return real(host, port, *args, **options)
        names.setdefault("asked", []).append(str(host))
        if str(host) not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        found = [real(address, port, type=socket.SOCK_STREAM) for address in names[str(host)]]
        return [info for infos in found for info in infos]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return names


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["::1"], ["::1", "127.0.0.1"], ["10.0.0.1", "127.0.0.1"], ["::ffff:127.0.0.1", "169.254.169.254"]],
)
def test_fetch_name_of_closed_addresses_is_refused_at_the_connection(
    site: Site, make_fetcher: MakeFetcher, dns: dict[str, list[str]], addresses: list[str]
) -> None:
    dns["image.test"] = addresses
    error = fail(make_fetcher(allow_networks=()), site.url(host="image.test"))
    assert error.error_type == "url_refused"
    assert addresses[0].removeprefix("::ffff:") in error.message
    assert site.num_connections == 0
    assert len(dns["asked"]) == 1  # not tried again


def test_fetch_name_of_a_closed_and_an_open_address_uses_the_open_one(
    site: Site, make_fetcher: MakeFetcher, dns: dict[str, list[str]]
) -> None:
    dns["image.test"] = ["10.0.0.1", "127.0.0.1"]
    site.answers["/"] = reply(PNG)
    assert make_fetcher().fetch(site.url(host="image.test")) == PNG


def test_fetch_name_is_looked_up_once_for_check_and_connection(
    site: Site, make_fetcher: MakeFetcher, dns: dict[str, list[str]]
) -> None:
    dns["image.test"] = ["127.0.0.1"]
    site.answers["/"] = reply(PNG)
    assert make_fetcher().fetch(site.url(host="image.test")) == PNG
    assert dns["asked"] == ["image.test"]


def test_fetch_name_that_is_bound_anew_is_checked_anew(
    site: Site, make_fetcher: MakeFetcher, dns: dict[str, list[str]]
) -> None:
    dns["image.test"] = ["127.0.0.1"]
    site.answers["/"] = reply(PNG)
    fetcher = make_fetcher()
    assert fetcher.fetch(site.url(host="image.test")) == PNG
    dns["image.test"] = ["10.0.0.1"]
    error = fail(fetcher, "http://image.test:81/")  # of another port, for aiohttp keeps addresses for 10 s
    assert error.error_type == "url_refused"


def test_fetch_name_that_is_not_known_is_unreachable_at_once(
    make_fetcher: MakeFetcher, dns: dict[str, list[str]]
) -> None:
    error = fail(make_fetcher(), "http://gone.test/a.png")
    assert error.error_type == "http_unreachable"
    assert dns["asked"] == ["gone.test"]


# --- which URLs are asked for


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ("/a%2Fb%7E%e4?X-Amz-Credential=K%2F2026&sig=a%2Bb%3D%3d+c|d", None),
        ("/a//b/../c?", "/a//b/../c"),
        ("/é b?ü", "/%C3%A9%20b?%C3%BC"),
        ("/a\r\nX-Injected: 1", "/aX-Injected:%201"),
        ("/a?b HTTP/1.1\r\nX-Injected: 1\r\n\r\n", "/a?b+HTTP/1.1X-Injected:+1"),
    ],
)
def test_fetch_url_is_sent_as_it_is_where_it_can_be(
    site: Site, make_fetcher: MakeFetcher, asked: str, sent: str | None
) -> None:
    fail(make_fetcher(), site.url(asked))
    (request,) = site.requests
    assert request.path == (sent or asked)
    assert "x-injected" not in request.headers


def test_fetch_url_of_any_length_is_shown_short(make_fetcher: MakeFetcher) -> None:
    error = fail(make_fetcher(allow_networks=()), "http://127.0.0.1/" + "a" * 5000)
    assert len(error.message) < 300


@pytest.mark.parametrize("host", ["a" * 70 + ".com", "a..b", "a b", "a\x00b", "%00", "x" * 5000])
def test_fetch_host_that_dns_cannot_spell_is_a_sample_error(make_fetcher: MakeFetcher, host: str) -> None:
    error = fail(make_fetcher(max_attempts=1), f"http://{host}/a.png")
    assert error.error_type in ("url_invalid", "http_unreachable")


# --- redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["{site}/end", "/end", "end?x=1", "//127.0.0.1:{port}/end#part"])
def test_fetch_redirect_is_followed(site: Site, make_fetcher: MakeFetcher, status: int, location: str) -> None:
    site.answers["/start"] = redirect(location.format(site=site.url(""), port=site.port), status)
    site.answers["/end"] = reply(PNG)
    assert make_fetcher().fetch(site.url("/start")) == PNG


@pytest.mark.parametrize(
    ("location", "error_type", "shown"),
    [
        ("http://169.254.169.254/latest/meta-data/", "url_refused", "169.254.169.254"),
        ("http://10.0.0.1/", "url_refused", "10.0.0.1"),
        ("https://192.168.1.1/", "url_refused", "192.168.1.1"),
        ("http://[fd00:ec2::254]/", "url_refused", "fd00:ec2::254"),
        ("http://[::ffff:10.0.0.1]/", "url_refused", "::ffff:"),
        ("http://[64:ff9b::a00:1]/", "url_refused", "64:ff9b::a00:1"),
        ("http://2852039166/", "url_refused", "2852039166"),
        ("http://0xa9fea9fe/", "url_refused", "0xa9fea9fe"),
        ("file:///etc/passwd", "url_refused", "file"),
        ("ftp://127.0.0.1/a.png", "url_refused", "ftp"),
        ("http://user:hunter2@127.0.0.1/", "url_refused", "http://127.0.0.1/"),
        ("http://127.0.0.1:99999/", "url_invalid", "redirected to http://127.0.0.1:99999/"),
    ],
)
def test_fetch_redirect_to_a_forbidden_place_is_refused(
    site: Site, make_fetcher: MakeFetcher, location: str, error_type: str, shown: str
) -> None:
    site.answers["/"] = redirect(location)
    error = fail(make_fetcher(timeout_s=2.0), site.url())
    assert error.error_type == error_type
    assert shown in error.message
    assert SECRET not in error.message
    assert len(site.requests) == 1


@pytest.mark.parametrize(("num_redirects", "allowed"), [(3, True), (4, False)])
def test_fetch_redirects_are_counted(site: Site, make_fetcher: MakeFetcher, num_redirects: int, allowed: bool) -> None:
    for hop in range(num_redirects):
        site.answers[f"/{hop}"] = redirect(f"/{hop + 1}")
    site.answers[f"/{num_redirects}"] = reply(PNG)
    fetcher = make_fetcher(max_redirects=3)
    if allowed:
        assert fetcher.fetch(site.url("/0")) == PNG
    else:
        assert fail(fetcher, site.url("/0")).error_type == "http_too_many_redirects"
        assert len(site.requests) == 4


def test_fetch_redirect_loop_ends(site: Site, make_fetcher: MakeFetcher) -> None:
    site.answers["/"] = redirect("/")
    assert fail(make_fetcher(), site.url()).error_type == "http_too_many_redirects"
    assert len(site.requests) == 1 + FetchLimits().max_redirects


def test_fetch_redirect_without_location_names_the_status(site: Site, make_fetcher: MakeFetcher) -> None:
    site.answers["/"] = reply(status=302)
    error = fail(make_fetcher(), site.url())
    assert (error.error_type, len(site.requests)) == ("http_status", 1)
    assert "302" in error.message


# --- sizes


def test_fetch_body_of_exactly_the_limit_is_taken(site: Site, make_fetcher: MakeFetcher) -> None:
    site.answers["/"] = reply(bytes(5000))
    assert make_fetcher(max_bytes=5000).fetch(site.url()) == bytes(5000)


def test_fetch_body_one_byte_over_the_limit_is_refused(site: Site, make_fetcher: MakeFetcher) -> None:
    site.answers["/"] = and_hang_up(HEAD_ONLY + b"\r\n" + bytes(5001))
    error = fail(make_fetcher(max_bytes=5000), site.url())
    assert (error.error_type, len(site.requests)) == ("image_too_many_bytes", 1)
    assert "5000" in error.message


def test_fetch_content_length_over_the_limit_is_refused_before_the_body(site: Site, make_fetcher: MakeFetcher) -> None:
    site.answers["/"] = trickle(HEAD_ONLY + b"Content-Length: 5001\r\n\r\n", b"")  # the body never comes
    assert fail(make_fetcher(max_bytes=5000), site.url()).error_type == "image_too_many_bytes"


@pytest.mark.parametrize(
    ("head", "piece"),
    [(b"\r\n", bytes(65536)), (b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + bytes(65536) + b"\r\n")],
    ids=["until close", "chunked"],
)
def test_fetch_endless_body_is_cut_near_the_limit(
    site: Site, make_fetcher: MakeFetcher, head: bytes, piece: bytes
) -> None:
    num_sent = 0
    cut = threading.Event()

    async def send(writer: asyncio.StreamWriter) -> None:
        nonlocal num_sent
        writer.write(HEAD_ONLY + head)
        try:
            while num_sent < 1 << 30:
                writer.write(piece)
                await writer.drain()
                num_sent += len(piece)
        finally:
            cut.set()

    site.answers["/"] = send
    assert fail(make_fetcher(max_bytes=1 << 20), site.url()).error_type == "image_too_many_bytes"
    assert cut.wait(5.0)
    assert num_sent < 32 << 20  # the limit and what the sockets of both sides hold


def test_fetch_body_longer_than_its_content_length_never_gives_the_rest(site: Site, make_fetcher: MakeFetcher) -> None:
    smuggled = reply(b"not asked for")
    site.answers["/"] = reply(PNG + smuggled, Content_Length=str(len(PNG)))
    fetcher = make_fetcher(max_attempts=1)
    for _ in range(3):
        try:
            data = fetcher.fetch(site.url())
        except SampleError:  # when the rest comes in the same piece, aiohttp sees the lie
            continue
        assert data == PNG


def test_fetch_body_shorter_than_its_content_length_is_tried_again(site: Site, make_fetcher: MakeFetcher) -> None:
    site.answers["/"] = [and_hang_up(reply(PNG, Content_Length="5000")), reply(PNG)]
    assert make_fetcher().fetch(site.url()) == PNG
    assert len(site.requests) == 2


# --- time


@pytest.mark.parametrize(
    "answer",
    [
        trickle(b"", b""),
        trickle(b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        trickle(HEAD_ONLY, b"X: y\r\n"),
        trickle(HEAD_ONLY + b"\r\n", b"x"),
        trickle(HEAD_ONLY + b"Content-Length: 1000\r\n\r\n", b"x"),
        trickle(HEAD_ONLY + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        trickle(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["silence", "one header", "headers", "body", "counted body", "chunked body", "informational answers"],
)
def test_fetch_slow_server_ends_in_time(site: Site, make_fetcher: MakeFetcher, answer: Script) -> None:
    site.answers["/"] = answer
    started_at = time.monotonic()
    error = fail(make_fetcher(timeout_s=0.3, max_attempts=1), site.url())
    assert (error.error_type, len(site.requests)) == ("http_timeout", 1)
    assert 0.3 <= time.monotonic() - started_at < 1.5


def test_fetch_timeout_is_tried_once_more_and_no_more(site: Site, make_fetcher: MakeFetcher) -> None:
    site.answers["/"] = trickle(HEAD_ONLY + b"\r\n", b"x")
    error = fail(make_fetcher(timeout_s=0.2), site.url())
    assert (error.error_type, len(site.requests)) == ("http_timeout", 2)
    assert "2 tries" in error.message


def test_fetch_timeout_and_then_an_image_gives_the_image(site: Site, make_fetcher: MakeFetcher) -> None:
    site.answers["/"] = [trickle(b"", b""), reply(PNG)]
    assert make_fetcher(timeout_s=0.5).fetch(site.url()) == PNG


def test_fetch_time_limit_is_of_all_redirects_together(site: Site, make_fetcher: MakeFetcher) -> None:
    for hop in range(5):
        site.answers[f"/{hop}"] = after(0.2, redirect(f"/{hop + 1}"))
    site.answers["/5"] = reply(PNG)
    assert fail(make_fetcher(timeout_s=0.5, max_attempts=1), site.url("/0")).error_type == "http_timeout"


def test_fetch_time_limit_stands_still_while_the_host_is_busy_with_others(
    site: Site, make_fetcher: MakeFetcher
) -> None:
    site.answers["/"] = after(0.2, reply(PNG))
    fetcher = make_fetcher(max_per_host=1, timeout_s=0.6, max_attempts=1)
    assert fetch_all(fetcher, [site.url()] * 6) == [PNG] * 6  # one after the other: 1.2 s


def test_fetch_time_limit_goes_on_after_the_wait_for_a_busy_host(site: Site, make_fetcher: MakeFetcher) -> None:
    asked = threading.Event()

    async def send(writer: asyncio.StreamWriter) -> None:
        asked.set()
        await asyncio.sleep(0.1)
        writer.write(reply(PNG))

    site.answers["/first"], site.answers["/second"] = send, trickle(b"", b"")
    fetcher = make_fetcher(max_per_host=1, timeout_s=0.5, max_attempts=1)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fetcher.fetch, site.url("/first"))
        assert asked.wait(5.0)
        second = pool.submit(fetcher.fetch, site.url("/second"))
        try:
            assert first.result(timeout=5.0) == PNG
            assert isinstance(error := second.exception(timeout=5.0), SampleError)
            assert error.error_type == "http_timeout"
        finally:
            fetcher.close()  # a fetch without end would keep its thread


# --- retries


def test_fetch_server_error_is_tried_again(site: Site, make_fetcher: MakeFetcher) -> None:
    statuses = {"/500": [500], "/502": [502], "/503": [503], "/504": [504], "/429": [429], "/twice": [500, 500]}
    for path, failures in statuses.items():
        site.answers[path] = [*(reply(status=status) for status in failures), reply(PNG)]
    assert fetch_all(make_fetcher(), list(map(site.url, statuses))) == [PNG] * 6
    assert Counter(request.path for request in site.requests) == {path: len(statuses[path]) + 1 for path in statuses}


def test_fetch_server_error_that_stays_is_given_up_and_named(site: Site, make_fetcher: MakeFetcher) -> None:
    site.answers["/"] = reply(status=503)
    error = fail(make_fetcher(max_attempts=2), site.url())
    assert (error.error_type, len(site.requests)) == ("http_status", 2)
    assert "503 Service Unavailable" in error.message
    assert "2 tries" in error.message


@pytest.mark.parametrize("status", [201, 204, 206, 304, 400, 401, 403, 404, 410, 451, 501, 999])
def test_fetch_other_status_is_not_tried_again(site: Site, make_fetcher: MakeFetcher, status: int) -> None:
    site.answers["/"] = reply(status=status)
    error = fail(make_fetcher(), site.url())
    assert (error.error_type, len(site.requests)) == ("http_status", 1)
    assert str(status) in error.message
    assert "Said" not in error.message


def test_fetch_retry_after_seconds_are_waited(site: Site, make_fetcher: MakeFetcher) -> None:
    for status in (429, 503):
        site.answers[f"/{status}"] = [reply(status=status, Retry_After="1"), reply(PNG)]
    assert fetch_all(make_fetcher(), [site.url("/429"), site.url("/503")]) == [PNG, PNG]
    for path in ("/429", "/503"):
        first, second = (request.at for request in site.requests if request.path == path)
        assert second - first >= 1.0


def test_fetch_retry_after_date_is_waited_for(site: Site, make_fetcher: MakeFetcher) -> None:
    date = int(time.time()) + 2
    site.answers["/"] = [reply(status=503, Retry_After=email.utils.formatdate(date, usegmt=True)), reply(PNG)]
    assert make_fetcher().fetch(site.url()) == PNG
    assert time.time() >= date


def test_fetch_retry_after_beyond_the_limit_is_given_up_at_once(site: Site, make_fetcher: MakeFetcher) -> None:
    site.answers["/"] = reply(status=429, Retry_After="100000")
    error = fail(make_fetcher(), site.url())
    assert (error.error_type, len(site.requests)) == ("http_status", 1)
    assert "100000 s" in error.message


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0.0),
        ("", 0.0),
        ("0", 0.0),
        (" 7 ", 7.0),
        ("9" * 5000, 1e9),
        ("-5", 0.0),
        ("1.5", 0.0),
        ("²", 0.0),
        ("soon", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 99 Oct 2015", 0.0),
    ],
)
def test_parse_retry_after_odd_values_never_raise(value: str | None, seconds: float) -> None:
    assert parse_retry_after(value) == seconds


def test_parse_retry_after_date_is_seconds_from_now() -> None:
    date = email.utils.formatdate(time.time() + 3600, usegmt=True)
    assert parse_retry_after(date) == pytest.approx(3600, abs=5)


# --- answers that are no image


@pytest.mark.parametrize(
    "content_type",
    ["image/png", "IMAGE/JPEG; q=1", "application/octet-stream", "binary/octet-stream", "", None, "image/x-anything"],
)
def test_fetch_content_type_of_an_image_or_of_nothing_is_taken(
    site: Site, make_fetcher: MakeFetcher, content_type: str | None
) -> None:
    site.answers["/"] = reply(PNG, content_type=content_type)
    assert make_fetcher().fetch(site.url()) == PNG


@pytest.mark.parametrize(
    "content_type", ["text/html; charset=utf-8", "application/json", "imagepng", "text/" + "x" * 900]
)
def test_fetch_other_content_type_is_refused_and_named(
    site: Site, make_fetcher: MakeFetcher, content_type: str
) -> None:
    site.answers["/"] = reply(PNG, content_type=content_type)
    error = fail(make_fetcher(), site.url())
    assert (error.error_type, len(site.requests)) == ("http_content_type", 1)
    assert content_type.partition(";")[0][:100] in error.message
    assert len(error.message) < 500


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "GZIP", "identity, gzip"])
def test_fetch_encoded_body_is_refused_and_named(site: Site, make_fetcher: MakeFetcher, encoding: str) -> None:
    site.answers["/"] = reply(gzip.compress(bytes(1 << 20)), Content_Encoding=encoding)
    error = fail(make_fetcher(), site.url())
    assert error.error_type == "http_content_type"
    assert encoding.lower() in error.message
    assert site.requests[0].headers["accept-encoding"] == "identity"


def test_fetch_body_encoded_as_identity_is_taken(site: Site, make_fetcher: MakeFetcher) -> None:
    site.answers["/"] = reply(PNG, Content_Encoding="identity")
    assert make_fetcher().fetch(site.url()) == PNG


GARBAGE = {
    "nothing": b"",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "a status of letters": b"HTTP/1.1 abc OK\r\n\r\n",
    "a header without a name": HEAD_ONLY + b": x\r\n\r\n",
    "an endless header": HEAD_ONLY + b"X: " + bytes(100_000),
    "many headers": HEAD_ONLY + b"X: y\r\n" * 50_000 + b"\r\n",
    "a negative length": HEAD_ONLY + b"Content-Length: -1\r\n\r\nxx",
    "a length of letters": HEAD_ONLY + b"Content-Length: abc\r\n\r\nxx",
    "two lengths": HEAD_ONLY + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "chunks of no size": HEAD_ONLY + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nxx\r\n",
    "a cut chunk": HEAD_ONLY + b"Transfer-Encoding: chunked\r\n\r\nff\r\nxx",
    "switching protocols": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "bytes that are no UTF-8": b"HTTP/1.1 404 \xff\xfe\r\nContent-Type: \xff\r\nContent-Length: 0\r\n\r\n",
    "a type that is no UTF-8": b"HTTP/1.1 200 OK\r\nContent-Type: te\xffxt\r\nContent-Length: 0\r\n\r\n",
    "a location that is no UTF-8": b"HTTP/1.1 302 Go\r\nLocation: http://\xff/\r\nContent-Length: 0\r\n\r\n",
    "a location with a null": b"HTTP/1.1 302 Go\r\nLocation: http://a\x00b/\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=GARBAGE.keys())
def test_fetch_broken_answer_is_a_sample_error(site: Site, make_fetcher: MakeFetcher, answer: bytes) -> None:
    site.answers["/"] = and_hang_up(answer)
    error = fail(make_fetcher(max_attempts=1), site.url())
    assert error.error_type in ("http_unreachable", "http_status", "http_content_type", "url_invalid")
    error.message.encode("ascii")


def test_fetch_broken_connection_is_tried_again(site: Site, make_fetcher: MakeFetcher) -> None:
    site.answers["/"] = [hang_up, hang_up, hang_up, reply(PNG)]  # aiohttp itself asks twice
    assert make_fetcher().fetch(site.url()) == PNG


def test_fetch_port_that_is_closed_is_unreachable(make_fetcher: MakeFetcher) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        error = fail(make_fetcher(max_attempts=2), f"http://127.0.0.1:{unused.getsockname()[1]}/")
    assert error.error_type == "http_unreachable"
    assert "2 tries" in error.message


def test_fetch_https_of_a_server_without_tls_is_unreachable(site: Site, make_fetcher: MakeFetcher) -> None:
    site.greeting = reply(PNG)
    error = fail(make_fetcher(max_attempts=1), site.url().replace("http:", "https:"))
    assert error.error_type == "http_unreachable"


# --- secrets, and what is sent

FAILURES: dict[str, Answer] = {
    "a status": reply(status=404),
    "a status that is tried again": reply(status=503),
    "a far Retry-After": reply(status=429, Retry_After="999"),
    "a type": reply(content_type="text/html"),
    "an encoding": reply(Content_Encoding="gzip"),
    "too many bytes": reply(bytes(2000)),
    "no HTTP": and_hang_up(b"what?\r\n\r\n"),
    "a hang-up": hang_up,
    "silence": trickle(b"", b""),
    "a redirect to itself": redirect("/?token=hunter2"),
    "a redirect to a closed address": redirect("http://10.0.0.1/?token=hunter2"),
    "a redirect to nowhere": redirect("http://127.0.0.1:99999/?token=hunter2"),
    "a redirect to a file": redirect("file:///x?token=hunter2"),
    "a redirect to a long label": redirect("http://" + "a" * 70 + ".com/?token=hunter2"),
}


@pytest.mark.parametrize("answer", FAILURES.values(), ids=FAILURES.keys())
def test_fetch_failure_never_shows_query_or_fragment(site: Site, make_fetcher: MakeFetcher, answer: Answer) -> None:
    site.answers["/a.png"] = site.answers["/"] = answer
    fetcher = make_fetcher(max_attempts=1, timeout_s=0.3, max_bytes=1000)
    error = fail(fetcher, site.url("/a.png?token=hunter2#hunter2"))
    assert site.requests[0].path == "/a.png?token=hunter2"
    assert site.url("/a.png") in error.message
    assert SECRET not in "".join(traceback.format_exception(error))


def test_fetch_sends_no_cookie_and_nothing_of_the_environment(
    site: Site, make_fetcher: MakeFetcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password hunter2\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    site.answers["/"] = reply(PNG, Set_Cookie="id=1; Path=/")
    fetcher = make_fetcher()
    assert fetch_all(fetcher, [site.url()]) + fetch_all(fetcher, [site.url()]) == [PNG, PNG]
    assert [set(request.headers) & {"cookie", "authorization"} for request in site.requests] == [set(), set()]


# --- threads


def fetch_all(fetcher: RemoteFetcher, urls: list[str]) -> list[bytes]:
    """Each URL in a thread of its own."""
    with ThreadPoolExecutor(len(urls)) as pool:
        return list(pool.map(fetcher.fetch, urls))


def test_fetch_connections_to_one_host_are_limited(site: Site, make_fetcher: MakeFetcher) -> None:
    num_now = num_most = 0
    three_at_once = asyncio.Barrier(3)  # without three connections no answer is ever sent

    async def send(writer: asyncio.StreamWriter) -> None:
        nonlocal num_now, num_most
        num_now += 1
        num_most = max(num_most, num_now)
        await three_at_once.wait()
        await asyncio.sleep(0.05)  # others could come now
        num_now -= 1
        writer.write(reply(PNG))

    site.answers["/"] = send
    urls = [site.url(host="localhost"), site.url(host="LOCALHOST")] * 6  # one host, however it is spelled
    assert fetch_all(make_fetcher(max_per_host=3), urls) == [PNG] * 12
    assert num_most == 3
    assert site.num_connections == 3  # they are used again


def test_fetch_many_threads_each_get_their_own_image(site: Site, make_fetcher: MakeFetcher) -> None:
    paths = [f"/{number}" for number in range(200)]
    site.answers.update({path: reply(path.encode()) for path in paths})
    fetcher = make_fetcher()
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(fetcher.fetch, map(site.url, paths))) == [path.encode() for path in paths]


def test_close_ends_the_thread_and_may_be_called_again(site: Site, make_fetcher: MakeFetcher) -> None:
    threads = set(threading.enumerate())
    fetcher = make_fetcher()
    site.answers["/"] = reply(PNG)
    fetcher.fetch(site.url())
    (thread,) = [new for new in set(threading.enumerate()) - threads if new.name == "remote-fetcher"]
    fetcher.close()
    assert not thread.is_alive()
    fetcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        fetcher.fetch(site.url())


def test_close_ends_a_fetch_that_hangs(site: Site, make_fetcher: MakeFetcher) -> None:
    asked = threading.Event()

    async def hang(_: asyncio.StreamWriter) -> None:
        asked.set()
        await asyncio.sleep(60)

    site.answers["/"] = hang
    fetcher = make_fetcher()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(fetcher.fetch, site.url())
        assert asked.wait(5.0)
        fetcher.close()
        with pytest.raises(RuntimeError, match="closed"):
            future.result(timeout=5.0)  # RuntimeError, for the row is not to blame
