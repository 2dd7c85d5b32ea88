"""What a client may ask of `/v1/chat/completions`, checked on the request as vLLM has parsed it.

Fields of vLLM's that reach past one's own request (other people's cached images, the template, the scheduler) or that
cost without bound are refused by name; fields that neither OpenAI nor vLLM knows are ignored, as vLLM does. What vLLM
cannot read in bounded time is refused before it tries (`check_json`).
Not covered: sizes and keys (the gate before the app), images (`pipeline.engine.media`), and whether any answer keeps to
a constraint.
"""

import json
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pydantic
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

ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))

MAX_STOPS, MAX_BIASED = 16, 300
MAX_LOGPROBS = 100_000
"""In one response: vLLM makes it in one piece, of 15 microseconds for each, and nobody else is answered meanwhile."""
MAX_VALUES = 20_000
"""JSON values in a body. pydantic finds eight errors in each message that is none: 2 MB of them held a replica up for
minutes, until Serve killed it."""
MAX_INTEGER = 2**63 - 1
"""vLLM's engine is sent no larger ones; it answers 500."""
CONSTRAINTS = ("json", "json_object", "choice", "regex")
"""Of structured outputs. A grammar or structural tag can be of any cost, and none of it shows from outside."""
MAX_PROPERTIES, MAX_COUNTED_PROPERTIES = 200, 32
"""Of one object, without and with min- or maxProperties: 0.4 s each to compile, growing with the square or faster."""
MAX_REPEATS = 16
"""In one regex. Each multiplies the ways to read an answer: with R-4B's vocabulary 100 times `(.*)`, or one repeat
inside another such as `(([a-z]*)*)*`, took over 20 s for one step of the engine, for everybody."""
MAX_WORD = 4096
"""Characters of a regex, a choice or a constant: 60,000 take 4 s."""


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
    _check_constraint(request, limits)
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
    old_name = vars(request)["max_tokens"]  # as an attribute it warns that it is old, at each request
    asked = request.max_completion_tokens if request.max_completion_tokens is not None else old_name
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
    num_rivals = request.top_logprobs or 0
    if num_rivals < 0:
        raise VLLMValidationError("top_logprobs: the whole vocabulary is not given.", parameter="top_logprobs")
    if request.logprobs and not request.stream:
        num_tokens = (request.n or 1) * (limits.max_tokens if asked is None else asked)
        if num_tokens * (1 + num_rivals) > MAX_LOGPROBS:
            raise VLLMValidationError(
                f"logprobs: n * max_tokens * (1 + top_logprobs) is above {MAX_LOGPROBS}, the most in one answer; "
                "ask for fewer, or stream.",
                parameter="logprobs",
            )


def _check_messages(request: ChatCompletionRequest, limits: ChatLimits) -> None:
    if len(request.messages) > limits.max_messages:
        raise VLLMValidationError(
            f"messages: {len(request.messages)} are more than this server allows, {limits.max_messages}.",
            parameter="messages",
        )
    if unknown := [role for role in map(_role_of, request.messages) if role not in ROLES]:
        raise VLLMValidationError(f"messages: {ascii(unknown[0])[:40]} is not a known role.", parameter="messages")
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


