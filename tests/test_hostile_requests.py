"""Hostile requests over HTTP: each gets its status, and the server goes on answering.

Groups are sent four at a time, and a good request is asked after each group.
Not covered: many at once (benchmarks/overload.py), and random ones (benchmarks/fuzz_api.py).
"""

import concurrent.futures
import json
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.engines import scene_image
from tests.hostile_bodies import GROUPS, MARKER, TYPED, Hostile, ask, data_url
from tests.serving import Served
from tests.test_online_keys import holds, log_files

CHAT = "/v1/chat/completions"
DOCS = Path(__file__).resolve().parent.parent / "docs" / "serving-api.md"
MAX_GROWTH_BYTES = 1 << 30
"""Of the replica's memory over all groups: bodies of 28 MB are held several times while they are read."""
WRONG_KEY = "MARKER-wrong-key-0123456789"


def send(served: Served, hostile: Hostile) -> int:
    """The status; no answer may quote a prompt or a key."""
    status, _, body = served.request(CHAT, hostile.body)
    assert MARKER.encode() not in body, hostile.name
    assert served.key.encode() not in body, hostile.name
    if status != 200:
        assert b"Traceback" not in body, hostile.name
    return status


def check_good_request(served: Served) -> None:
    """The server is well."""
    status, _, body = served.request(CHAT, ask("Hello"))
    assert status == 200, body


@pytest.mark.parametrize("group", GROUPS)
def test_each_gets_its_status_and_the_server_goes_on(served: Served, group: str) -> None:
    cases = GROUPS[group]()
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        got = dict(zip((case.name for case in cases), threads.map(lambda case: send(served, case), cases), strict=True))
    assert got == {case.name: case.status for case in cases}
    check_good_request(served)


@pytest.mark.parametrize("mode", ["auto", "long", "short"])
@pytest.mark.parametrize("name", TYPED)
def test_special_text_in_a_prompt_leaves_sides_apart(served: Served, name: str, mode: str) -> None:
    picture = {"type": "image_url", "image_url": {"url": data_url(scene_image(34).data)}}
    text = {"type": "text", "text": f"{TYPED[name]} How many shapes are there?"}
    body = ask(picture, text, max_tokens=60, chat_template_kwargs={"thinking_mode": mode})
    status, _, answer = served.request(CHAT, body)
    assert status == 200, answer
    message = json.loads(answer)["choices"][0]["message"]
    assert "think>" not in f"{message['reasoning']}{message['content']}"
    if mode == "short":
        assert message["reasoning"] is None


def talk(served: Served, raw: bytes, timeout_s: float = 30.0) -> bytes:
    """Send bytes as they are; what comes back until the server closes, or is silent for a second after an answer."""
    where = urlsplit(served.base_url)
    with socket.create_connection((where.hostname, where.port), timeout_s) as connection:
        connection.sendall(raw)
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
                connection.settimeout(1.0)
        except (TimeoutError, ConnectionResetError):
            pass
    return answer


def statuses(answer: bytes) -> list[int]:
    """Of all responses in what came back."""
    return [int(code) for code in re.findall(rb"HTTP/1\.[01] (\d{3})", answer)]


def raw_post(served: Served, *headers: bytes, body: bytes = b"", target: bytes = CHAT.encode()) -> bytes:
    """A request written by hand, with a valid key."""
    key = b"Authorization: Bearer " + served.key.encode()
    lines = [b"POST " + target + b" HTTP/1.1", b"Host: 127.0.0.1", b"Content-Type: application/json", key, *headers]
    return b"\r\n".join([*lines, b"Connection: close", b"", body])


GOOD = json.dumps(ask("Hello", max_tokens=1)).encode()

