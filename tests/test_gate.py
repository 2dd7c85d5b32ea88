"""`Gate`: who and what comes in, what is counted and given back, and the lines in the log.

The app behind it does what the body of a request says. Most tests speak ASGI through httpx; where framing, timing of
pieces or a broken connection matter, a real uvicorn is spoken to over a socket, with both of its HTTP parsers.
Not covered: vLLM's app behind the gate, and Ray Serve before it.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import select
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
import uvicorn
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from deployments.gate import Gate, GateSettings
from deployments.heads import Headers
from deployments.keys import ENVIRONMENT, KeyRing

KEY, OTHER_KEY = "a-key-for-the-tests-1", "a-key-for-the-tests-2"
KEYED = {"Authorization": f"Bearer {KEY}"}
JSON = {**KEYED, "Content-Type": "application/json"}
CHAT = "/v1/chat/completions"
SERVED = frozenset((CHAT, "/v1/models", "/health", "/metrics", "/"))
OPEN = frozenset(("/health", "/", "/playground"))
SETTINGS = GateSettings(max_body_bytes=1000, served_paths=SERVED, open_paths=OPEN)


class App:
    """Does what a body says: `echo`, `stream`, `raise`, `hold` until let go, `wait` for the client to leave."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.bodies: list[bytes] = []
        self.events: list[str] = []
        self.entered = threading.Semaphore(0)
        self.left = threading.Event()
        self.go = threading.Semaphore(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self.events.append((await receive())["type"])
            return
        self.scopes.append(scope)
        message = await receive()
        assert not message["more_body"]
        self.bodies.append(message["body"])
        deed = message["body"].partition(b" ")[0].strip(b'"').decode(errors="replace")
        self.entered.release()
        try:
            await getattr(self, f"do_{deed}", self.do_echo)(receive, send)
        except asyncio.CancelledError:
            self.events.append("cancelled")
            raise

    async def do_echo(self, receive: Receive, send: Send) -> None:
        await self.start(send)
        await send({"type": "http.response.body", "body": b"{}"})

    async def do_stream(self, receive: Receive, send: Send) -> None:
        await self.start(send)
        for number in range(3):
            await asyncio.to_thread(self.go.acquire, timeout=30)
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
        await send({"type": "http.response.body"})

    async def do_hold(self, receive: Receive, send: Send) -> None:
        await asyncio.to_thread(self.go.acquire, timeout=30)
        await self.do_echo(receive, send)

    async def do_wait(self, receive: Receive, send: Send) -> None:
        await self.start(send)
        await send({"type": "http.response.body", "body": b"data: 0\n\n", "more_body": True})
        self.events.append((await receive())["type"])
        self.left.set()

    async def do_raise(self, receive: Receive, send: Send) -> None:
        raise LookupError("broken")

    async def do_raise_late(self, receive: Receive, send: Send) -> None:
        await self.start(send)
        raise LookupError("broken")

    async def start(self, send: Send) -> None:
        headers = [(b"content-type", b"application/json"), (b"Access-Control-Allow-Origin", b"*")]
        headers += [(b"X-Request-Id", b"the app's"), (b"access-control-allow-credentials", b"true")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeyRing:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    path = tmp_path / "keys"
    path.write_text(f"first {KEY}\nsecond {OTHER_KEY}\n")
    path.chmod(0o600)
    return KeyRing(str(path))


@pytest.fixture
def gate(app: App, keys: KeyRing) -> Gate:
    return Gate(app, SETTINGS, keys)


class Lines(logging.Handler):
    """What the access log says, parsed. It is there from the start: `caplog` counts per phase of a test."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    @property
    def parsed(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.texts]


@pytest.fixture(autouse=True)
def lines() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("r4b.access")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    assert not any(KEY in text or "\n" in text for text in handler.texts)


@contextlib.asynccontextmanager
async def client_of(gate: Gate) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(gate, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


def ask(gate: Gate, method: str, path: str, **more: Any) -> httpx.Response:
    async def ask_once() -> httpx.Response:
        async with client_of(gate) as client:
            return await client.request(method, path, **more)

    return asyncio.run(ask_once())


def call(gate: Gate, method: str, path: str, root_path: str = "") -> list[Message]:
    """As a server does for this very path, which httpx would tidy up."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": unquote(path), "root_path": root_path, "headers": []}
    asyncio.run(gate({**scope, "raw_path": path.encode(), "query_string": b""}, receive, send))
    return sent


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, which must be written as vLLM writes them."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["code"] == response.status_code
    assert body["error"]["type"].endswith("Error")
    error: dict[str, Any] = body["error"]
    return error


# Who comes in.


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("Authorization", f"Bearer {KEY}")], 200),
        ([("authorization", f"bearer {KEY}")], 200),
        ([("AUTHORIZATION", f"BEARER  {KEY} ")], 200),
        ([("Authorization", f"Bearer {OTHER_KEY}")], 200),
        ([], 401),
        ([("Authorization", "")], 401),
        ([("Authorization", "Bearer")], 401),
        ([("Authorization", "Bearer ")], 401),
        ([("Authorization", KEY)], 401),
        ([("Authorization", f"Basic {KEY}")], 401),
        ([("Authorization", f"Token {KEY}")], 401),
        ([("Authorization", f"Bearer {KEY[:-1]}")], 401),
        ([("Authorization", f"Bearer {KEY}x")], 401),
        ([("Authorization", f"Bearer {KEY},{OTHER_KEY}")], 401),
        ([("Authorization", "Bearer clé-très-secrète-ù".encode())], 401),
        ([("Authorization", b"Bearer \xff\xfe\xfd")], 401),
        ([("Authorization", "Bearer " + "x" * 10_000)], 401),
        ([("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer x")], 401),
        ([("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")], 401),
        ([("X-Api-Key", KEY)], 401),
        ([("Cookie", f"Authorization=Bearer {KEY}")], 401),
    ],
)
def test_gate_lets_in_who_has_a_key(gate: Gate, app: App, headers: list[tuple[str, Any]], status: int) -> None:
    response = ask(gate, "GET", "/v1/models", headers=headers)
    assert response.status_code == status
    assert len(app.scopes) == (status == 200)
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer"
        assert error_of(response)["type"] == "AuthenticationError"


