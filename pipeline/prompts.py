"""Prompts as Jinja2 templates over a sample's columns.

Templates are sandboxed and strict: a name that is no column is an error, found before the job starts where the
columns are known (`column_names`), and otherwise an error row.
Not covered: the model's own chat template, which the engine applies.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

import jinja2
import jinja2.meta
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
THINKING_MODES: tuple[str, ...] = get_args(ThinkingMode)


@dataclass(frozen=True)
class RenderedPrompt:
    """What one prompt asks of one sample."""

    text: str
    system: str | None
    thinking_mode: str


@lru_cache(maxsize=1024)
def parse_template(source: str) -> jinja2.Template:
    """Compile once per process; raises jinja2.TemplateSyntaxError."""
    return _environment.from_string(source)


def column_names(source: str) -> frozenset[str]:
    """The columns that a template names; raises jinja2.TemplateSyntaxError."""
    return frozenset(jinja2.meta.find_undeclared_variables(_environment.parse(source)))


def render_prompt(template: str, system: str | None, thinking_mode: str, columns: Mapping[str, Any]) -> RenderedPrompt:
    """Render a prompt over one sample's columns; raises SampleError."""
    try:
        mode = parse_template(thinking_mode).render(columns).strip()
        text = parse_template(template).render(columns)
        system_text = None if system is None else parse_template(system).render(columns)
    except Exception as error:  # a template is the user's program: any exception can come out of it
        message = " ".join(str(error).split())[:300].rstrip(".")
        raise SampleError("prompt_failed", f"The prompt does not render: {message or type(error).__name__}.") from error
    if mode not in THINKING_MODES:
        raise SampleError("thinking_mode_invalid", f"thinking_mode is {mode!r}; it must be auto, long or short.")
    return RenderedPrompt(text, system_text, mode)
