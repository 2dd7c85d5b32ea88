"""`render_prompt`: what a template may say, and what becomes an error row instead.

Not covered: the chat template, which the engine applies.
"""

from typing import Any

import jinja2
import pytest

from pipeline.errors import SampleError
from pipeline.prompts import RenderedPrompt, column_names, render_prompt


def render(template: str, columns: dict[str, Any]) -> RenderedPrompt:
    """One message of the user's."""
    return render_prompt([{"role": "user", "content": template}], "auto", {}, columns)


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
    assert render(template, columns) == RenderedPrompt(({"role": "user", "content": text},), "auto", {})


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
        render(template, columns)
    assert caught.value.error_type == "prompt_failed"
    assert len(caught.value.message.splitlines()) == 1
    assert caught.value.message.endswith(".")
    assert not caught.value.message.endswith("..")


@pytest.mark.parametrize("template", ["{{ question }}", "Q: {{ question }} A:", "{{ meta.question }}"])
def test_render_prompt_null_column_is_an_error_row_not_the_word_none(template: str) -> None:
    with pytest.raises(SampleError):
        render(template, {"question": None, "meta": {"question": None}})


def test_render_prompt_every_message_and_part_is_rendered_and_keeps_its_place() -> None:
    parts: list[Any] = [{"type": "text", "text": "{{ a }}"}, {"type": "image"}, {"type": "text", "text": "{{ b }}"}]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You see {{ a }}."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "{{ b }}!"},
        {"role": "user", "content": "And now?"},
    ]
    rendered = render_prompt(messages, "auto", {}, {"a": "maps", "b": "seas"}).messages
    assert [message["role"] for message in rendered] == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in rendered] == [
        "You see maps.",
        [{"type": "text", "text": "maps"}, {"type": "image"}, {"type": "text", "text": "seas"}],
        "seas!",
        "And now?",
    ]
    with pytest.raises(SampleError, match="'absent' is undefined"):
        render_prompt([{"role": "system", "content": "{{ absent }}"}, *messages], "auto", {}, {"a": "", "b": ""})


@pytest.mark.parametrize(
    ("value", "columns", "rendered"),
    [
        (5, {}, 5),
        ("{{ n }}", {"n": 5}, 5),
        ("{{ n * 2 }}", {"n": 0.25}, 0.5),
        ("{{ words }}", {"words": ["a", "b"]}, ["a", "b"]),
        (["#"], {}, ["#"]),
    ],
)
def test_render_prompt_sampling_keeps_the_columns_values(value: Any, columns: dict[str, Any], rendered: Any) -> None:
    assert render_prompt([], "auto", {"x": value}, columns).sampling == {"x": rendered}


def test_render_prompt_null_sampling_is_the_jobs() -> None:
    assert render_prompt([], "auto", {"max_tokens": "{{ n }}", "top_k": 3}, {"n": None}).sampling == {"top_k": 3}


@pytest.mark.parametrize("value", ["{{ absent }}", "{{ n.__class__ }}"])
def test_render_prompt_sampling_is_strict_and_sandboxed_too(value: str) -> None:
    with pytest.raises(SampleError):
        render_prompt([], "auto", {"max_tokens": value}, {"n": 1})


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
    assert render_prompt([], thinking_mode, {}, columns).thinking_mode == mode


@pytest.mark.parametrize("value", ["Long", "", "think", None, 1])
def test_render_prompt_invalid_thinking_mode_is_an_error_row_that_names_the_three(value: Any) -> None:
    with pytest.raises(SampleError) as caught:
        render_prompt([], "{{ mode if mode is not none else 'None' }}", {}, {"mode": value})
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