def test_gate_takes_no_key_from_the_url(gate: Gate) -> None:
    assert ask(gate, "GET", f"/v1/models?api_key={KEY}").status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("HEAD", "/health", 200),
        ("GET", "/", 200),
        ("GET", "/playground", 200),
        ("GET", "/playground/app.js", 200),
        ("GET", "/playground/a/b.css", 200),
        ("POST", "/health", 401),
        ("OPTIONS", "/health", 401),
        ("GET", "/healthy", 401),
        ("GET", "/HEALTH", 401),
        ("GET", "/playgrounds", 401),
        ("GET", "/metrics", 401),
        ("GET", "/docs", 401),
        ("GET", "/playground/../metrics", 404),
        ("GET", "/playground/%2e%2e/metrics", 404),
        ("GET", "/playground/..", 404),
        ("GET", "/playground//etc/passwd", 404),
        ("GET", "/playground/%5c..%5cx", 404),
        ("GET", "/playground/%00", 404),
        ("GET", "/playground/%0d%0aSet-Cookie:x", 404),
        ("GET", "//health", 401),
        ("GET", "/./health", 401),
        ("GET", "/%2e%2e/health", 401),
    ],
)
def test_gate_without_a_key_gives_open_paths_only(gate: Gate, app: App, method: str, path: str, status: int) -> None:
    assert call(gate, method, path)[0]["status"] == status
    assert len(app.scopes) == (status == 200)


@pytest.mark.parametrize(
    ("path", "status"),
    [(CHAT, 200), ("/v1/models", 200), ("/v1/models/", 404), ("/v1/completions", 404), ("/tokenize", 404), ("/v1", 404)]
    + [("/v1/Models", 404), ("/v1/models/x", 404), ("/docs", 404), ("/health", 200), ("/invocations", 404)],
)
def test_gate_with_a_key_gives_served_paths_only(gate: Gate, path: str, status: int) -> None:
    assert ask(gate, "GET", path, headers=KEYED).status_code == status


def test_gate_without_served_paths_leaves_them_to_the_app(app: App, keys: KeyRing) -> None:
    assert ask(Gate(app, GateSettings(), keys), "GET", "/any/thing", headers=KEYED).status_code == 200


