"""`render_prompt`: what a template may say, and what becomes an error row instead.

Not covered: the chat template, which the engine applies.
"""

from typing import Any

import jinja2
import pytest

from pipeline.errors import SampleError
from pipeline.prompts import RenderedPrompt, column_names, render_prompt


@pytest.mark.parametrize(
    ("template", "columns", "text"),
    [
        ("Describe this image.", {}, "Describe this image."),
        ("{{ question }}", {"question": "How many?"}, "How many?"),
        ("{{ n + 1 }} of {{ meta.source }}", {"n": 1, "meta": {"source": "web"}}, "2 of web"),
        ("{% for word in words %}{{ word }};{% endfor %}", {"words": ["a", "b"]}, "a;b;"),
        ("Two lines\nand a last newline\n", {}, "Two lines\nand a last newline\n"),
        ("{{ html }}", {"html": '<b>&amp; "x"</b> {{ no_template }}'}, '<b>&amp; "x"</b> {{ no_template }}'),
        ("{{ label or 'nothing' }}", {"label": None}, "nothing"),
        ("{% if label is none %}unlabelled{% endif %}", {"label": None}, "unlabelled"),
        ("{{ emoji }}", {"emoji": "日本 😀"}, "日本 😀"),
    ],
)
def test_render_prompt_template_over_columns_gives_text(template: str, columns: dict[str, Any], text: str) -> None:
    assert render_prompt(template, None, "auto", columns) == RenderedPrompt(text, None, "auto")


@pytest.mark.parametrize(
    ("template", "columns", "says"),
    [
        ("{{ absent }}", {"present": 1}, "'absent' is undefined"),
        ("{{ meta.absent }}", {"meta": {"present": 1}}, "no attribute 'absent'"),
        ("{{ 1 / n }}", {"n": 0}, "division by zero"),
        ("{{ n + 'a' }}", {"n": 1}, "unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", {}, "unsafe"),
        ("{{ words.append(1) }}", {"words": ["a"]}, "unsafe"),
        ("{% include 'other' %}", {}, "loader"),
    ],
)
def test_render_prompt_that_fails_is_an_error_row_in_one_sentence(
    template: str, columns: dict[str, Any], says: str
) -> None:
    with pytest.raises(SampleError, match=says) as caught:
        render_prompt(template, None, "auto", columns)
    assert caught.value.error_type == "prompt_failed"
    assert len(caught.value.message.splitlines()) == 1
    assert caught.value.message.endswith(".")
    assert not caught.value.message.endswith("..")


@pytest.mark.parametrize("template", ["{{ question }}", "Q: {{ question }} A:", "{{ meta.question }}"])
def test_render_prompt_null_column_is_an_error_row_not_the_word_none(template: str) -> None:
    with pytest.raises(SampleError):
        render_prompt(template, None, "auto", {"question": None, "meta": {"question": None}})


def test_render_prompt_system_is_rendered_too() -> None:
    assert render_prompt("x", "You see {{ kind }}.", "auto", {"kind": "maps"}).system == "You see maps."
    with pytest.raises(SampleError, match="'absent' is undefined"):
        render_prompt("x", "{{ absent }}", "auto", {})


@pytest.mark.parametrize(
    ("thinking_mode", "columns", "mode"),
    [
        ("auto", {}, "auto"),
        ("long", {}, "long"),
        ("short", {}, "short"),
        ("{{ mode }}", {"mode": "long"}, "long"),
        ("{{ mode }}\n", {"mode": " short "}, "short"),
        ("{{ 'long' if hard else 'short' }}", {"hard": False}, "short"),
    ],
)
def test_render_prompt_thinking_mode_by_row(thinking_mode: str, columns: dict[str, Any], mode: str) -> None:
    assert render_prompt("x", None, thinking_mode, columns).thinking_mode == mode


@pytest.mark.parametrize("value", ["Long", "", "think", None, 1])
def test_render_prompt_invalid_thinking_mode_is_an_error_row_that_names_the_three(value: Any) -> None:
    with pytest.raises(SampleError) as caught:
        render_prompt("x", None, "{{ mode if mode is not none else 'None' }}", {"mode": value})
    assert caught.value.error_type == "thinking_mode_invalid"
    assert caught.value.message == f"thinking_mode is {str(value)!r}; it must be auto, long or short."


def test_render_prompt_error_pickles() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(SampleError("prompt_failed", "It does not render.")))
    assert (error.error_type, error.message, str(error)) == ("prompt_failed",) + ("It does not render.",) * 2


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("no columns", set()),
        ("{{ a }} {{ b.c }} {{ d['e'] }}", {"a", "b", "d"}),
        ("{% set x = a %}{{ x }}", {"a"}),
        ("{% for x in xs %}{{ x }}{{ loop.index }}{% endfor %}", {"xs"}),
        ("{% if a is defined %}{{ b }}{% endif %}", {"a", "b"}),
        ("{% for i in range(n) %}{{ i }}{% endfor %}", {"n"}),
        ("{# {{ a }} #}{% raw %}{{ b }}{% endraw %}", set()),
    ],
)
def test_column_names_are_the_columns_that_must_be_read(source: str, names: set[str]) -> None:
    assert column_names(source) == names


@pytest.mark.parametrize("source", ["{{ a", "{% if a %}", "{{ a | no_such_filter }}", "{% nope %}"])
def test_column_names_of_a_broken_template_raises(source: str) -> None:
    with pytest.raises(jinja2.TemplateSyntaxError):
        column_names(source)
