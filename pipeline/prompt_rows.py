"""One row of a prompt shard as a prompt: a text or messages, a thinking mode, overrides of the job's sampling.

Whatever a row holds, it gives one `PromptRow`; what is wrong with it becomes its error, under an id that no other row
of the sample has. Columns that no prompt has are passed over.
Not covered: reading the shard, finding a sample's rows, and rows that belong to no sample (`pipeline.prompt_shards`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import SampleError
from pipeline.formats.jsonlines import parse_json
from pipeline.prompts import THINKING_MODES
from pipeline.spec import SamplingSpec, check_sampling

PROMPT_ID = re.compile(r"[A-Za-z0-9_.-]{1,100}")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class PromptRow:
    """One thing to ask of one sample."""

    prompt_id: str
    """With `error`, it may be made up: what could be kept of the shard's, `#`, and the row's number."""
    messages: tuple[Mapping[str, Any], ...]
    """As OpenAI writes them; content is a text, or a list of text parts and of places for images."""
    thinking_mode: str | None
    """None: the job's own."""
    sampling: Mapping[str, Any]
    """Overrides of the job's sampling, checked."""
    error: SampleError | None = None


def to_prompt(row: Mapping[str, Any], sample_id: str, keys: set[str], number: int, shard_name: str) -> PromptRow:
    """The row as a prompt, never raising; `keys` holds those of the shard's rows before it, and takes its own."""
    given_id = row.get("prompt_id")
    # `#` is in no valid id: an id that is made up never takes the place of a later row's own.
    prompt_id = f"{re.sub('[^A-Za-z0-9_.-]', '_', given_id[:80]) if isinstance(given_id, str) else ''}#{number}"
    try:
        if not (isinstance(given_id, str) and PROMPT_ID.fullmatch(given_id)):
            raise ValueError(
                f"prompt_id is {show_value(given_id)}; it must be 1 to 100 letters, digits, '_', '.' or '-'"
            )
        if (key := f"{sample_id}\0{given_id}") in keys:
            raise ValueError(f"sample {show_value(sample_id)} has a prompt {given_id!r} already")
        keys.add(key)
        prompt_id = given_id
        thinking_mode = row.get("thinking_mode")
        if thinking_mode is not None and thinking_mode not in THINKING_MODES:
            raise ValueError(f"thinking_mode is {show_value(thinking_mode)}; it must be auto, long or short")
        return PromptRow(prompt_id, _to_messages(row), thinking_mode, _to_sampling(row.get("sampling")))
    except ValueError as error:
        message = f"Row #{number} of {shard_name}: {error}."
        return PromptRow(prompt_id, (), None, {}, SampleError("prompt_invalid", message))


def _to_messages(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    text, messages = row.get("text"), row.get("messages")
    if text is None and messages is None:
        raise ValueError("it has neither text nor messages")
    if text is not None and messages is not None:
        raise ValueError("it has both text and messages")
    if text == "":
        raise ValueError("text is empty")
    if text is not None:
        return ({"role": "user", "content": _to_text(text, "text")},)
    messages = _from_json(messages, "messages")
    if messages == []:
        raise ValueError("messages is an empty list")
    if not isinstance(messages, list):
        raise ValueError(f"messages is {show_value(messages)}; it must be a list of {{role, content}}")
    checked = tuple(_to_message(message, f"messages[{index}]") for index, message in enumerate(messages))
    if checked[-1]["role"] != "user":
        raise ValueError("the last of messages must be the user's")
    return checked


def _to_message(message: Any, place: str) -> Mapping[str, Any]:
    given = _without_nulls(message, place)
    if unknown := sorted(set(given) - {"role", "content"}):
        raise ValueError(f"{place} has the key {show_value(unknown[0])}; it may have role and content")
    if given.get("role") not in ROLES:
        raise ValueError(f"{place}.role is {show_value(given.get('role'))}; it must be {', '.join(ROLES)}")
    content = given.get("content")
    if not isinstance(content, list):
        return {"role": given["role"], "content": _to_text(content, f"{place}.content")}
    if not content:
        raise ValueError(f"{place}.content is an empty list")
    parts = [_to_part(part, f"{place}.content[{index}]") for index, part in enumerate(content)]
    return {"role": given["role"], "content": parts}


def _to_part(part: Any, place: str) -> Mapping[str, Any]:
    given = _without_nulls(part, place)
    if given == {"type": "image"}:
        return given
    if set(given) != {"type", "text"} or given["type"] != "text":
        raise ValueError(f'{place} must be {{"type": "text", "text": ...}} or {{"type": "image"}}')
    return {"type": "text", "text": _to_text(given["text"], f"{place}.text")}


def _to_sampling(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    sampling = _from_json(value, "sampling")
    if not isinstance(sampling, dict):
        raise ValueError(f"sampling is {show_value(sampling)}; it must be an object")
    if unknown := sorted(set(sampling) - set(SamplingSpec.model_fields)):
        raise ValueError(
            f"sampling has the key {show_value(unknown[0])}; it may have {', '.join(SamplingSpec.model_fields)}"
        )
    check_sampling(sampling)
    return sampling


def _from_json(value: Any, name: str) -> Any:
    try:
        return parse_json(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{name} is a string that is not valid JSON: {error}") from error


def _without_nulls(value: Any, place: str) -> dict[str, Any]:
    """A struct of Parquet has every key in every row."""
    if not isinstance(value, dict):
        raise ValueError(f"{place} is {show_value(value)}; it must be an object")
    return {name: one for name, one in value.items() if one is not None}


def _to_text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place} is {show_value(value)}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds a lone surrogate, which is no character") from error
    return value


def show_value(value: Any) -> str:
    """A value in a message: scalars as they are, if they are short."""
    kinds = {list: "a list", dict: "an object", type(None): "null", UnicodeDecodeError: "not valid UTF-8"}
    shown = kinds.get(type(value)) or repr(value)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."
