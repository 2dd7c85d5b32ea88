"""What a client is told before its stream and in the middle of it: of an engine that died, and of limits."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from pipeline.engine import openai_app
from pipeline.engine.chat_limits import ChatLimits, check_request
from pipeline.engine.online_llm import EngineGoneError, OnlineLLM
from pipeline.engine.openai_app import CheckedChat, check_rendered

OUTPUT = SimpleNamespace(outputs=[], prompt_token_ids=[])


def test_engine_that_died_in_a_stream_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def die(*_: Any, **__: Any) -> AsyncIterator[Any]:
        yield OUTPUT
        raise EngineDeadError

    monkeypatch.setattr(AsyncLLM, "generate", die)

    async def ask() -> None:
        params = SimpleNamespace(output_kind=RequestOutputKind.DELTA)
        outputs = OnlineLLM.__new__(OnlineLLM).generate({}, params, "x")
        assert await anext(outputs) is OUTPUT
        with pytest.raises(EngineGoneError):
            await anext(outputs)

    asyncio.run(ask())


@pytest.mark.parametrize("error", [EngineDeadError(), EngineGenerateError()])
def test_request_to_a_dead_engine_is_unavailable(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def refuse(*_: Any) -> None:
        raise error

    monkeypatch.setattr(openai_app, "check_request", lambda request, limits: None)
    request: Any = SimpleNamespace()
    limits: Any = None
    with pytest.raises(EngineGoneError):
        asyncio.run(
            CheckedChat(SimpleNamespace(create_chat_completion=refuse), limits).create_chat_completion(request, None)
        )


def test_vllm_makes_503_of_it_with_a_message_for_the_client() -> None:
    told = create_error_response(EngineGoneError()).error
    assert (told.code, told.type) == (503, "Service Unavailable")
    assert told.message == "The engine died; another one is being started."


@pytest.mark.parametrize(
    ("asked", "is_taken"),
    [
        ({"logprobs": True, "top_logprobs": 20, "max_tokens": 4761}, True),
        ({"logprobs": True, "top_logprobs": 20, "max_tokens": 4762}, False),
        ({"logprobs": True, "top_logprobs": 20, "max_completion_tokens": 4762}, False),
        ({"logprobs": True, "top_logprobs": 20, "max_tokens": 4762, "stream": True}, True),
        ({"logprobs": True, "max_tokens": 12_500, "n": 8}, True),
        ({"logprobs": True, "max_tokens": 12_501, "n": 8}, False),
        ({"logprobs": True, "top_logprobs": 5}, True),
        ({"logprobs": True, "top_logprobs": 6}, False),
        ({"max_tokens": 16_384, "n": 8}, True),
    ],
)
def test_logprobs_of_one_answer_are_bounded(asked: dict[str, Any], is_taken: bool) -> None:
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "Hi"}], model="r4b", **asked)
    if is_taken:
        check_request(request, ChatLimits())
    else:
        with pytest.raises(VLLMValidationError, match="100000, the most in one answer"):
            check_request(request, ChatLimits())


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_the_whole_vocabulary_are_refused(stream: bool) -> None:
    asked = {"logprobs": True, "top_logprobs": -1, "max_tokens": 1, "stream": stream}
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "Hi"}], model="r4b", **asked)
    with pytest.raises(VLLMValidationError, match="top_logprobs"):
        check_request(request, ChatLimits())


@pytest.mark.parametrize(("limit", "is_taken"), [(None, True), (3, True), (2, False)])
def test_prompt_above_the_servers_limit_is_refused_when_it_is_rendered(limit: int | None, is_taken: bool) -> None:
    llm = OnlineLLM.__new__(OnlineLLM)
    llm.max_prompt_tokens = limit
    rendered: Any = ([], [{"prompt_token_ids": [1, 2, 3]}])

    async def render(_: Any) -> Any:
        return rendered

    rendering = check_rendered(render, llm.check_length)(SimpleNamespace())
    if is_taken:
        assert asyncio.run(rendering) is rendered
    else:
        with pytest.raises(VLLMValidationError, match="3 tokens, this server takes 2"):
            asyncio.run(rendering)
