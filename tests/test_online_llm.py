"""What a client is told of an engine that died: 503, before its stream and in the middle of it."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from pipeline.engine import openai_app
from pipeline.engine.online_llm import EngineGoneError, OnlineLLM
from pipeline.engine.openai_app import CheckedChat

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