def _role_of(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else getattr(message, "role", None)


def _parts(request: ChatCompletionRequest) -> Iterator[dict[str, Any]]:
    for message in request.messages:
        content = message.get("content") if isinstance(message, dict) else getattr(message, "content", None)
        if isinstance(content, str) or content is None:
            continue
        try:
            yield from (part for part in content if isinstance(part, dict))
        except pydantic.ValidationError:  # vLLM checks them as they are taken, and its message quotes them
            raise VLLMValidationError(
                "messages: a part of a message is not one of text or image_url as OpenAI writes them.",
                parameter="messages",
            ) from None


def check_json(body: Any) -> None:
    """Raise VLLMValidationError for a parsed body that vLLM should not be given; the first thing that is done to it."""
    num_values, waiting = 0, [body]
    while waiting:
        value = waiting.pop()
        num_values += 1
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif problem := _problem_of(value):
            raise VLLMValidationError(f"The body holds {problem}.")
        if num_values + len(waiting) > MAX_VALUES:
            raise VLLMValidationError(f"The body holds more than {MAX_VALUES} values, the limit.")


def _problem_of(value: Any) -> str | None:
    """What is wrong with a plain JSON value."""
    if isinstance(value, str) and not value.isascii() and re.search("[\ud800-\udfff]", value):
        return "half a surrogate pair, which is no character"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return "an integer of more than 64 bits"
    return None


def _check_constraint(request: ChatCompletionRequest, limits: ChatLimits) -> None:
    for name in ("response_format", "structured_outputs"):
        value = getattr(request, name)
        if value is None:
            continue
        plain = value.model_dump(by_alias=True) if hasattr(value, "model_dump") else vars(value)
        try:
            size = len(json.dumps(plain, default=str))
            if size > limits.max_schema_bytes:
                raise ConstraintError(f"{size} bytes are more than this server allows, {limits.max_schema_bytes}")
            check_structured(plain) if name == "structured_outputs" else check_response_format(plain)
        except RecursionError as error:
            raise VLLMValidationError(f"{name} is nested too deeply.", parameter=name) from error
        except ConstraintError as error:
            raise VLLMValidationError(f"{name}: {error}.", parameter=name) from None


class ConstraintError(ValueError):
    """A constraint that is not taken; the message is the end of a sentence."""


def check_response_format(plain: dict[str, Any]) -> None:
    """Raise ConstraintError for one of unknown or unbounded cost."""
    if plain.get("type") not in ("text", "json_object", "json_schema"):
        raise ConstraintError("only text, json_object and json_schema are taken")
    check_schema((plain.get("json_schema") or {}).get("schema"))


def check_structured(plain: dict[str, Any]) -> None:
    """Raise ConstraintError for one of unknown or unbounded cost."""
    given = [name for name, value in plain.items() if not name.startswith("_") and value not in (None, False)]
    if unknown := sorted(set(given) - set(CONSTRAINTS)):
        raise ConstraintError(f"{unknown[0]} is not taken; {', '.join(CONSTRAINTS)} are")
    schema = plain.get("json")
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError:
            raise ConstraintError("json does not hold JSON") from None
    check_schema(schema)
    check_regex(plain.get("regex") or "")
    if any(len(choice) > MAX_WORD for choice in plain.get("choice") or ()):
        raise ConstraintError(f"a choice has more than {MAX_WORD} characters")


def check_schema(schema: Any) -> None:
    """Raise ConstraintError where a JSON schema would cost too much; it is looked through wherever its parts stand."""
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            waiting += node.values()
            _check_node(node)


def _check_node(node: dict[str, Any]) -> None:
    num_properties = max((len(node[key]) for key in node if isinstance(node[key], dict)), default=0)
    most = MAX_COUNTED_PROPERTIES if {"minProperties", "maxProperties"} & set(node) else MAX_PROPERTIES
    if num_properties > most:
        raise ConstraintError(f"an object of {num_properties} properties is more than this server allows, {most}")
    patterns = node.get("patternProperties")
    for pattern in (node.get("pattern"), *(patterns if isinstance(patterns, dict) else ())):
        check_regex(pattern if isinstance(pattern, str) else "")
    choices = node.get("enum")
    for constant in (node.get("const"), *(choices if isinstance(choices, list) else ())):
        if isinstance(constant, str) and len(constant) > MAX_WORD:
            raise ConstraintError(f"a constant has more than {MAX_WORD} characters")


def check_regex(pattern: str) -> None:
    """Raise ConstraintError for one that cannot be read, or whose repeats stand inside one another or are too many."""
    if len(pattern) > MAX_WORD:
        raise ConstraintError(f"a regex has more than {MAX_WORD} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parsed = re._parser.parse(pattern)  # there is no other access to it
        num_repeats = _count_repeats(parsed)
    except (re.error, RecursionError, OverflowError):
        raise ConstraintError("a regex cannot be read") from None
    if num_repeats > MAX_REPEATS:
        raise ConstraintError(f"a regex repeats more often than this server allows, {MAX_REPEATS} times")


def _count_repeats(node: Any) -> int:
    """Repeats of no fixed number; those inside a fixed number count as often as that says."""
    if isinstance(node, tuple) and len(node) == 2 and str(node[0]).endswith("_REPEAT"):
        least, most, body = node[1]
        inside = _count_repeats(body)
        if least == most:
            return inside * int(most)
        if inside and int(most) > 1:
            raise ConstraintError("a regex repeats what repeats already")
        return inside + 1
    children = node if isinstance(node, (list, tuple, re._parser.SubPattern)) else ()
    return sum(_count_repeats(child) for child in children)


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