@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "GETT"])
def test_gate_knows_three_methods(gate: Gate, app: App, method: str) -> None:
    assert ask(gate, method, CHAT).status_code == 401
    response = ask(
        gate, method, CHAT, headers={**KEYED, "Origin": "http://evil", "Access-Control-Request-Method": "POST"}
    )
    assert response.status_code == 405
    assert response.headers["allow"] == "GET, HEAD, POST"
    assert not any(name.startswith("access-control") for name in response.headers)
    assert app.scopes == []


def test_gate_without_keys_lets_everybody_in(app: App) -> None:
    assert ask(Gate(app, SETTINGS), "GET", "/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8000", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 421),
        ("", 421),
    ]
    + [("127.0.0.1.evil.example", 421), ("127.0.0.1:8000:9000", 421), ("localhost.", 421)],
)
def test_gate_of_a_server_without_keys_is_called_by_its_names_only(app: App, host: str, status: int) -> None:
    """Or a page whose name is made to lead to 127.0.0.1 could use it."""
    settings = GateSettings(hosts=frozenset(("127.0.0.1", "localhost", "[::1]")))
    assert ask(Gate(app, settings), "GET", "/v1/models", headers={"Host": host}).status_code == status


def test_gate_sees_the_path_below_the_prefix_of_a_mounted_app(app: App, keys: KeyRing) -> None:
    for path, status in (("/r4b/health", 200), ("/r4b/v1/models", 401), ("/r4bhealth", 401), ("/r4b/r4b/health", 401)):
        assert call(Gate(app, SETTINGS, keys), "GET", path, "/r4b")[0]["status"] == status, path


# What comes in.


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/json ;charset=utf-8", 200),
        (None, 415),
        ("", 415),
        ("text/plain", 415),
        ("text/plain; application/json", 415),
        ("application/jsonp", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
    ],
)
def test_gate_takes_json_only(gate: Gate, app: App, content_type: str | None, status: int) -> None:
    headers = KEYED if content_type is None else {**KEYED, "Content-Type": content_type}
    response = ask(gate, "POST", CHAT, headers=headers, content=b"{}")
    assert response.status_code == status
    assert app.bodies == ([b"{}"] if status == 200 else [])


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("size", "status"), [(0, 200), (1, 200), (1000, 200), (1001, 413), (100_000, 413)])
def test_gate_takes_bodies_up_to_the_limit(gate: Gate, app: App, chunked: bool, size: int, status: int) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, size, 7):
            yield b"x" * min(7, size - start)

    response = ask(gate, "POST", CHAT, headers=JSON, content=pieces() if chunked else b"x" * size)
    assert response.status_code == status
    assert app.bodies == ([b"x" * size] if status == 200 else [])
    if status == 413:
        assert error_of(response)["message"] == "The body has more than 1000 bytes, the limit."
        assert response.headers["connection"] == "close"


@pytest.mark.parametrize("length", ["1001", "9" * 25, "00000000000000000000000001001"])
def test_gate_refuses_a_declared_length_without_asking_for_the_body(gate: Gate, length: str) -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""  # type: ignore[unreachable]

    headers = {**JSON, "Content-Length": length}
    assert ask(gate, "POST", CHAT, headers=headers, content=never()).status_code == 413


def test_gate_refuses_large_heads(gate: Gate) -> None:
    for path, headers in ((f"/health?{'q' * 20_000}", {}), ("/health", {"X-Any": "x" * 20_000})):
        response = ask(gate, "GET", path, headers=headers)
        assert response.status_code == 431
        assert error_of(response)["type"] == "RequestTooLargeError"


def test_gate_withholds_keys_and_vllms_own_headers_from_the_app(gate: Gate, app: App) -> None:
    secret = {
        "X-Vllm-Priority": "-9",
        "X-data-parallel-rank": "0",
        "X-Session-ID": "a",
        "endpoint-load-metrics-format": "TEXT",
    }
    ask(gate, "POST", CHAT, headers={**JSON, **secret, "X-Other": "stays"}, content=b"{}")
    names = {name.lower() for name, _ in app.scopes[0]["headers"]}
    assert names.isdisjoint({name.lower().encode() for name in (*secret, "Authorization")})
    assert {b"x-other", b"content-type", b"x-request-id"} <= names


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["a"], True),
        (["A.b_c-9"], True),
        (["x" * 128], True),
        ([], False),
        ([""], False),
        (["x" * 129], False),
        (["a b"], False),
        (["a/b"], False),
        (["a\tb"], False),
        (["é".encode()], False),
        (["a", "b"], False),
    ],
)
def test_gate_gives_each_request_one_id(gate: Gate, app: App, lines: Lines, given: list[Any], kept: bool) -> None:
    response = ask(
        gate, "POST", CHAT, headers=[*JSON.items(), *(("X-Request-Id", one) for one in given)], content=b"{}"
    )
    (request_id,) = response.headers.get_list("x-request-id")
    assert request_id == given[0] if kept else re.fullmatch("[0-9a-f]{32}", request_id)
    seen = [value for name, value in app.scopes[0]["headers"] if name.lower() == b"x-request-id"]
    assert seen == [request_id.encode()]
    assert lines.parsed[0]["request_id"] == request_id


