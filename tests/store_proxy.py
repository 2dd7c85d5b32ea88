"""A store that has bad days: a reverse proxy on loopback before the real one, which breaks a share of the requests.

On aiohttp, with a thread of its own. It counts what arrives, second by second.
"""

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

KINDS = ("500", "503", "reset", "stall", "truncate")
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer"}


@dataclass
class StoreProxy:
    """Set `rate` and `kinds` at any time; `arrived` counts requests by the second since the start, `broken` by kind."""

    target: str
    rng: random.Random
    rate: float = 0.0
    kinds: tuple[str, ...] = KINDS
    stall_s: float = 10.0
    host: str = "127.0.0.1"
    port: int = 0
    started: float = field(default_factory=time.monotonic)
    arrived: Counter[int] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    broken_writes: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    """Requests by kind: get, head, put, delete, list."""
    expired_key: str | None = None
    """An access key that counts no more."""
    release: threading.Event = field(default_factory=threading.Event)
    """While it is cleared, writes of parts are held up."""

    def __post_init__(self) -> None:
        self.release.set()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Pass a request on, or break it."""
        self.arrived[int(time.monotonic() - self.started)] += 1
        self.asked["list" if "list-type" in request.query_string else request.method.lower()] += 1
        body = await request.read()
        if self.expired_key is not None and f"Credential={self.expired_key}/" in request.headers["Authorization"]:
            self.broken["expired"] += 1
            return _refusal(400, "ExpiredToken")
        while request.method == "PUT" and "/data/" in request.path and not self.release.is_set():
            await asyncio.sleep(0.02)
        kind = self.rng.choice(self.kinds) if self.rng.random() < self.rate else None
        if kind == "truncate" and request.method not in ("GET", "PUT"):
            kind = "reset"  # there is no body to cut
        if kind is not None:
            self.broken[kind] += 1
            self.broken_writes += request.method in ("PUT", "POST")
        if kind == "500":
            return _refusal(500, "InternalError")
        if kind == "503":
            return _refusal(503, "SlowDown")
        if kind == "reset":
            if self.rng.random() < 0.5:  # half of them after the store has done it: a write whose answer is lost
                await self._ask(request, body)
            _reset(request)
        if kind == "truncate" and request.method == "PUT":
            with contextlib.suppress(aiohttp.ClientError, ConnectionResetError):
                await self._ask(request, _half(body))
            _reset(request)
        if kind == "stall":
            await asyncio.sleep(self.stall_s)
        status, headers, data = await self._ask(request, body)
        if request.method == "HEAD":
            return web.Response(status=status, headers=headers)
        headers["Content-Length"] = str(len(data))
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        if kind == "truncate" and len(data) > 1:
            await response.write(data[: len(data) // 2])
            _reset(request)
        await response.write(data)
        await response.write_eof()
        return response

    async def _ask(self, request: web.Request, body: bytes | AsyncIterator[bytes]) -> tuple[int, dict[str, str], bytes]:
        kept = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        session: aiohttp.ClientSession = request.app[SESSION]
        url = self.target + request.raw_path
        async with session.request(
            request.method, URL(url, encoded=True), headers=kept, data=body, allow_redirects=False
        ) as answer:
            data = await answer.read()
            headers = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
            return answer.status, headers, data


SESSION: web.AppKey[aiohttp.ClientSession] = web.AppKey("session", aiohttp.ClientSession)


async def _half(body: bytes) -> AsyncIterator[bytes]:
    """What arrives of a write whose sender goes away in the middle."""
    yield body[: len(body) // 2]
    raise ConnectionResetError


def _refusal(status: int, code: str) -> web.Response:
    text = (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>Please try again.</Message></Error>'
    )
    return web.Response(status=status, text=text, content_type="application/xml")


def _reset(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
    raise asyncio.CancelledError


@contextlib.contextmanager
def running_proxy(target: str, seed: int = 0, host: str = "127.0.0.1", **settings: Any) -> Iterator[StoreProxy]:
    """A proxy before the store at `target`, until the block ends."""
    proxy = StoreProxy(target, random.Random(seed), host=host, **settings)
    loop = asyncio.new_event_loop()
    started = threading.Event()
    stop = asyncio.Event()

    async def serve() -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", proxy.handle)
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session:
            app[SESSION] = session
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
            await runner.setup()
            site = web.TCPSite(runner, host, 0)
            await site.start()
            proxy.port = runner.addresses[0][1]
            started.set()
            await stop.wait()
            await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), name="store-proxy", daemon=True)
    thread.start()
    if not started.wait(20):
        raise RuntimeError("The proxy did not start.")
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
