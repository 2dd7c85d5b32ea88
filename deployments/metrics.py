"""What is counted, and `/metrics`: vLLM's, Serve's and our figures as this node's Ray agent gives them to Prometheus.

All go through Ray, vLLM's by its own Ray logger, so that one scrape of each node sees every replica there. Ray passes
figures on every few seconds (metrics_report_interval_ms).
Not covered: other nodes. In a cluster, Prometheus scrapes each node's agent, not this path.
"""

import asyncio
import urllib.request

import ray
from ray.exceptions import RayError
from ray.util.metrics import Counter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from pipeline.engine.openai_app import FinishedChoice

TIMEOUT_S = 5.0
SHOWN_PREFIXES = ("ray_vllm", "ray_serve", "ray_r4b")
"""Of all that Ray counts on a node. Its exporter puts `ray_` before each name."""
CONTENT_TYPE = "text/plain; version=0.0.4"


class ChoiceMetrics:
    """Counters over all completions of a replica."""

    def __init__(self) -> None:
        keys = ("mode", "finish_reason")
        self._choices = Counter("r4b_choices", "Completions, by mode and finish_reason.", tag_keys=keys)
        self._reasoning = Counter("r4b_reasoning_tokens", "Tokens of thoughts.", tag_keys=keys)
        self._answers = Counter("r4b_answer_tokens", "Tokens of answers.", tag_keys=keys)

    def count(self, choice: FinishedChoice) -> None:
        """Add one completion."""
        tags = {"mode": choice.mode, "finish_reason": choice.finish_reason}
        self._choices.inc(1, tags)
        for counter, tokens in ((self._reasoning, choice.reasoning_tokens), (self._answers, choice.answer_tokens)):
            if tokens:  # Ray refuses to add nothing
                counter.inc(tokens, tags)


async def show_metrics(_: Request) -> Response:
    """The `/metrics` of this node, in Prometheus' text format."""
    try:
        text = await asyncio.to_thread(_fetch)
    except (OSError, RayError):
        return PlainTextResponse("This node's metrics agent does not answer.", status_code=503)
    return PlainTextResponse(text, media_type=CONTENT_TYPE)


def _agent_url() -> str:
    node_id = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def _fetch() -> str:
    with urllib.request.urlopen(_agent_url(), timeout=TIMEOUT_S) as response:
        lines = response.read().decode().splitlines(keepends=True)
    return "".join(line for line in lines if _name(line).startswith(SHOWN_PREFIXES))


def _name(line: str) -> str:
    """Of a sample, or of the metric that a comment is about."""
    return line.split(" ", 3)[2] if line.startswith("# ") else line