@pytest.mark.parametrize(("path", "status"), [("/v1/models", 200), ("/v1/nothing", 404)])
def test_gate_answers_with_headers_that_keep_browsers_safe(gate: Gate, path: str, status: int) -> None:
    response = ask(gate, "GET", path, headers={**KEYED, "Origin": "http://evil"})
    assert response.status_code == status
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["cache-control"] == "no-store"
    assert "x-request-id" in response.headers
    assert not any(name.startswith("access-control") for name in response.headers)


def test_gate_lets_browsers_keep_the_playgrounds_files(gate: Gate) -> None:
    assert "cache-control" not in ask(gate, "GET", "/playground/app.js").headers


# How many at once.


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not reached():
            await asyncio.sleep(0)


def post(client: httpx.AsyncClient, body: bytes, key: str = KEY) -> Coroutine[Any, Any, httpx.Response]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return client.post(CHAT, headers=headers, content=body)


def is_idle(gate: Gate) -> bool:
    """Nothing is counted any more."""
    return (gate._num_running, dict(gate._num_by_key), gate._held_bytes) == (0, {}, 0)


def test_closed_gate_sends_new_requests_elsewhere_and_lets_those_inside_end(app: App, keys: KeyRing) -> None:
    gate = Gate(app, GateSettings(retry_after_s=3), keys)

    async def run() -> None:
        async with client_of(gate) as client:
            held = asyncio.ensure_future(post(client, b"hold"))
            await until(lambda: len(app.bodies) == 1)
            gate.close()
            refused = await post(client, b"echo")
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "3")
            assert refused.headers["connection"] == "close"
            assert (await client.get("/v1/models", headers=KEYED)).status_code == 200
            assert not gate.is_idle
            app.go.release(1)
            assert (await held).status_code == 200
            assert gate.is_idle

    asyncio.run(run())


@pytest.mark.parametrize(("given", "told"), [([], "3"), ([(b"Retry-After", b"9")], "9")])
def test_gate_says_when_to_come_again_where_the_app_is_unavailable(given: Headers, told: str) -> None:
    async def unavailable(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": given})
        await send({"type": "http.response.body", "body": b"{}"})

    response = ask(Gate(unavailable, GateSettings(retry_after_s=3)), "GET", "/v1/models")
    assert (response.status_code, response.headers.get_list("retry-after")) == (503, [told])


def test_gate_limits_the_requests_of_a_key(app: App, keys: KeyRing) -> None:
    gate = Gate(app, GateSettings(max_concurrent_per_key=2, retry_after_s=3), keys)

    async def run() -> None:
        async with client_of(gate) as client:
            held = [asyncio.ensure_future(post(client, b"hold")) for _ in range(2)]
            await until(lambda: len(app.bodies) == 2)
            refused = await post(client, b"echo")
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
            assert error_of(refused)["type"] == "RateLimitError"
            assert (await post(client, b"echo", OTHER_KEY)).status_code == 200
            assert (await client.get("/v1/models", headers=KEYED)).status_code == 200
            app.go.release(2)
            assert [(await one).status_code for one in held] == [200, 200]
            assert (await post(client, b"echo")).status_code == 200

    asyncio.run(run())
    assert is_idle(gate)


def test_gate_limits_all_requests_and_answers_the_rest(app: App, keys: KeyRing) -> None:
    gate = Gate(app, GateSettings(max_concurrent=2, retry_after_s=3), keys)

    async def run() -> None:
        async with client_of(gate) as client:
            held = [asyncio.ensure_future(post(client, b"hold", key)) for key in (KEY, OTHER_KEY)]
            await until(lambda: len(app.bodies) == 2)
            refused = await post(client, b"echo")
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "3")
            assert error_of(refused)["type"] == "ServiceUnavailableError"
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/metrics", headers=KEYED)).status_code == 200
            app.go.release(2)
            assert [(await one).status_code for one in held] == [200, 200]
            assert (await post(client, b"echo")).status_code == 200

    asyncio.run(run())
    assert is_idle(gate)


