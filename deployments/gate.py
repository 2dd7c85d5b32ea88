"""The gate before the app: who comes in, how many at once, how large; and a line in the log for each.

Plain ASGI, so that a streamed answer goes through piece by piece and a client that leaves is noticed by the app. A
request is refused as early as possible: by its head before its body is asked for, by its body before the app is.
The invariant: the app sees only requests on served paths, with a key where one is needed, whole and within the limits;
whatever happens to a request, what it counted for is given back when the app has done with it, and its line is logged.
Not covered: what a request asks for (`pipeline.engine.chat_limits`), TLS, slow heads (the server's or proxy's
matter), and limits over several replicas.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.access_log import Access
from deployments.heads import Head, Headers, is_below
from deployments.keys import KeyRing, parse_bearer

METHODS = ("GET", "HEAD", "POST")

WITHHELD = frozenset(
    (b"authorization", b"x-request-id")
    # by these vLLM lets a client choose its place in the queue, its engine, and headers with figures of the engine
    + (b"x-vllm-priority", b"x-data-parallel-rank", b"x-session-id", b"endpoint-load-metrics-format")
)
"""Headers that the app does not get to see; it gets a request id of ours."""

SECURITY_HEADERS: Headers = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]

ERROR_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    421: "MisdirectedRequestError",
    429: "RateLimitError",
    431: "RequestTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


@dataclass(frozen=True)
class GateSettings:
    """What is let through."""

    max_body_bytes: int = 64 << 20
    max_head_bytes: int = 16 << 10
    """URL and headers together."""
    body_timeout_s: float = 120.0
    """For the whole body to arrive."""
    leave_timeout_s: float = 5.0
    """For the app to end a request that was given up."""
    max_json_marks: int = 200_000
    """Commas and opening brackets in a body: what the parser's time and memory grow with. Prompts hold far fewer."""
    max_held_bytes: int = 1 << 30
    """Bodies of all requests in the replica, which are held, also by vLLM, until they are answered."""
    max_concurrent: int = 512
    """Requests to `counted_paths` in this replica. Bodies are taken there only."""
    max_concurrent_per_key: int | None = None
    retry_after_s: int = 1
    open_paths: frozenset[str] = frozenset(("/health", "/ping"))
    """May be read without a key, and so may all below them; but "/" is itself alone."""
    served_paths: frozenset[str] = frozenset()
    """All that there is, beside what is below `open_paths`; empty: all that the app has."""
    counted_paths: frozenset[str] = frozenset(("/v1/chat/completions",))
    tells_request_id: bool = True
    """False where the server around the gate sends the header itself: twice, a client would read two ids."""
    hosts: frozenset[str] = frozenset()
    """The names by which clients may call the server; empty: any. Without keys they keep out other sites' pages."""


class RefusedError(Exception):
    """A request that does not come in; the message is one sentence for the client."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


class Load(Protocol):
    """Is told when a request to a counted path comes in, and when it is over."""

    def enter(self) -> None: ...

    def leave(self) -> None: ...


class Gate:
    """An ASGI app around another. Lives in one event loop."""

    def __init__(
        self, app: ASGIApp, settings: GateSettings, keys: KeyRing | None = None, load: Load | None = None
    ) -> None:
        """`keys` is None where everybody may come in."""
        self.app, self.settings, self.keys = app, settings, keys
        self._load = load
        self._num_running = 0
        self._num_by_key: Counter[str] = Counter()
        self._held_bytes = 0
        self._is_closed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry point."""
        if scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})  # before it was accepted: HTTP 403

    @property
    def is_idle(self) -> bool:
        """Whether no request to a counted path runs."""
        return self._num_running == 0

    def close(self) -> None:
        """Turn requests to counted paths away from now on: another replica will have to answer them."""
        self._is_closed = True

    @contextmanager
    def admit(self, path: str, key_id: str | None) -> Iterator[None]:
        """Hold a place among those that run; raises RefusedError when there is none."""
        if path not in self.settings.counted_paths:
            yield
            return
        retry, limit = {"Retry-After": str(self.settings.retry_after_s)}, self.settings.max_concurrent_per_key
        if self._is_closed:
            raise RefusedError(503, "This replica is being replaced; come again.", {**retry, "Connection": "close"})
        if key_id is not None and limit is not None and self._num_by_key[key_id] >= limit:
            raise RefusedError(429, f"This key has {limit} requests running, as many as it may; come again.", retry)
        if self._num_running >= self.settings.max_concurrent:
            raise RefusedError(503, "The server has as many requests as it takes; come again.", retry)
        self._num_running += 1
        if key_id is not None:
            self._num_by_key[key_id] += 1
        if self._load is not None:
            self._load.enter()
        try:
            yield
        finally:
            self._num_running -= 1
            if key_id is not None:
                self._num_by_key -= Counter([key_id])  # which forgets a key at zero
            if self._load is not None:
                self._load.leave()

    def hold(self, size: int) -> None:
        """Count bytes of a body, or give them back; raises RefusedError when there are too many."""
        if size > 0 and self._held_bytes + size > self.settings.max_held_bytes:
            retry = {"Retry-After": str(self.settings.retry_after_s)}
            raise RefusedError(503, "The server holds as many bytes of requests as it takes; come again.", retry)
        self._held_bytes += size


