"""The AsyncLLM behind HTTP: vLLM's own, which also tells of each completion and keeps the grammar out of the thought.

A request that meets a dead engine is told to come again, also in the middle of its stream.
Not covered: requests that end before their first token.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

OnFinished = Callable[[Sequence[int], Sequence[int], str], None]
"""Takes the prompt's token ids, the completion's, and its finish_reason."""


class EngineGoneError(GracefulHTTPError):  # type: ignore[misc]  # vLLM has no types
    """HTTP 503. vLLM's EngineDeadError would be a 500 that sends the client to a stack trace."""

    def __init__(self) -> None:
        super().__init__("The engine died; another one is being started.", HTTPStatus.SERVICE_UNAVAILABLE)


class OnlineLLM(AsyncLLM):  # type: ignore[misc]  # vLLM has no types
    """Set `on_finished` and `max_prompt_tokens` after the start."""

    on_finished: OnFinished = staticmethod(lambda prompt_ids, token_ids, finish_reason: None)
    max_prompt_tokens: int | None = None

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As vLLM's; raises VLLMValidationError for a prompt above `max_prompt_tokens`, EngineGoneError."""
        self.check_length(prompt)
        outputs = self._generate(prompt, sampling_params, request_id, options)
        try:
            async for output in outputs:
                yield output
        except EngineDeadError as error:
            raise EngineGoneError from error
        finally:
            await outputs.aclose()  # or vLLM would learn late that the client has gone

    async def _generate(
        self, prompt: Any, sampling_params: Any, request_id: str, options: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        # vLLM says True here where the client wants no reasoning shown, which would put the thought under the grammar.
        options["reasoning_ended"] = None
        is_delta = sampling_params.output_kind == RequestOutputKind.DELTA
        seen: dict[int, list[int]] = {}
        async for output in super().generate(prompt, sampling_params, request_id, **options):
            for choice in output.outputs:
                if is_delta:
                    seen.setdefault(choice.index, []).extend(choice.token_ids)
                if choice.finish_reason is not None:
                    token_ids = seen.pop(choice.index) if is_delta else choice.token_ids
                    self.on_finished(output.prompt_token_ids or [], token_ids, str(choice.finish_reason))
            yield output

    def check_length(self, prompt: Any) -> None:
        """Raise VLLMValidationError for a prompt above `max_prompt_tokens`."""
        length = len(prompt.get("prompt_token_ids") or ()) if isinstance(prompt, dict) else 0
        if self.max_prompt_tokens is not None and length > self.max_prompt_tokens:
            raise VLLMValidationError(
                f"The prompt has {length} tokens, this server takes {self.max_prompt_tokens}.", parameter="messages"
            )