def test_gate_without_keys_has_the_common_limit_only(app: App) -> None:
    gate = Gate(app, GateSettings(max_concurrent=2, max_concurrent_per_key=1))

    async def run() -> None:
        async with client_of(gate) as client:
            held = [asyncio.ensure_future(post(client, b"hold")) for _ in range(2)]
            await until(lambda: len(app.bodies) == 2)
            assert (await post(client, b"echo")).status_code == 503
            app.go.release(2)
            await asyncio.gather(*held)

    asyncio.run(run())
    assert is_idle(gate)


def test_gate_limits_the_bytes_that_it_holds(app: App, keys: KeyRing) -> None:
    gate = Gate(app, GateSettings(max_held_bytes=1000), keys)

    async def run() -> None:
        async with client_of(gate) as client:
            held = asyncio.ensure_future(post(client, b"hold " + b"x" * 595))
            await until(lambda: len(app.bodies) == 1)
            refused = await post(client, b"x" * 401)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert (await post(client, b"x" * 400)).status_code == 200
            app.go.release()
            assert (await held).status_code == 200
            assert (await post(client, b"x" * 1000)).status_code == 200

    asyncio.run(run())
    assert is_idle(gate)


class Load:
    """Takes down what the gate tells."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def enter(self) -> None:
        self.calls.append("enter")

    def leave(self) -> None:
        self.calls.append("leave")


def test_gate_tells_of_counted_requests_and_no_others(app: App, keys: KeyRing) -> None:
    load = Load()
    gate = Gate(app, GateSettings(max_concurrent=1), keys, load)
    assert ask(gate, "POST", CHAT, headers=JSON, content=b"echo").status_code == 200
    assert ask(gate, "GET", "/health").status_code == 200
    assert ask(gate, "POST", CHAT, headers={"Content-Type": "application/json"}, content=b"echo").status_code == 401
    assert ask(gate, "POST", CHAT, headers=JSON, content=b"raise").status_code == 500
    assert load.calls == ["enter", "leave"] * 2


# What goes wrong.


@pytest.mark.parametrize(("deed", "status"), [(b"raise", 500), (b"raise_late", 200)])
def test_gate_gives_back_what_was_counted_when_the_app_fails(
    gate: Gate, lines: Lines, deed: bytes, status: int
) -> None:
    response = ask(gate, "POST", CHAT, headers=JSON, content=deed)
    if status == 500:
        assert error_of(response)["type"] == "InternalServerError"
        assert "broken" not in response.text
    assert is_idle(gate)
    assert [line["status"] for line in lines.parsed] == [status]


def test_gate_lets_the_servers_log_have_the_apps_error(gate: Gate) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://server") as client:
            await client.post(CHAT, headers=JSON, content=b"raise")

    with pytest.raises(LookupError, match="broken"):
        asyncio.run(run())


@pytest.mark.parametrize(("deed", "events"), [(b"wait", ["http.disconnect"]), (b"hold", ["cancelled"])])
def test_gate_that_is_cancelled_has_the_app_end_the_request_and_gives_back_what_was_counted(
    app: App, keys: KeyRing, lines: Lines, deed: bytes, events: list[str]
) -> None:
    """An app is told first, as vLLM's ends its work for nothing else; one that does not listen is cancelled."""
    gate = Gate(app, dataclasses.replace(SETTINGS, leave_timeout_s=0.5), keys)

    async def run() -> None:
        async with client_of(gate) as client:
            held = asyncio.ensure_future(post(client, deed))
            await until(lambda: len(app.bodies) == 1)
            held.cancel()
            await asyncio.wait([held])
            app.go.release()  # for the thread that waits
            await until(lambda: len(app.events) == 1)

    asyncio.run(run())
    assert app.events == events
    assert is_idle(gate)
    assert [line["client_disconnected"] for line in lines.parsed] == [True]