class _Exchange:
    """One request and its answer."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self._gate, self._settings = gate, gate.settings
        self._scope, self._receive, self._send = scope, receive, send
        self._head = Head(scope)
        self._access = Access(self._head.choose_request_id(), self._head.method, self._head.path)
        self._body: bytes | None = None
        self._is_read = self._is_answered = False
        self._left: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Let the request through or refuse it."""
        try:
            self._check_head()
            with self._gate.admit(self._access.path, self._access.key_id):
                self._body = await self._read_body()
                if self._body is not None:
                    await self._run_app()
        except RefusedError as refused:
            await self._refuse(refused)
        except Exception:
            if self._access.status is None:
                await self._refuse(RefusedError(500, "Something went wrong in the server; its log knows more."))
            raise
        finally:
            self._gate.hold(-self._access.bytes_in)
            self._access.write()

    def _check_head(self) -> None:
        """All that can be refused before the body is asked for; who asks comes before what is asked."""
        settings, head = self._settings, self._head
        if head.num_bytes > settings.max_head_bytes:
            raise RefusedError(431, f"URL and headers have more than {settings.max_head_bytes} bytes, the limit.")
        if settings.hosts and head.host not in settings.hosts:
            raise RefusedError(421, "This server is not called by this name.")
        if not (is_below(head.path, settings.open_paths) and head.method in ("GET", "HEAD")):
            self._check_key()
        if not head.is_path_plain or (settings.served_paths and not self._is_served(head.path)):
            raise RefusedError(404, "There is nothing at this path.")
        if head.method not in METHODS:
            raise RefusedError(405, f"Of methods {', '.join(METHODS)} are known.", {"Allow": ", ".join(METHODS)})
        if head.method == "POST" and self._is_api and head.media_type != b"application/json":
            raise RefusedError(415, "The body must be JSON, and Content-Type say application/json.")
        if head.body_bytes > settings.max_body_bytes:
            raise self._too_large()
        if head.path not in settings.counted_paths and (head.is_chunked or head.body_bytes):
            raise RefusedError(413, "This path takes no body.", {"Connection": "close"})

    @property
    def _is_api(self) -> bool:
        return self._head.path.startswith("/v1/")

    def _check_key(self) -> None:
        if self._gate.keys is None:
            return
        self._access.key_id = self._gate.keys.find(parse_bearer(self._head.headers))
        if self._access.key_id is None:
            message = "A valid API key is needed, as the header `Authorization: Bearer KEY`."
            raise RefusedError(401, message, {"WWW-Authenticate": "Bearer"})

    def _is_served(self, path: str) -> bool:
        return path in self._settings.served_paths or is_below(path, self._settings.open_paths)

    def _too_large(self) -> RefusedError:
        return RefusedError(413, f"The body has more than {self._settings.max_body_bytes} bytes, the limit.")

    async def _read_body(self) -> bytes | None:
        """The whole body; None when the client has gone before its end."""
        body, num_marks = bytearray(), 0
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                while not self._is_read:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        self._access.client_disconnected = True
                        return None
                    piece = message.get("body", b"")
                    if len(body) + len(piece) > self._settings.max_body_bytes:
                        raise self._too_large()
                    self._gate.hold(len(piece))
                    self._access.bytes_in += len(piece)
                    body += piece
                    num_marks += sum(map(piece.count, (b",", b"[", b"{")))
                    if num_marks > self._settings.max_json_marks:
                        raise RefusedError(400, "The body holds more JSON values than any request needs.")
                    self._is_read = not message.get("more_body", False)
        except TimeoutError:
            raise RefusedError(408, f"The body did not arrive within {self._settings.body_timeout_s:g} s.") from None
        return bytes(body)

    async def _run_app(self) -> None:
        """The app, to its end. To cancel it would not do: vLLM heeds a client that leaves, and nothing else."""
        app = asyncio.ensure_future(self._gate.app(self._inner_scope(), self._receive_again, self._send_on))
        try:
            await asyncio.shield(app)
        except asyncio.CancelledError:
            self._access.client_disconnected = not self._is_answered
            self._left.set_result(None)
            await asyncio.wait([app], timeout=self._settings.leave_timeout_s)
            app.cancel()
            await asyncio.gather(app, return_exceptions=True)
            raise
        finally:
            app.cancel()

    def _inner_scope(self) -> Scope:
        headers = [(name, value) for name, value in self._head.headers if name.lower() not in WITHHELD]
        return {**self._scope, "headers": [*headers, self._request_id_header()]}

    def _request_id_header(self) -> tuple[bytes, bytes]:
        return b"x-request-id", self._access.request_id.encode()

    async def _receive_again(self) -> Message:
        """The body once, then what comes: that the client has gone."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        receiving = asyncio.ensure_future(self._receive())
        try:
            either: list[asyncio.Future[Any]] = [receiving, self._left]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            message = receiving.result() if receiving.done() else {"type": "http.disconnect"}
        finally:
            receiving.cancel()
        if message["type"] == "http.disconnect" and not self._is_answered:
            self._access.client_disconnected = True
        return message

    async def _send_on(self, message: Message) -> None:
        if self._left.done():
            return
        if message["type"] == "http.response.start":
            self._access.status = message["status"]
            message = {**message, "headers": self._outer_headers(message["status"], message.get("headers", ()))}
        elif message["type"] == "http.response.body":
            self._access.count_out(len(message.get("body", b"")))
            self._is_answered = not message.get("more_body", False)
        await self._send(message)

    def _outer_headers(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> Headers:
        """With ours in place of the app's, and none that opens the server to other sites' pages."""
        ours = [*([self._request_id_header()] if self._settings.tells_request_id else ()), *SECURITY_HEADERS]
        if self._is_api:
            ours.append((b"cache-control", b"no-store"))
        names = {b"x-request-id", *(name for name, _ in ours)}
        kept = [(bytes(name).lower(), bytes(value)) for name, value in headers]
        if status == 503 and all(name != b"retry-after" for name, _ in kept):
            ours.append((b"retry-after", str(self._settings.retry_after_s).encode()))
        return [*(one for one in kept if one[0] not in names and not one[0].startswith(b"access-control-")), *ours]

    async def _refuse(self, refused: RefusedError) -> None:
        """Answer at once, as vLLM writes errors."""
        error = {"message": refused.message, "type": ERROR_TYPES[refused.status], "param": None, "code": refused.status}
        body = json.dumps({"error": error}).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refused.headers}
        if self._is_rest_unbounded or refused.status == 408:
            headers["Connection"] = "close"  # or the server would read on, to throw it away
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._send_on({"type": "http.response.start", "status": refused.status, "headers": raw})
        await self._send_on({"type": "http.response.body", "body": b"" if self._scope["method"] == "HEAD" else body})

    @property
    def _is_rest_unbounded(self) -> bool:
        """Whether more of a body may come than a request may have."""
        return not self._is_read and (self._head.is_chunked or self._head.body_bytes > self._settings.max_body_bytes)
