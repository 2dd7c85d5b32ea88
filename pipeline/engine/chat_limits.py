"""What a client may ask of `/v1/chat/completions`, checked on the request as vLLM has parsed it.

Fields of vLLM's that reach past one's own request (other people's cached images, the template, the scheduler) or that
cost without bound are refused by name; fields that neither OpenAI nor vLLM knows are ignored, as vLLM does.
Not covered: sizes and keys (the gate before the app), images (`pipeline.engine.media`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from pipeline.prompts import THINKING_MODES

EFFORT_TO_MODE = {
    "none": "short",
    "minimal": "short",
    "low": "auto",
    "medium": "auto",
    "high": "long",
    "xhigh": "long",
    "max": "long",
}
"""R-4B has three ways to think, no degrees: what lies between not at all and always is left to the model."""

TAKEN_FIELDS = frozenset(
    (
        *("messages", "model", "stream", "stream_options", "n", "seed", "user"),
        *("max_tokens", "max_completion_tokens", "min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output"),
        *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
        *("logit_bias", "logprobs", "top_logprobs", "ignore_eos", "skip_special_tokens", "return_token_ids"),
        *("spaces_between_special_tokens", "return_tokens_as_token_ids", "length_penalty"),
        *("response_format", "structured_outputs"),
        *("reasoning_effort", "include_reasoning", "thinking_token_budget", "chat_template_kwargs"),
        *("parallel_tool_calls", "service_tier"),  # the official client's, without effect here as at OpenAI
    )
)
PART_KEYS = {"text": {"type", "text"}, "image_url": {"type", "image_url"}, "refusal": {"type", "refusal"}}
"""Parts of a message. vLLM's `uuid` names an image in a cache that all clients share."""

MAX_STOPS, MAX_BIASED = 16, 300


@dataclass(frozen=True)
class ChatLimits:
    """Of one request; `max_tokens` is also what a request that names none may generate."""

    thinking_mode: str = "auto"
    max_tokens: int = 16_384
    max_choices: int = 8
    max_images: int = 5
    max_messages: int = 256
    max_schema_bytes: int = 65_536


def check_request(request: ChatCompletionRequest, limits: ChatLimits) -> None:
    """Raise VLLMValidationError (400) for what is not taken, and write the thinking mode into the template's values."""
    for name in sorted(request.model_fields_set - TAKEN_FIELDS, key=_last_if_implied):
        if name in ChatCompletionRequest.model_fields and not _is_unset(request, name):
            raise VLLMValidationError(f"{name} is not taken by this server.", parameter=name)
    _check_counts(request, limits)
    _check_messages(request, limits)
    _check_schema(request, limits)
    request.chat_template_kwargs = {"thinking_mode": _choose_mode(request, limits.thinking_mode)}
    request.reasoning_effort = None


def _last_if_implied(name: str) -> tuple[bool, str]:
    """vLLM sets tool_choice itself where there are tools."""
    return name == "tool_choice", name


def _is_unset(request: ChatCompletionRequest, name: str) -> bool:
    value = getattr(request, name)
    default = ChatCompletionRequest.model_fields[name].get_default(call_default_factory=True)
    return value is None or value == default or value in ("", [], {})


def _check_counts(request: ChatCompletionRequest, limits: ChatLimits) -> None:
    asked = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    for name, value, limit in (
        ("max_tokens", asked or 0, limits.max_tokens),
        ("min_tokens", request.min_tokens, limits.max_tokens),
        ("n", request.n or 1, limits.max_choices),
        ("stop", len(stops), MAX_STOPS),
        ("stop_token_ids", len(request.stop_token_ids or ()), MAX_BIASED),
        ("logit_bias", len(request.logit_bias or ()), MAX_BIASED),
    ):
        if value > limit:
            raise VLLMValidationError(f"{name}: {value} is more than this server allows, {limit}.", parameter=name)


def _check_messages(request: ChatCompletionRequest, limits: ChatLimits) -> None:
    if len(request.messages) > limits.max_messages:
        raise VLLMValidationError(
            f"messages: {len(request.messages)} are more than this server allows, {limits.max_messages}.",
            parameter="messages",
        )
    num_images = 0
    for part in _parts(request):
        kind = part.get("type")
        if kind not in PART_KEYS:
            raise VLLMValidationError(
                f"messages: a part of type {str(kind)[:40]!r} is not taken; text and image_url are.",
                parameter="messages",
            )
        if extra := sorted(key for key in part if key not in PART_KEYS[kind] and part[key] is not None):
            raise VLLMValidationError(
                f"messages: {extra[0][:40]!r} is not taken in a part of type {kind}.", parameter="messages"
            )
        num_images += kind == "image_url"
    if num_images > limits.max_images:
        raise VLLMValidationError(
            f"messages: {num_images} images are more than this server allows, {limits.max_images}.",
            parameter="messages",
        )


def _parts(request: ChatCompletionRequest) -> Iterator[dict[str, Any]]:
    for message in request.messages:
        content = message.get("content") if isinstance(message, dict) else getattr(message, "content", None)
        if isinstance(content, str) or content is None:
            continue
        for part in content:
            if isinstance(part, dict):
                yield part


def _check_schema(request: ChatCompletionRequest, limits: ChatLimits) -> None:
    for name in ("response_format", "structured_outputs"):
        value = getattr(request, name)
        if value is None:
            continue
        plain = value.model_dump() if hasattr(value, "model_dump") else vars(value)
        try:
            size = len(json.dumps(plain, default=str))
        except (RecursionError, ValueError) as error:
            raise VLLMValidationError(f"{name} is nested too deeply.", parameter=name) from error
        if size > limits.max_schema_bytes:
            raise VLLMValidationError(
                f"{name}: {size} bytes are more than this server allows, {limits.max_schema_bytes}.", parameter=name
            )


def _choose_mode(request: ChatCompletionRequest, default: str) -> str:
    """`thinking_mode` as the model's README has it comes before `reasoning_effort`, and that before the server's."""
    given = request.chat_template_kwargs or {}
    if unknown := sorted(set(given) - {"thinking_mode"}):
        raise VLLMValidationError(
            f"chat_template_kwargs: {unknown[0][:40]!r} is not taken; thinking_mode is.",
            parameter="chat_template_kwargs",
        )
    mode = given.get("thinking_mode")
    if mode is None:
        return EFFORT_TO_MODE.get(request.reasoning_effort or "", default)
    if mode not in THINKING_MODES:
        raise VLLMValidationError(
            "chat_template_kwargs.thinking_mode must be auto, long or short.", parameter="chat_template_kwargs"
        )
    return str(mode)