def test_gate_that_is_cancelled_keeps_the_place_until_the_app_has_ended(app: App, keys: KeyRing) -> None:
    ended = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        app.bodies.append(b"")
        assert (await receive())["type"] == "http.disconnect"
        await ended.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})  # to nobody

    gate = Gate(slow, SETTINGS, keys)

    async def run() -> None:
        async with client_of(gate) as client:
            held = asyncio.ensure_future(post(client, b"{}"))
            await until(lambda: len(app.bodies) == 1)
            held.cancel()
            await asyncio.sleep(0.1)
            assert not is_idle(gate)
            ended.set()
            await asyncio.wait([held])

    asyncio.run(run())
    assert is_idle(gate)


def test_vllms_handler_ends_when_the_gate_is_cancelled(keys: KeyRing) -> None:
    """vLLM's own decorator, around a handler that would go on for ever."""
    events: list[str] = []

    @with_cancellation  # type: ignore[untyped-decorator]
    async def handle(request: Any, raw_request: Any) -> None:
        events.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            events.append("ended")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        await request.body()
        await handle(None, request)

    gate = Gate(app, SETTINGS, keys)

    async def run() -> None:
        async with client_of(gate) as client:
            held = asyncio.ensure_future(post(client, b"{}"))
            await until(lambda: events == ["begun"])
            held.cancel()
            await asyncio.wait([held])
            assert events == ["begun", "ended"]

    asyncio.run(run())
    assert is_idle(gate)


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/health", {}),
        ("GET", "/", {}),
        ("GET", "/playground/app.js", {}),
        ("GET", "/metrics", KEYED),
        ("POST", "/v1/models", JSON),
    ],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_gate_takes_bodies_for_chat_only(
    gate: Gate, app: App, method: str, path: str, headers: dict[str, str], chunked: bool
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"x"

    response = ask(gate, method, path, headers=headers, content=pieces() if chunked else b"x")
    assert (response.status_code, response.headers["connection"]) == (413, "close")
    assert error_of(response)["message"] == "This path takes no body."
    assert app.scopes == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 50 + b"]" * 50, 200),
        (b"[" * 51 + b"]" * 51, 400),
        (b"[" + b"1," * 50 + b"1]", 400),
        (b'{"a":' * 51 + b"1" + b"}" * 51, 400),
        (b'"' + b"\\" * 400 + b'"', 200),
    ],
)
def test_gate_refuses_json_of_too_many_values_before_it_is_parsed(
    app: App, keys: KeyRing, body: bytes, status: int
) -> None:
    gate = Gate(app, dataclasses.replace(SETTINGS, max_json_marks=50), keys)
    assert ask(gate, "POST", CHAT, headers=JSON, content=body).status_code == status
    assert len(app.scopes) == (status == 200)


def test_gate_gives_up_a_body_that_does_not_arrive(app: App, keys: KeyRing, lines: Lines) -> None:
    gate = Gate(app, GateSettings(body_timeout_s=0.05), keys)

    async def stuck() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    response = ask(gate, "POST", CHAT, headers=JSON, content=stuck())
    assert (response.status_code, response.headers["connection"]) == (408, "close")
    assert app.bodies == []
    assert is_idle(gate)
    assert [(line["status"], line["bytes_in"]) for line in lines.parsed] == [(408, 1)]


