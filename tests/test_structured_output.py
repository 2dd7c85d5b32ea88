"""Thoughts and constrained answers through vLLM's own chat serving, on a real engine with the small checkpoint.

Covers what needs an engine: grammars that leave the thought alone, thinking budgets, and that a response, full or
streamed, is what batch makes of the same request. The parser's own cases are in test_reasoning_parser.py.
Not covered: HTTP itself, keys and limits; requests reach vLLM's app in this process.
"""

import asyncio
import base64
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from vllm.config import StructuredOutputsConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from jobs.demo import CPU_ENGINE_ARGS
from pipeline.engine.online_llm import OnlineLLM
from pipeline.engine.reasoning import R4BParser
from pipeline.engine.vllm_engine import VLLMEngine
from pipeline.records import Generation
from tests.engines import REAL_SPEC, RunningEngine, question, scene_image

MODES = ("auto", "long", "short")
COUNT, DESCRIBE = "How many shapes are there?", "Describe this image."
SCENE = 34  # its six shapes the model counts by thinking in auto mode, and describes without
ARGS = {
    **CPU_ENGINE_ARGS,
    "reasoning_parser": "r4b",
    # The small model would fill JSON with line breaks for as long as a grammar lets it.
    "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
}
TASKS: Any = ("generate",)


@dataclass(frozen=True)
class Reply:
    """One choice of a response; a stream's is put together from its deltas."""

    reasoning: str | None
    content: str | None
    finish_reason: str | None
    usage: dict[str, Any]

    @property
    def reasoning_tokens(self) -> int:
        return int(self.usage["completion_tokens_details"]["reasoning_tokens"])

    def shown(self) -> tuple[str, str, str | None, int, int]:
        """What a full response and a stream of the same request have in common."""
        return (
            self.reasoning or "",
            self.content or "",
            self.finish_reason,
            self.usage["completion_tokens"],
            self.reasoning_tokens,
        )


@dataclass(frozen=True)
class Chat:
    """vLLM's app over a running engine."""

    running: RunningEngine
    client: httpx.AsyncClient

    def ask(self, *bodies: dict[str, Any]) -> list[list[Reply]]:
        """All requests at once; the choices of each."""

        async def ask_all() -> list[list[Reply]]:
            return list(await asyncio.gather(*(self._ask(body) for body in bodies)))

        return self.running.run(ask_all())

    async def _ask(self, body: dict[str, Any]) -> list[Reply]:
        response = await self.client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        if body.get("stream"):
            return _put_together(response.text)
        whole = response.json()
        return [
            Reply(choice["message"]["reasoning"], choice["message"]["content"], choice["finish_reason"], whole["usage"])
            for choice in whole["choices"]
        ]


def _put_together(events: str) -> list[Reply]:
    texts: dict[tuple[int, str], str] = {}
    reasons: dict[int, str] = {}
    usage: dict[str, Any] = {}
    lines = [line.removeprefix("data: ") for line in events.splitlines() if line]
    assert lines[-1] == "[DONE]"
    for chunk in map(json.loads, lines[:-1]):
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            index = choice["index"]
            for side in ("reasoning", "content"):
                texts[index, side] = texts.get((index, side), "") + (choice["delta"].get(side) or "")
            if choice["finish_reason"]:
                assert index not in reasons
                reasons[index] = choice["finish_reason"]
    return [Reply(texts[i, "reasoning"], texts[i, "content"], reasons[i], usage) for i in sorted(reasons)]


def body(text: str, mode: str, *, scene: int = SCENE, **more: Any) -> dict[str, Any]:
    """A greedy request about a scene."""
    url = f"data:image/png;base64,{base64.b64encode(scene_image(scene).data).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {
        "model": "r4b",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 256,
        "chat_template_kwargs": {"thinking_mode": mode},
        **more,
    }