# name -> header lines, body, target, statuses that are right; an empty answer is a closed connection
RAW: dict[str, tuple[list[bytes], bytes, bytes, set[int]]] = {
    "two Content-Lengths": ([b"Content-Length: 2", b"Content-Length: 200"], GOOD, CHAT.encode(), {400}),
    "Content-Length and chunks": (
        [b"Content-Length: 3", b"Transfer-Encoding: chunked"],
        b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
        CHAT.encode(),
        {400},
    ),
    "a negative Content-Length": ([b"Content-Length: -1"], GOOD, CHAT.encode(), {400}),
    "a Content-Length of 200 MB": ([b"Content-Length: 200000000"], b"", CHAT.encode(), {413}),
    "a chunk of a size that is none": ([b"Transfer-Encoding: chunked"], b"zz\r\nabc\r\n", CHAT.encode(), {400}),
    "a header folded over two lines": ([b"X-A: 1", b" 2", b"Content-Length: 0"], b"", CHAT.encode(), {400}),
    "a header with a NUL": ([b"X-A: 1\0", b"Content-Length: 0"], b"", CHAT.encode(), {400}),
    "headers of 100 kB": ([b"X-A: " + b"a" * 100_000, b"Content-Length: 0"], b"", CHAT.encode(), {400, 431}),
    "a path with `..`": ([b"Content-Length: 0"], b"", b"/playground/../../etc/passwd", {400, 404}),
    "a path with `%2e%2e`": ([b"Content-Length: 0"], b"", b"/playground/%2e%2e/%2e%2e/etc/passwd", {400, 404, 405}),
    "a path with `..%2f`": ([b"Content-Length: 0"], b"", b"/playground/..%2f..%2fetc/passwd", {400, 404, 405}),
    "a path that is not served": ([b"Content-Length: 2"], b"{}", b"/v1/completions", {404}),
    "a path of vLLM's for operators": ([b"Content-Length: 2"], b"{}", b"/pause", {404}),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_http_gets_its_status_and_no_second_answer(served: Served, name: str) -> None:
    headers, body, target, right = RAW[name]
    got = statuses(talk(served, raw_post(served, *headers, body=body, target=target)))
    assert got == [] or set(got[:1]) <= right
    assert 200 not in got
    check_good_request(served)


def test_raw_request_id_with_a_line_break_adds_no_header(served: Served) -> None:
    headers = [b"X-Request-Id: a\r\nX-Injected: 1", b"Content-Length: " + str(len(GOOD)).encode()]
    answer = talk(served, raw_post(served, *headers, body=GOOD))
    assert b"x-injected" not in answer.lower().partition(b"\r\n\r\n")[0]


def test_raw_body_without_end_is_not_waited_for_by_others(served: Served) -> None:
    where = urlsplit(served.base_url)
    with socket.create_connection((where.hostname, where.port), 30) as slow:
        slow.sendall(raw_post(served, b"Content-Length: 1000000", body=b'{"model"'))
        check_good_request(served)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "GET"])
def test_methods_that_are_not_served_are_refused(served: Served, method: str) -> None:
    assert served.request(CHAT, method=method)[0] == 405


def test_logs_and_memory_after_hostile_requests(served: Served) -> None:
    before = replica_bytes(served)
    for group in ("bodies", "constraints", "messages"):
        for case in GROUPS[group]():
            send(served, case)
    status, _, _ = served.request(CHAT, ask(MARKER), {"authorization": f"Bearer {WRONG_KEY}"})
    assert status == 401
    assert replica_bytes(served) - before < MAX_GROWTH_BYTES
    picture = data_url(scene_image(34).data)[40:140]
    assert [path for path in log_files(served) if holds(path, MARKER, WRONG_KEY, served.key, picture)] == []


def replica_bytes(served: Served) -> int:
    """Memory of the processes that hold requests: the replica's, which has the app."""
    family = psutil.Process(served.process.pid).children(recursive=True)
    replicas = [process for process in family if "ServeReplica" in " ".join(process.cmdline())]
    assert replicas
    return sum(int(process.memory_info().rss) for process in replicas)


def table_rows() -> list[str]:
    """The rows that docs/serving-api.md must have, one for each hostile request."""
    return [f"| {group} | {case.name} | {case.status} |" for group, make in GROUPS.items() for case in make()]


def test_docs_table_has_every_hostile_request() -> None:
    rows: list[Any] = table_rows()
    assert len(rows) >= 60
    written = DOCS.read_text().splitlines()
    assert [row for row in rows if row not in written] == []
