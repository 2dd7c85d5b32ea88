"""Images fetched over http(s), by URLs that nobody vouches for.

A connection is made only to a public unicast address, or to one in `allow_networks`. This is checked where the socket
is made, on the very address that it connects to: for IP literals, after DNS, at each redirect and each try. No name
can be one address for the check and another for the connection; a pooled connection was checked when it was made.
Nothing of the environment is used (proxies, netrc), no cookie is kept, and messages hold no query string.

Time: a try ends after `timeout_s`, which stands still only while all of a host's connections are taken by other
fetches of this process, each at most for a try of its own. Beside that, a fetch takes at most
`max_attempts * timeout_s + (max_attempts - 1) * (max_retry_after_s + MAX_BACKOFF_S)`, by default 324 s. A try that ran
out of time is tried again only if it was the first.
Not covered: the rules of URLs and addresses (`pipeline.addresses`), limits that hold over several processes, caching.
"""

import asyncio
import concurrent.futures
import contextlib
import email.utils
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NoReturn

import aiohttp
import tenacity
from yarl import URL

from pipeline.addresses import is_allowed, parse_url, printable, show_url
from pipeline.errors import SampleError

MAX_BACKOFF_S = 8.0
KEEPALIVE_S = 2.0
"""Short: a data set may name a new host in each row, and an idle connection is an open file."""
NUM_RESOLVERS = 32
"""Threads for DNS. asyncio's own few (six on two cores) would all wait for dead name servers."""
REDIRECTS = (301, 302, 303, 307, 308)
RETRIED = (429, 500, 502, 503, 504)
TAKEN_TYPES = ("", "application/octet-stream", "binary/octet-stream")
"""Content types taken beside image/*; a missing one is empty."""
HEADERS = {"Accept": "image/*, */*;q=0.1", "Accept-Encoding": "identity", "User-Agent": "r4b"}
TIMEOUT = "http_timeout"

# What this try was refused. aiohttp may wrap several addresses' errors into one that no longer says it.
_refused_addresses: ContextVar[list[str]] = ContextVar("_refused_addresses")


@dataclass(frozen=True)
class FetchLimits:
    """What one fetch may cost, and where it may go."""

    timeout_s: float = 30.0
    """Of one try, redirects and body included."""
    max_bytes: int = 33_554_432
    max_redirects: int = 5
    max_per_host: int = 8
    """Connections at once to one host and port, from one process."""
    max_attempts: int = 4
    max_retry_after_s: float = 60.0
    """A server that asks for more is given up."""
    allow_networks: tuple[str, ...] = ()
    """Networks that are open though not public, such as 10.1.0.0/16; to redirects from anywhere, too."""