def test_gate_passes_lifespan_on_and_closes_websockets(gate: Gate, app: App) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(gate({"type": "lifespan"}, receive, send))
    assert app.events == ["lifespan.startup"]
    asyncio.run(gate({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send))
    assert [message["type"] for message in sent] == ["websocket.close"]
    assert app.scopes == []


# The log.


def test_gate_logs_one_line_for_each_request(gate: Gate, lines: Lines) -> None:
    ask(gate, "POST", f"{CHAT}?secret=query", headers={**JSON, "X-Request-Id": "mine"}, content=b"echo a secret prompt")
    ask(gate, "GET", "/health")
    ask(gate, "GET", "/v1/models", headers={"Authorization": "Bearer a-secret-of-no-use"})
    chat, health, wrong = lines.parsed
    assert list(chat) == [
        *("time", "request_id", "key_id", "method", "path", "status", "bytes_in", "bytes_out", "duration_s"),
        *("first_byte_s", "client_disconnected"),
    ]
    assert [chat[name] for name in ("request_id", "key_id", "method", "path")] == ["mine", "first", "POST", CHAT]
    assert [chat[name] for name in ("status", "bytes_in", "bytes_out")] == [200, 20, 2]
    assert 0 <= chat["first_byte_s"] <= chat["duration_s"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", chat["time"])
    assert (health["path"], health["key_id"], health["status"]) == ("/health", None, 200)
    assert (wrong["key_id"], wrong["status"], wrong["bytes_in"]) == (None, 401, 0)
    assert not any("secret" in text for text in lines.texts)


def test_gate_logs_what_a_client_made_up_on_one_short_line(gate: Gate, lines: Lines) -> None:
    ask(gate, "X" * 1000, "/%0a%7b%22status%22:200%7d" + "y" * 5000, headers={"X-Request-Id": "x y"})
    (text,) = lines.texts
    assert len(text) < 1000
    assert text.isprintable()


# With a real server.


class Server:
    """uvicorn on loopback."""

    def __init__(self, gate: Gate, http: str) -> None:
        self.gate = gate
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = self._socket.getsockname()
        config = uvicorn.Config(gate, http=http, lifespan="off", log_config=None, access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()

    def connect(self) -> socket.socket:
        connection = socket.create_connection(self.address, timeout=30)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def stop(self) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join()


@pytest.fixture(params=["h11", "httptools"])
def server(request: pytest.FixtureRequest, gate: Gate) -> Iterator[Server]:
    running = Server(gate, request.param)
    yield running
    running.stop()


def head(*headers: str, method: str = "POST", path: str = CHAT) -> bytes:
    keyed = f"Authorization: Bearer {KEY}"
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: server", keyed, *headers, "", ""]).encode()


JSON_HEADER = "Content-Type: application/json"


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    received = b""
    while mark not in received:
        piece = connection.recv(65536)
        if not piece:
            pytest.fail(f"the connection ended after {received!r}")
        received += piece
    return received


def read_to_end(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            received += piece
    return received


def wait_for(reached: Callable[[], bool]) -> None:
    """For what the server's thread does after the client has what it wants."""
    tick = threading.Event()
    for _ in range(3000):
        if reached():
            return
        tick.wait(0.01)
    pytest.fail("it did not come about in 30 s")


def test_server_streams_piece_by_piece(server: Server, app: App, lines: Lines) -> None:
    with server.connect() as connection:
        connection.sendall(head(JSON_HEADER, "Content-Length: 6") + b"stream")
        for number in range(3):
            app.go.release()  # the app sends the next piece only now
            received = read_until(connection, b"\n\n\r\n")
            assert f"data: {number}".encode() in received
        if not received.endswith(b"0\r\n\r\n"):
            read_until(connection, b"0\r\n\r\n")
    wait_for(lambda: len(lines.texts) == 1)
    assert (lines.parsed[0]["bytes_out"], lines.parsed[0]["client_disconnected"]) == (27, False)
    assert is_idle(server.gate)


def test_server_tells_the_app_that_a_client_has_gone(server: Server, app: App, lines: Lines) -> None:
    with server.connect() as connection:
        connection.sendall(head(JSON_HEADER, "Content-Length: 4") + b"wait")
        read_until(connection, b"data: 0")
    assert app.left.wait(30)
    assert app.events == ["http.disconnect"]
    wait_for(lambda: len(lines.texts) == 1)
    assert (lines.parsed[0]["status"], lines.parsed[0]["client_disconnected"]) == (200, True)
    assert is_idle(server.gate)


@pytest.mark.parametrize("framing", [("Content-Length: 100",), ("Transfer-Encoding: chunked",)])
def test_server_forgets_a_client_that_goes_before_its_body_is_whole(
    server: Server, app: App, lines: Lines, framing: tuple[str]
) -> None:
    with server.connect() as connection:
        connection.sendall(head(JSON_HEADER, *framing) + b"5\r\nechoe\r\n")
    wait_for(lambda: len(lines.texts) == 1)
    assert app.bodies == []
    assert (lines.parsed[0]["status"], lines.parsed[0]["client_disconnected"]) == (None, True)
    assert is_idle(server.gate)


def test_server_refuses_a_declared_length_before_the_body_comes(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(head(JSON_HEADER, "Content-Length: 1000000000000", "Expect: 100-continue"))
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"RequestTooLargeError" in answer


def test_server_stops_reading_a_chunked_body_at_the_limit(server: Server, app: App, lines: Lines) -> None:
    with server.connect() as connection:
        connection.sendall(head(JSON_HEADER, "Transfer-Encoding: chunked"))
        with contextlib.suppress(ConnectionError):
            for _ in range(100_000):  # a gigabyte, were it taken
                connection.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
            pytest.fail("a gigabyte was taken")
    wait_for(lambda: len(lines.texts) == 1)
    assert app.bodies == []
    assert (lines.parsed[0]["status"], lines.parsed[0]["bytes_in"]) == (413, 0)


def test_server_answers_a_chunked_body_that_is_too_large(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(head(JSON_HEADER, "Transfer-Encoding: chunked") + b"3e9\r\n" + b"x" * 1001 + b"\r\n")
        assert read_to_end(connection).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("key", [KEY, "wrong"])
def test_server_refuses_without_waiting_for_the_body_and_keeps_the_connection(server: Server, key: str) -> None:
    """A client that sends its body all the same finds the connection as good as before."""
    refused = b"HTTP/1.1 401 " if key == "wrong" else b"HTTP/1.1 415 "
    with server.connect() as connection:
        connection.sendall(head("Content-Type: text/plain", "Content-Length: 900").replace(KEY.encode(), key.encode()))
        assert read_until(connection, b"}}").startswith(refused)
        connection.sendall(b"x" * 900)
        connection.sendall(head(method="GET", path="/v1/models"))
        assert read_until(connection, b"{}").startswith(b"HTTP/1.1 200 ")


def test_server_closes_on_a_client_without_a_key_that_announces_a_flood(server: Server) -> None:
    for framing in ("Transfer-Encoding: chunked", "Content-Length: 100000000000"):
        with server.connect() as connection:
            connection.sendall(head(JSON_HEADER, framing).replace(KEY.encode(), b"wrong"))
            assert read_to_end(connection).startswith(b"HTTP/1.1 401 ")


def test_server_asks_for_the_body_only_of_those_let_in(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(head(JSON_HEADER, "Content-Length: 4", "Expect: 100-continue"))
        assert read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"echo")
        assert read_until(connection, b"{}").startswith(b"HTTP/1.1 200 ")
    with server.connect() as connection:
        connection.sendall(head("Content-Type: text/plain", "Content-Length: 4", "Expect: 100-continue"))
        assert read_until(connection, b"}}").startswith(b"HTTP/1.1 415 ")


def test_server_large_heads_do_not_reach_the_app(server: Server, app: App) -> None:
    with server.connect() as connection:
        connection.sendall(head(*(f"X-{number}: {'x' * 1000}" for number in range(40)), method="GET", path="/health"))
        assert read_until(connection, b"}}").startswith(b"HTTP/1.1 431 ")
    with server.connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(head("Authorization: Bearer " + "x" * 300_000, method="GET", path="/health"))
        assert read_until(connection, b"\r\n\r\n").startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))
    assert app.scopes == []


@pytest.mark.parametrize(
    "lies",
    [
        ("Content-Length: 4", "Content-Length: 5"),
        ("Content-Length: -1",),
        ("Content-Length: 4x",),
        ("Transfer-Encoding: gzip",),
        ("X: a\nContent-Length: 4",),
        ("Bad Header: x",),
    ],
)
def test_server_lies_about_framing_do_not_reach_the_app_as_a_request(
    server: Server, app: App, lies: tuple[str, ...]
) -> None:
    with server.connect() as connection:
        connection.sendall(head(JSON_HEADER, *lies, "Connection: close") + b"echo")
        if not select.select([connection], [], [], 1)[0]:  # it waits for the rest of what it takes for the body
            connection.shutdown(socket.SHUT_WR)
        answer = read_to_end(connection)
    assert not answer.startswith(b"HTTP/1.1 5")
    assert len(app.bodies) == answer.count(b"HTTP/1.1 200")
    assert all(body in (b"", b"echo") for body in app.bodies)
    wait_for(lambda: is_idle(server.gate))


def test_server_serves_two_requests_sent_at_once(server: Server, app: App, lines: Lines) -> None:
    request = head(JSON_HEADER, "Content-Length: 4") + b"echo"
    with server.connect() as connection:
        connection.sendall(request * 2)
        received = read_until(connection, b"{}")
        if received.count(b"{}") < 2:
            read_until(connection, b"{}")
    wait_for(lambda: len(lines.texts) == 2)
    assert app.bodies == [b"echo", b"echo"]
    assert len({line["request_id"] for line in lines.parsed}) == 2