def streamed(request: dict[str, Any]) -> dict[str, Any]:
    return {**request, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.fixture(scope="module")
def chat() -> Iterator[Chat]:
    loop = asyncio.new_event_loop()

    async def start() -> tuple[VLLMEngine, httpx.AsyncClient]:
        engine = await VLLMEngine.start(REAL_SPEC.model_copy(update={"args": ARGS}), OnlineLLM)
        args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        args.model, args.served_model_name = REAL_SPEC.model, ["r4b"]
        args.structured_outputs_config = engine.llm.vllm_config.structured_outputs_config
        args.disable_log_stats = True
        app = build_app(args, TASKS)
        await init_app_state(engine.llm, app.state, args, TASKS)
        parser = R4BParser.with_tags(engine.tags)
        app.state.openai_serving_chat.parser_cls = app.state.online_renderer.parser = parser
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://r4b", timeout=300)
        return engine, client

    engine, client = loop.run_until_complete(start())
    try:
        yield Chat(RunningEngine(engine, loop), client)
    finally:
        engine.shutdown()
        loop.run_until_complete(client.aclose())
        loop.run_until_complete(asyncio.sleep(0.1))
        loop.close()


def expected_of(generation: Generation) -> tuple[str, str, str | None, int, int]:
    """What the online response to the same request must show."""
    return (
        generation.reasoning or "",
        generation.answer or "",
        generation.finish_reason,
        generation.completion_tokens,
        generation.reasoning_tokens,
    )


@pytest.mark.parametrize("mode", MODES)
def test_online_shows_what_batch_stores(chat: Chat, mode: str) -> None:
    asked = [(text, scene, tokens) for text in (COUNT, DESCRIBE) for scene in (SCENE, 8) for tokens in (256, 20, 1)]
    batch = chat.running.generate(
        *(question(text, scene_image(scene), mode=mode, max_tokens=tokens) for text, scene, tokens in asked)
    )
    requests = [body(text, mode, scene=scene, max_tokens=tokens) for text, scene, tokens in asked]
    replies = chat.ask(*requests, *map(streamed, requests))
    for (full,), (stream,), generation in zip(replies[: len(asked)], replies[len(asked) :], batch, strict=True):
        assert full.shown() == stream.shown() == expected_of(generation)
        assert (full.reasoning, full.content) == (generation.reasoning, generation.answer)
    if mode != "short":
        assert any(generation.thinking_truncated and generation.reasoning for generation in batch)


def test_stop_strings_are_never_shown_and_streams_equal_full_responses(chat: Chat) -> None:
    all_stops = [[" square"], ["ed sq", "angle.", "zzz"], ["Row 2", "6"]]
    requests = [body(DESCRIBE, mode, stop=stops) for mode in MODES for stops in all_stops]
    replies = chat.ask(*requests, *map(streamed, requests))
    for request, (full,), (stream,) in zip(requests, replies[: len(requests)], replies[len(requests) :], strict=True):
        assert full.shown() == stream.shown()
        assert full.finish_reason == "stop"
        assert full.content or full.reasoning
        for text in (full.reasoning or "", full.content or ""):
            assert not any(stop in text for stop in request["stop"])


# name -> what the request says, and whether an answer keeps to it
CONSTRAINTS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "json schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "count",
                    "schema": {
                        "type": "object",
                        "properties": {"color": {"enum": ["red", "blue"]}, "many": {"type": "boolean"}},
                        "required": ["color", "many"],
                        "additionalProperties": False,
                    },
                },
            }
        },
        lambda answer: (
            json.loads(answer).keys() == {"color", "many"}
            and json.loads(answer)["color"] in ("red", "blue")
            and isinstance(json.loads(answer)["many"], bool)
        ),
    ),
    "choice": ({"structured_outputs": {"choice": ["seven", "eleven"]}}, lambda answer: answer in ("seven", "eleven")),
    "regex": (
        {"structured_outputs": {"regex": "[0-9]{2}-[a-c]{3}x"}},
        lambda answer: re.fullmatch("[0-9]{2}-[a-c]{3}x", answer) is not None,
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", [COUNT, DESCRIBE])
def test_constraint_holds_for_the_answer_and_leaves_the_thought_alone(chat: Chat, text: str, mode: str) -> None:
    bound = [body(text, mode, **constraint) for constraint, _ in CONSTRAINTS.values()]
    (free,), *replies = chat.ask(body(text, mode), *bound, *map(streamed, bound))
    assert (free.reasoning is None) is (mode == "short" or (mode, text) == ("auto", DESCRIBE))
    for name, (full,), (stream,) in zip(CONSTRAINTS, replies[: len(bound)], replies[len(bound) :], strict=True):
        _, is_kept = CONSTRAINTS[name]
        assert full.shown() == stream.shown(), name
        assert full.finish_reason == "stop", name
        assert is_kept(full.content or ""), (name, full.content)
        assert not is_kept_by_luck(free, is_kept), name
        assert (full.reasoning, full.reasoning_tokens) == (free.reasoning, free.reasoning_tokens), name


def is_kept_by_luck(free: Reply, is_kept: Callable[[str], bool]) -> bool:
    try:
        return is_kept(free.content or "")
    except (ValueError, AttributeError):
        return False


def test_constraint_leaves_a_thought_alone_that_is_not_wanted(chat: Chat) -> None:
    constraint, is_kept = CONSTRAINTS["choice"]
    for mode in MODES:
        bound = body(COUNT, mode, **constraint)
        hidden = {**bound, "include_reasoning": False}
        ((shown,), (full,), (stream,)) = chat.ask(bound, hidden, streamed(hidden))
        assert full.shown() == stream.shown() == ("", *shown.shown()[1:])
        assert is_kept(full.content or "")


@pytest.mark.parametrize("mode", ["auto", "long"])
def test_thinking_budget_ends_a_thought_that_the_prompt_opened(chat: Chat, mode: str) -> None:
    budgets = [0, 1, 2, 3, 5, 10, 30, 200]
    # In some other scenes the small model, cut off in its first words, goes on thinking after the tag.
    (free,), *replies = chat.ask(
        body(COUNT, mode, scene=3),
        *(body(COUNT, mode, scene=3, thinking_token_budget=budget) for budget in budgets),
    )
    in_prompt = {"auto": 0, "long": 1}[mode]  # vLLM counts from `<think>`, so the line break after it costs one
    for budget, (reply,) in zip(budgets, replies, strict=True):
        assert reply.reasoning_tokens == min(max(0, budget - in_prompt), free.reasoning_tokens)
        assert (free.reasoning or "").startswith(reply.reasoning or "")
        assert reply.content
        assert reply.finish_reason == "stop"


def test_thinking_budget_changes_nothing_in_short_mode(chat: Chat) -> None:
    ((free,), (reply,)) = chat.ask(body(DESCRIBE, "short"), body(DESCRIBE, "short", thinking_token_budget=2))
    assert reply == free


def test_thinking_budget_and_constraint_hold_together(chat: Chat) -> None:
    constraint, is_kept = CONSTRAINTS["json schema"]
    ((reply,),) = chat.ask(body(COUNT, "long", scene=3, thinking_token_budget=6, **constraint))
    assert reply.reasoning_tokens == 5
    assert is_kept(reply.content or "")


def test_choices_of_one_request_are_split_one_by_one(chat: Chat) -> None:
    request = body(COUNT, "auto", n=3, temperature=2, seed=5, max_tokens=60)
    full, stream = chat.ask(request, streamed(request))
    assert [reply.shown()[:3] for reply in full] == [reply.shown()[:3] for reply in stream]
    assert len({reply.shown() for reply in full}) > 1
    for reply in full:
        assert not re.search("</?think>", f"{reply.reasoning}{reply.content}")


def test_a_thought_that_the_client_began_goes_on(chat: Chat) -> None:
    ((whole,),) = chat.ask(body(COUNT, "auto"))
    request = body(COUNT, "auto", add_generation_prompt=False, continue_final_message=True)
    prefix, _, rest = (whole.reasoning or "").partition(" Row 2")
    assert rest
    request["messages"].append({"role": "assistant", "content": f"<think>\n{prefix}"})
    ((full,), (stream,)) = chat.ask(request, streamed(request))
    assert full.shown() == stream.shown()
    assert prefix + (full.reasoning or "") == whole.reasoning
    assert full.content == whole.content