class _TransientError(SampleError):
    """Worth another try, not before `retry_after_s`."""

    def __init__(self, error_type: str, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(error_type, message)
        self.retry_after_s = retry_after_s


class RemoteFetcher:
    """Fetches for any number of threads, in one event loop of its own thread. Not for pickling: one per process."""

    def __init__(self, limits: FetchLimits) -> None:
        self.limits = limits
        self._opened = tuple(map(ipaddress.ip_network, limits.allow_networks))
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(NUM_RESOLVERS, "remote-dns"))
        self._thread = threading.Thread(target=self._loop.run_forever, name="remote-fetcher", daemon=True)
        self._thread.start()

    def fetch(self, url: str) -> bytes:
        """The image's bytes, at most `max_bytes`; blocks, and raises SampleError."""
        with self._lock:
            if self._closed:
                raise RuntimeError("This RemoteFetcher is closed.")
            future = asyncio.run_coroutine_threadsafe(self._fetch(url), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("This RemoteFetcher was closed while it fetched.") from None
        finally:
            future.cancel()  # an interrupt of this thread ends the fetch too

    def close(self) -> None:
        """End what is being fetched (with RuntimeError), all connections and the thread; may be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _end(self) -> None:
        fetches = asyncio.all_tasks() - {asyncio.current_task()}
        for fetch in fetches:
            fetch.cancel()
        await asyncio.gather(*fetches, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _fetch(self, text: str) -> bytes:
        retrying = tenacity.AsyncRetrying(
            sleep=asyncio.sleep,
            retry=tenacity.retry_if_exception_type(_TransientError),
            wait=tenacity.wait_random_exponential(max=MAX_BACKOFF_S) + tenacity.wait_exception(_retry_after_s),
            stop=self._is_last_try,
            retry_error_callback=_raise_last,
        )
        return await retrying(self._try, parse_url(text))

    def _is_last_try(self, state: tenacity.RetryCallState) -> bool:
        num_tries = state.attempt_number
        return num_tries >= self.limits.max_attempts or (num_tries > 1 and _last_error(state).error_type == TIMEOUT)

    async def _try(self, url: URL) -> bytes:
        try:
            async with asyncio.timeout(self.limits.timeout_s) as timeout:
                return await self._follow(url, _Clock(timeout))
        except TimeoutError:
            message = f"{show_url(url)}: not fetched within {self.limits.timeout_s:g} s."
            raise _TransientError(TIMEOUT, message) from None

    async def _follow(self, first: URL, clock: "_Clock") -> bytes:
        """Redirects are followed here, not in aiohttp, so that each URL passes `parse_url`."""
        url, name = first, show_url(first)
        for _ in range(self.limits.max_redirects + 1):
            with _told(name):
                async with self._open_session().get(url, trace_request_ctx=clock, allow_redirects=False) as response:
                    if response.status not in REDIRECTS:
                        return await self._take(response, name)
                    location = response.headers.get("Location")
            if location is None:
                raise SampleError("http_status", f"{name}: answered {response.status} without saying where to go.")
            url = parse_url(location, url)
            name = f"{show_url(first)} redirected to {show_url(url)}"
        message = f"{show_url(first)}: redirected more than {self.limits.max_redirects} times, the limit."
        raise SampleError("http_too_many_redirects", message)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            waiting = aiohttp.TraceConfig()
            waiting.on_connection_queued_start.append(_stop_clock)
            waiting.on_connection_queued_end.append(_start_clock)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0,  # each calling thread has one connection at most
                    limit_per_host=self.limits.max_per_host,
                    keepalive_timeout=KEEPALIVE_S,
                    socket_factory=self._make_socket,
                ),
                headers=HEADERS,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # `_try` keeps the time
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                auto_decompress=False,
                trace_configs=[waiting],
            )
        return self._session

    def _make_socket(self, info: aiohttp.AddrInfoType) -> socket.socket:
        """The one place where aiohttp gets its sockets from, for names and for literals."""
        family, kind, protocol, _, address = info
        if not is_allowed(str(address[0]), self._opened):
            _refused_addresses.get().append(str(address[0]))
            raise OSError("the address is refused")  # of another type, aiohttp's race of addresses would lose it
        return socket.socket(family, kind, protocol)

    async def _take(self, response: aiohttp.ClientResponse, name: str) -> bytes:
        """The body of an answer that is no redirect."""
        self._check_status(response, name)
        content_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if content_type not in TAKEN_TYPES and not content_type.startswith("image/"):
            message = f"{name}: the content type is {printable(content_type)}, not an image's."
            raise SampleError("http_content_type", message)
        encoding = ", ".join(response.headers.getall("Content-Encoding", [])).strip().lower()
        if encoding not in ("", "identity"):
            message = f"{name}: the body is encoded with {printable(encoding)}, which is not taken."
            raise SampleError("http_content_type", message)
        return await self._read(response, name)

    def _check_status(self, response: aiohttp.ClientResponse, name: str) -> None:
        if response.status == http.client.OK:
            return
        phrase = http.client.responses.get(response.status, "")  # the server's own could be any text
        message = f"{name}: answered {f'{response.status} {phrase}'.strip()}."
        if response.status not in RETRIED:
            raise SampleError("http_status", message)
        wait_s = parse_retry_after(response.headers.get("Retry-After"))
        if wait_s > self.limits.max_retry_after_s:
            limit = f"{self.limits.max_retry_after_s:g} s, the limit"
            raise SampleError("http_status", f"{message[:-1]} and asks to wait {wait_s:.0f} s, more than {limit}.")
        raise _TransientError("http_status", message, wait_s)

    async def _read(self, response: aiohttp.ClientResponse, name: str) -> bytes:
        max_bytes = self.limits.max_bytes
        too_many = SampleError("image_too_many_bytes", f"{name}: the image has more than {max_bytes} bytes, the limit.")
        if (response.content_length or 0) > max_bytes:
            raise too_many
        body = bytearray()
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > max_bytes:
                raise too_many
        return bytes(body)


def parse_retry_after(value: str | None) -> float:
    """Seconds from now, of a Retry-After in seconds or as a date; 0 for one that cannot be read."""
    value = (value or "").strip()
    if re.fullmatch(r"\d+", value, re.ASCII):
        return min(float(value), 1e9)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """aiohttp's errors as ours. Their texts and causes are left out, for some hold the whole URL."""
    refused: list[str] = []
    _refused_addresses.set(refused)
    try:
        yield
    except TimeoutError:  # some are ClientErrors too
        raise
    except aiohttp.ClientConnectorError as error:
        if refused:
            message = f"{name}: the address {printable(', '.join(refused))} is not a public one."
            raise SampleError("url_refused", message) from None
        message = f"{name}: no connection ({printable(error.os_error.strerror or str(error.os_error))})."
        permanent = _is_permanent(error.os_error)
        raise (SampleError if permanent else _TransientError)("http_unreachable", message) from None
    except ValueError:  # InvalidURL, and a host that DNS cannot spell
        raise SampleError("url_invalid", f"{name}: not a URL that can be asked for.") from None
    except (aiohttp.ClientError, OSError) as error:
        message = f"{name}: the connection broke or did not speak HTTP ({type(error).__name__})."
        raise _TransientError("http_unreachable", message) from None


def _is_permanent(error: Exception) -> bool:
    """No such name, or a certificate that is not right: another try a few seconds later would only cost time."""
    unknown = isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME
    return unknown or isinstance(error, ssl.SSLCertVerificationError)


def _last_error(state: tenacity.RetryCallState) -> SampleError:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, SampleError)
    return error


def _raise_last(state: tenacity.RetryCallState) -> NoReturn:
    error = _last_error(state)
    tries = f", at the last of {state.attempt_number} tries." if state.attempt_number > 1 else "."
    raise SampleError(error.error_type, error.message.removesuffix(".") + tries) from None


def _retry_after_s(error: BaseException) -> float:
    return error.retry_after_s if isinstance(error, _TransientError) else 0.0


class _Clock:
    """The time limit of one try, which can be stopped."""

    def __init__(self, timeout: asyncio.Timeout) -> None:
        self.timeout = timeout
        self.left_s = 0.0

    def stop(self) -> None:
        self.left_s = (self.timeout.when() or 0.0) - asyncio.get_running_loop().time()
        self.timeout.reschedule(None)

    def start(self) -> None:
        self.timeout.reschedule(asyncio.get_running_loop().time() + self.left_s)


async def _stop_clock(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    context.trace_request_ctx.stop()


async def _start_clock(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    context.trace_request_ctx.start()
