"""Load for a deployment: clients that ask one question after another, and what became of each.

A request counts as answered only when its stream came to its end. Used by the other online benchmarks.
"""

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Asked:
    """One request; `outcome` is `answered`, a status such as `503`, or the name of what broke the connection."""

    started: float
    outcome: str = ""
    detail: str = ""
    has_retry_after: bool = False
    first_token: float | None = None
    ended: float = 0.0
    tries: int = 1


@dataclass
class Load:
    """Clients that run until they are told to stop."""

    url: str
    key: str
    body: dict[str, Any]
    retries: bool = False
    """Ask again, after Retry-After or a second, until there is an answer."""
    asked: list[Asked] = field(default_factory=list)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, num_clients: int, seconds: float, pause_s: float = 0.0) -> None:
        """Let so many clients ask for so long; returns when the last answer is there."""
        async with self._client(num_clients) as client:
            tasks = [asyncio.create_task(self._ask_on(client, number, pause_s)) for number in range(num_clients)]
            await asyncio.sleep(seconds)
            self.stopping.set()
            await asyncio.gather(*tasks)

    async def run_while(self, num_clients: int, task: Callable[[], Any], pause_s: float = 0.0) -> Any:
        """As `run`, for as long as a function in a thread takes; gives its result."""
        async with self._client(num_clients) as client:
            tasks = [asyncio.create_task(self._ask_on(client, number, pause_s)) for number in range(num_clients)]
            try:
                return await asyncio.to_thread(task)
            finally:
                self.stopping.set()
                await asyncio.gather(*tasks)

    def _client(self, num_clients: int) -> aiohttp.ClientSession:
        headers = {"Authorization": f"Bearer {self.key}"}
        connector, timeout = aiohttp.TCPConnector(limit=num_clients), aiohttp.ClientTimeout(total=300)
        return aiohttp.ClientSession(self.url, headers=headers, connector=connector, timeout=timeout)

    async def _ask_on(self, client: aiohttp.ClientSession, number: int, pause_s: float) -> None:
        await asyncio.sleep(number * 0.01)
        while not self.stopping.is_set():
            asked = Asked(time.monotonic())
            self.asked.append(asked)
            wait_s = await self._ask(client, asked)
            while self.retries and asked.outcome != "answered":
                asked.tries += 1
                await asyncio.sleep(wait_s)
                wait_s = await self._ask(client, asked)
            if pause_s or asked.outcome != "answered":
                await asyncio.sleep(pause_s or 0.1)

    async def _ask(self, client: aiohttp.ClientSession, asked: Asked) -> float:
        """Ask once; gives the seconds to wait before the next try."""
        wait_s = 1.0
        asked.outcome = asked.detail = ""
        try:
            async with client.post("/v1/chat/completions", json={**self.body, "stream": True}) as response:
                if response.status != 200:
                    asked.detail = (await response.text(errors="replace"))[:300]
                    asked.outcome = str(response.status)
                    asked.has_retry_after = "Retry-After" in response.headers
                    wait_s = float(response.headers.get("Retry-After", 1))
                else:
                    asked.outcome = await self._follow(response, asked)
        except (aiohttp.ClientError, TimeoutError) as error:
            asked.outcome = type(error).__name__
        asked.ended = time.monotonic()
        return wait_s

    async def _follow(self, response: aiohttp.ClientResponse, asked: Asked) -> str:
        is_done = False
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if is_done := line.strip() == b"data: [DONE]":
                continue  # to the end: the connection can then be used again
            event = json.loads(line[6:])
            if "error" in event:
                asked.detail = json.dumps(event)[:300]
            elif asked.first_token is None and _has_text(event):
                asked.first_token = time.monotonic()
        return "answered" if is_done and not asked.detail else "cut"


def _has_text(event: dict[str, Any]) -> bool:
    delta = event["choices"][0]["delta"] if event.get("choices") else {}
    return bool(delta.get("content") or delta.get("reasoning"))


def outcomes(asked: Sequence[Asked]) -> dict[str, int]:
    """How many requests ended in which way."""
    return dict(sorted(Counter(one.outcome for one in asked).items()))


def ttft_ms(asked: Sequence[Asked]) -> list[float]:
    """Times to the first token of the requests that were answered."""
    answered = [one for one in asked if one.outcome == "answered" and one.first_token is not None]
    return [1000 * ((one.first_token or 0.0) - one.started) for one in answered]


def latency_s(asked: Sequence[Asked]) -> list[float]:
    """Of the requests that were answered, to their end."""
    return [one.ended - one.started for one in asked if one.outcome == "answered"]


def describe(values: Sequence[float], digits: int = 2) -> str:
    """Median, 95th percentile and largest."""
    if len(values) < 2:
        return ", ".join(f"{value:.{digits}f}" for value in values) or "none"
    p95 = statistics.quantiles(values, n=20)[-1]
    return f"median {statistics.median(values):.{digits}f}, p95 {p95:.{digits}f}, max {max(values):.{digits}f}"
