"""R-4B's reasoning parser for vLLM: the thought goes to `reasoning`, the answer to `content`, streaming or not.

The prompt's and the completion's token ids decide, with batch's own code (`thought_text`, `thinking`). vLLM's text is
not searched for tags: a model may spell one, and where a request has stop strings the text comes later than its tokens.
It only says how much may be shown.
Not covered: tool calls, which R-4B does not make, and vLLM's Responses API.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.parser.abstract_parser import DelegatingParser
from vllm.reasoning import ReasoningParser

from pipeline.engine.thought_text import Reading, ThoughtStream, leaves_open, prompt_to_tail, read_whole
from pipeline.thinking import CLOSE_TAG, OPEN_TAG, Tags, opens_thought, split_thought


@lru_cache(maxsize=8)
def find_tags(tokenizer: Any) -> Tags:
    """The tags as this tokenizer has them; raises ValueError when they are not one token each. Not asked twice."""
    open_id, close_id = (tokenizer.convert_tokens_to_ids(tag) for tag in (OPEN_TAG, CLOSE_TAG))
    if None in (open_id, close_id) or tokenizer.unk_token_id in (open_id, close_id):
        raise ValueError(f"The model has no {OPEN_TAG} and {CLOSE_TAG} tokens: it does not mark its thoughts.")
    return Tags(open_id, close_id, frozenset({tokenizer.eos_token_id} - {None}))


def decoder_of(tokenizer: Any, skip_special_tokens: bool = True) -> Callable[[Sequence[int]], str]:
    """The tokenizer's `decode`, without what vLLM and transformers put around it.

    That is 1.5 microseconds for one token instead of 20, which were a sixth of what a replica's event loop did.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return lambda token_ids: str(tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
    return lambda token_ids: str(backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))


class R4BReasoningParser(ReasoningParser):  # type: ignore[misc]  # vLLM has no types
    """What `--reasoning-parser r4b` names. It tells vLLM's engine where a grammar begins and what ends a thought.

    `vllm serve` splits with it too, inside a DelegatingParser that keeps things from it: the prompt (in a full response
    for all but the first of n choices, and where include_reasoning is false), the token ids (in a full response), the
    answer (of a stream in short mode). There `thinking_mode` decides, tags are read from the text, and the answer goes
    out as it is. R4BParser is told everything.
    """

    engine_based_streaming = True  # then vLLM gives it deltas alone, and does not look for the thought's end itself

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._tags = find_tags(tokenizer)
        template_kwargs = kwargs.get("chat_template_kwargs") or {}
        self._tail = "" if template_kwargs.get("thinking_mode") == "short" else OPEN_TAG
        self._stream: ThoughtStream | None = None

    @property
    def reasoning_start_str(self) -> str:
        """From here vLLM counts a thinking budget."""
        return OPEN_TAG

    @property
    def reasoning_end_str(self) -> str:
        """This vLLM forces when the budget is spent."""
        return CLOSE_TAG

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether a completion of this prompt begins with the answer."""
        self._tail = prompt_to_tail(input_ids, self._tags)
        return not opens_thought(self._tail)

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        """Whether the newest tokens end the thought that was open before them."""
        return not leaves_open(True, delta_ids, self._tags)

    def has_engine_confirmed_reasoning_end(self) -> bool:
        """Never: the answer is for this parser too."""
        return False

    def extract_content_ids(self, input_ids: Sequence[int]) -> list[int]:
        """The answer's tokens."""
        return list(split_thought(self._tail, input_ids, self._tags).answer_ids or ())

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """As batch counts them."""
        return len(split_thought(self._tail, token_ids, self._tags).reasoning_ids)

    def adjust_request(self, request: Any) -> Any:
        """Where this tokenizer would hide the tags, make vLLM's text show them."""
        if not self.model_tokenizer.decode([self._tags.close_id], skip_special_tokens=True):
            request.skip_special_tokens = False
        return request

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """Reasoning and content of a full response, from its text."""
        token_ids = self.model_tokenizer.encode(model_output, add_special_tokens=False)
        return read_whole(self._reading(), token_ids)

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> Any:
        """A message with the new text of both sides; None when there is none."""
        if self._stream is None:
            self._stream = ThoughtStream(self._reading())
        self._stream.feed(delta_token_ids)
        return _to_message(*self._stream.take(len(delta_text)))

    def _reading(self) -> Reading:
        return Reading(self._tags, self.model_tokenizer.decode, self._tail)


class R4BParser(DelegatingParser):  # type: ignore[misc]  # vLLM has no types
    """The parser for vLLM's chat serving, instead of the DelegatingParser that vLLM makes of a reasoning parser.

    vLLM makes one for each choice of each request.
    """

    reasoning_parser_cls = R4BReasoningParser
    tags: Tags

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._tail = ""
        self._stream: ThoughtStream | None = None

    @classmethod
    def with_tags(cls, tags: Tags) -> type["R4BParser"]:
        """The parser for an engine with these tags: it counts what that engine counts in batch."""
        return type(cls.__name__, (cls,), {"tags": tags})

    def adjust_request(self, request: Any) -> Any:
        """As the client sent it: nothing here depends on what vLLM's text shows."""
        return request

    def set_prompt_token_ids(self, prompt_token_ids: Sequence[int]) -> None:
        """Take the rendered prompt, which says whether a thought is open."""
        self._tail = prompt_to_tail(prompt_token_ids, self.tags)

    def parse(
        self,
        model_output: str,
        request: Any,
        enable_auto_tools: bool = False,
        model_output_token_ids: Sequence[int] = (),
    ) -> tuple[str | None, str | None, list[Any]]:
        """Reasoning, content and no tool calls of a full response."""
        num_chars = len(model_output) if _may_stop_early(request) else math.inf
        return *read_whole(self._reading(request), model_output_token_ids, num_chars), []

    def parse_delta(
        self,
        delta_text: str,
        delta_token_ids: list[int],
        request: Any,
        prompt_token_ids: list[int] | None = None,
        *,
        finished: bool,
    ) -> Any:
        """A message with the new text of both sides; None when there is none."""
        if self._stream is None:
            self.set_prompt_token_ids(prompt_token_ids or ())
            self._stream = ThoughtStream(self._reading(request))
        self._stream.feed(delta_token_ids)
        if _may_stop_early(request):
            reasoning, content = self._stream.take(len(delta_text))
        else:
            if finished:
                self._stream.finish()
            reasoning, content = self._stream.take()
        return _to_message(reasoning if request.include_reasoning else "", content)

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """As batch counts them; without counting all again where a stream's usage is asked for after each token."""
        if self._stream is not None and self._stream.num_tokens == len(token_ids):
            return self._stream.num_reasoning_tokens
        return len(split_thought(self._tail, token_ids, self.tags).reasoning_ids)

    def _reading(self, request: Any) -> Reading:
        return Reading(
            self.tags,
            decoder_of(self.model_tokenizer, getattr(request, "skip_special_tokens", True)),
            self._tail,
            keep_lead=getattr(request, "continue_final_message", False),
        )


def _may_stop_early(request: Any) -> bool:
    """Whether vLLM may show less than the text of all tokens: where a stop string or a stop token ends it."""
    return bool(getattr(request, "stop", None) or getattr(request, "stop_token_ids", None))


def _to_message(reasoning: str, content: str) -> Any:
    sides = {"reasoning": reasoning, "content": content}
    fields = {side: text for side, text in sides.items() if text}
    return DeltaMessage(**fields) if fields else None
