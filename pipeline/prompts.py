"""Prompts as Jinja2 templates over a sample's columns.

Templates are sandboxed and strict: a name that is no column is an error, found before the job starts where the
columns are known (`column_names`), and otherwise an error row.
Not covered: the model's own chat template, which the engine applies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

import jinja2
import jinja2.meta
import jinja2.nativetypes
import jinja2.sandbox

from pipeline.errors import SampleError
from pipeline.records import ThinkingMode


def _refuse_null(value: Any) -> Any:
    if value is None:
        raise ValueError("a column that it prints is null")
    return value


# A template may test for null; printing it would ask the model about "None".
_environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_refuse_null
)


class _SandboxedNative(jinja2.sandbox.ImmutableSandboxedEnvironment, jinja2.nativetypes.NativeEnvironment):
    """Templates that give values, not texts: `{{ column }}` is the column's own number or list."""


_value_environment = _SandboxedNative(undefined=jinja2.StrictUndefined)
THINKING_MODES: tuple[str, ...] = get_args(ThinkingMode)


@dataclass(frozen=True)
class RenderedPrompt:
    """What one prompt asks of one sample; `messages` as OpenAI writes them."""

    messages: tuple[Mapping[str, Any], ...]
    thinking_mode: str
    sampling: Mapping[str, Any]


def is_template(source: str) -> bool:
    """Whether Jinja2 would change anything in this text."""
    return "{{" in source or "{%" in source or "{#" in source


@lru_cache(maxsize=1024)
def parse_template(source: str) -> jinja2.Template:
    """Compile once per process; raises jinja2.TemplateSyntaxError."""
    return _environment.from_string(source)


def column_names(source: str) -> frozenset[str]:
    """The columns that a template names; raises jinja2.TemplateSyntaxError."""
    return frozenset(jinja2.meta.find_undeclared_variables(_environment.parse(source)))


def render_prompt(
    messages: Sequence[Mapping[str, Any]], thinking_mode: str, sampling: Mapping[str, Any], columns: Mapping[str, Any]
) -> RenderedPrompt:
    """Render a prompt's messages, mode and sampling over one sample's columns; raises SampleError."""
    try:
        mode = parse_template(thinking_mode).render(columns).strip()
        rendered = tuple({**message, "content": _render_content(message["content"], columns)} for message in messages)
        rendered_values = {name: _render_value(value, columns) for name, value in sampling.items()}
    except Exception as error:  # a template is the user's program: any exception can come out of it
        message = " ".join(str(error).split())[:300].rstrip(".")
        raise SampleError("prompt_failed", f"The prompt does not render: {message or type(error).__name__}.") from error
    if mode not in THINKING_MODES:
        raise SampleError("thinking_mode_invalid", f"thinking_mode is {mode!r}; it must be auto, long or short.")
    given = {name: value for name, value in rendered_values.items() if value is not None}  # null: as the job has it
    return RenderedPrompt(rendered, mode, given)


def _render_content(content: Any, columns: Mapping[str, Any]) -> Any:
    if isinstance(content, str):
        return parse_template(content).render(columns)
    return [
        {**part, "text": parse_template(part["text"]).render(columns)} if part["type"] == "text" else part
        for part in content
    ]


def _render_value(value: Any, columns: Mapping[str, Any]) -> Any:
    """A template gives the column's own value where it is nothing but a column: numbers stay numbers."""
    if not (isinstance(value, str) and is_template(value)):
        return value
    rendered: Any = _value_environment.from_string(value).render(columns)
    if isinstance(rendered, jinja2.Undefined):
        str(rendered)  # raises, and says what is undefined
    return rendered
