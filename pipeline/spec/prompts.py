"""`prompts` and `sampling`: what is asked, and how it is answered."""

from typing import Annotated, Any, Literal

import jinja2
import pydantic
from pydantic import Field, StringConstraints

from pipeline.prompts import THINKING_MODES, column_names, is_template
from pipeline.spec.base import NonEmpty, Section


class MessageSpec(Section):
    """One message of a prompt. `content` is a template, or a list of text parts and of places for images."""

    role: Literal["system", "user", "assistant"]
    content: NonEmpty | Annotated[list[dict[str, str]], Field(min_length=1)]

    @pydantic.field_validator("content")
    @classmethod
    def _must_be_parts(cls, content: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part == {"type": "image"}:
                continue
            if set(part) != {"type", "text"} or part["type"] != "text":
                raise ValueError('each part must be {type: text, text: "..."} or {type: image}')
            _parse(part["text"])
        return content

    @property
    def templates(self) -> list[str]:
        if isinstance(self.content, str):
            return [self.content]
        return [part["text"] for part in self.content if part["type"] == "text"]


class PromptSpec(Section):
    """One thing to ask of every sample; its texts, `thinking_mode` and `sampling` are Jinja2 over its columns."""

    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,100}$")] = "prompt"
    template: NonEmpty | None = None
    system: str | None = None
    messages: Annotated[list[MessageSpec], Field(min_length=1)] | None = None
    thinking_mode: NonEmpty = "auto"
    sampling: dict[str, Any] = {}

    @pydantic.field_validator("template", "system")
    @classmethod
    def _must_parse(cls, source: str | None) -> str | None:
        _parse(source or "")
        return source

    @pydantic.field_validator("thinking_mode")
    @classmethod
    def _must_be_mode_or_template(cls, source: str) -> str:
        if not is_template(source) and source not in THINKING_MODES:
            raise ValueError('must be auto, long, short or a template such as "{{ mode }}"')
        _parse(source)
        return source

    @pydantic.field_validator("sampling")
    @classmethod
    def _must_be_sampling(cls, sampling: dict[str, Any]) -> dict[str, Any]:
        for name, value in sampling.items():
            if name not in SamplingSpec.model_fields:
                raise ValueError(f"{name!r} is no sampling parameter; allowed: {', '.join(SamplingSpec.model_fields)}")
            if isinstance(value, str) and is_template(value):
                _parse(value)
            else:
                check_sampling({name: value})
        return sampling

    @pydantic.model_validator(mode="after")
    def _one_text(self) -> "PromptSpec":
        if (self.template is None) == (self.messages is None):
            raise ValueError("needs a template, or messages, and not both")
        if self.messages is not None:
            if self.system is not None:
                raise ValueError("system stands beside a template; among messages write one with role: system")
            if self.messages[-1].role != "user":
                raise ValueError("the last of messages must be the user's")
        return self

    @property
    def templates(self) -> list[str]:
        """All Jinja2 sources of this prompt."""
        texts = [text for message in self.messages or [] for text in message.templates]
        dynamic = [value for value in self.sampling.values() if isinstance(value, str)]
        return [text for text in (self.template, self.system, self.thinking_mode, *texts, *dynamic) if text is not None]

    @property
    def all_messages(self) -> list[dict[str, Any]]:
        """The prompt as messages, before rendering."""
        if self.messages is not None:
            return [message.model_dump() for message in self.messages]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.template}]

    @property
    def columns(self) -> frozenset[str]:
        return frozenset().union(*(_parse(source) for source in self.templates))


def _parse(source: str) -> frozenset[str]:
    try:
        return column_names(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"is not a valid Jinja2 template: {error.message} (line {error.lineno})") from error


class PromptShardsSpec(Section):
    """Prompts kept beside the images: rows of `sample_id`, `prompt_id`, `text` or `messages`, in JSONL or Parquet."""

    url: NonEmpty
    shape: Literal["aligned", "table"] | None = None
    thinking_mode: Literal["auto", "long", "short"] = "auto"
    unmatched: Literal["report", "error"] = "report"


class SamplingSpec(Section):
    """Sampling parameters, named and meant as in vLLM."""

    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    max_tokens: Annotated[int, Field(ge=1)] = 1024
    seed: int | None = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    stop: list[NonEmpty] = []


def check_sampling(overrides: Any) -> None:
    """Raise ValueError unless these are sampling parameters with values that they may have."""
    try:
        SamplingSpec.model_validate(overrides)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = ".".join(map(str, problem["loc"]))
        raise ValueError(f"sampling.{name}: {problem['msg'][:1].lower() + problem['msg'][1:]}") from error
