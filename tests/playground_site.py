"""The playground on a server of the tests' own: the real page, and an API that says what a test has written down.

Each piece of a reply is one chunk on the wire; a `Gate` among them holds the rest back until the test opens it, so that
a test sees the page in mid-stream without waiting for time to pass.
Not covered: anything that R-4B or vLLM do; one test asks the real server.
"""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Message, Receive, Scope, Send

from deployments.pages import Pages

DONE = b"data: [DONE]\n\n"
PATIENCE_S = 60.0


class Gate(threading.Event):
    """What comes after it in a reply waits until a test opens it (`set`)."""


@dataclass(frozen=True)
class Reply:
    """One answer of the API. `is_broken`: the connection ends where the pieces end, as a lost one does."""

    pieces: Sequence[bytes | Gate]
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "text/event-stream; charset=utf-8"})
    is_broken: bool = False


@dataclass(frozen=True)
class Asked:
    """What the page sent."""

    headers: dict[str, str]
    body: dict[str, Any]


class Site:
    """Replies are used up in order, to the last one, which stays; `key` is None where none is asked for."""

    def __init__(self) -> None:
        self.replies: list[Reply] = [answer_reply("An answer.")]
        self.asked: list[Asked] = []
        self.model = "r4b"
        self.key: str | None = None
        self.is_left = threading.Event()
        """A client went away before its answer was complete."""
        self.base_url = ""

    @property
    def url(self) -> str:
        return f"{self.base_url}/playground/"

    async def api(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI app below /v1."""
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        body = await read_body(receive)
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            reply = error_reply(401, "Unauthorized")
        elif scope["path"].endswith("/models"):
            reply = json_reply(200, {"object": "list", "data": [{"id": self.model, "object": "model"}]})
        else:
            self.asked.append(Asked(headers, json.loads(body)))
            reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        await self._send(reply, receive, send)

    async def _send(self, reply: Reply, receive: Receive, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in reply.headers.items()]
        watch = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        for piece in reply.pieces:
            if isinstance(piece, Gate):
                await wait_for(piece, watch)
            if watch.done():
                self.is_left.set()
                return
            if isinstance(piece, bytes):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                await asyncio.sleep(0)
        watch.cancel()
        if reply.is_broken:
            raise ConnectionError("the test breaks this connection")
        await send({"type": "http.response.body", "body": b""})


async def wait_for(gate: Gate, watch: "asyncio.Future[Message]") -> None:
    """Until the gate is open, or the client gone."""
    async with asyncio.timeout(PATIENCE_S):
        while not gate.is_set() and not watch.done():
            await asyncio.sleep(0.005)


async def read_body(receive: Receive) -> bytes:
    """All of a request's body."""
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if not message.get("more_body", False):
            return body


@contextmanager
def running_site() -> Iterator[Site]:
    """The page and its API on a free port of the loopback interface."""
    site = Site()
    app = Starlette(routes=[Mount("/playground", Pages()), Mount("/v1", site.api)])
    # no log: a connection that a test breaks is an error to uvicorn
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        site.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield site
        finally:
            server.should_exit = True
            thread.join()


def event(payload: Any) -> bytes:
    """A server-sent event as vLLM writes it."""
    return f"data: {json.dumps(payload, ensure_ascii=False)}\n\n".encode()


def delta(finish_reason: str | None = None, **parts: str) -> bytes:
    """A chunk of one choice: `reasoning`, `content`, `role`."""
    choice = {"index": 0, "delta": parts, "logprobs": None, "finish_reason": finish_reason}
    return event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "r4b", "choices": [choice]})


def usage(prompt: int, completion: int, reasoning: int) -> bytes:
    """The last chunk, with the counts."""
    details = {"reasoning_tokens": reasoning}
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return event({"id": "chatcmpl-1", "choices": [], "usage": {**counts, "completion_tokens_details": details}})


FIRST = delta(role="assistant", content="")
"""What vLLM sends before all text."""


def answer_reply(answer: str, thought: str = "", finish_reason: str = "stop") -> Reply:
    """A whole answer, with or without a thought before it."""
    thoughts = [delta(reasoning=thought)] if thought else []
    answers = [delta(content=answer)] if answer else []
    end = [delta(finish_reason), usage(143, 60, 40 if thought else 1), DONE]
    return Reply([FIRST, *thoughts, *answers, *end])


def json_reply(status: int, body: Any, **headers: str) -> Reply:
    """An answer that is no stream; `retry_after="1"` is the header Retry-After."""
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply([json.dumps(body).encode()], status, {"content-type": "application/json", **more})


def error_reply(status: int, message: str, **headers: str) -> Reply:
    """An error in OpenAI's form."""
    return json_reply(
        status, {"error": {"message": message, "type": "Error", "param": None, "code": status}}, **headers
    )
