"""One row of a prompt shard is a prompt of its sample, or an error row of it that says why.

All rows go through `read_prompt_table`, most of them in both formats, for a table must give back what was made.
Not covered: rows that belong to no sample, and what is wrong with a whole shard (`test_prompt_shards`).
"""

from pathlib import Path
from typing import Any

import pytest

from pipeline.prompt_rows import PromptRow
from tests.prompt_files import PARTS, Row, message_of, messages_row, prompt, read_rows, user

# name, row, messages, thinking_mode, sampling
GOOD: list[tuple[str, Row, list[Any], str | None, dict[str, Any]]] = [
    ("text", prompt(text="Describe it."), [user("Describe it.")], None, {}),
    ("text beside null messages", prompt(text="x", messages=None), [user("x")], None, {}),
    ("Unicode, quotes, newlines", prompt(text='日本 🙂 "é"\n\u2028\0\\'), [user('日本 🙂 "é"\n\u2028\0\\')], None, {}),
    ("nulls", prompt(text="x", thinking_mode=None, sampling=None), [user("x")], None, {}),
    ("auto", prompt(text="x", thinking_mode="auto"), [user("x")], "auto", {}),
    ("long", prompt(text="x", thinking_mode="long"), [user("x")], "long", {}),
    ("short", prompt(text="x", thinking_mode="short"), [user("x")], "short", {}),
    ("no sampling", prompt(text="x", sampling={}), [user("x")], None, {}),
    (
        "sampling",
        prompt(text="x", sampling={"max_tokens": 9, "temperature": 1, "stop": ["é"], "seed": None}),
        [user("x")],
        None,
        {"max_tokens": 9, "temperature": 1, "stop": ["é"], "seed": None},
    ),
    ("sampling as a string", prompt(text="x", sampling='{"top_k": 5}'), [user("x")], None, {"top_k": 5}),
    ("one message", messages_row([user("x")]), [user("x")], None, {}),
    ("messages as a string", messages_row('[{"role": "user", "content": "é"}]'), [user("é")], None, {}),
    (
        "several turns",
        messages_row([{"role": "system", "content": ""}, user("x"), {"role": "assistant", "content": "y"}, user("z")]),
        [{"role": "system", "content": ""}, user("x"), {"role": "assistant", "content": "y"}, user("z")],
        None,
        {},
    ),
    (
        "parts",
        messages_row([user([{"type": "image"}, {"type": "text", "text": "é?"}, {"type": "image"}])]),
        [user([{"type": "image"}, {"type": "text", "text": "é?"}, {"type": "image"}])],
        None,
        {},
    ),
    (
        "nulls inside messages",
        messages_row([{**user([{"type": "image", "text": None}]), "name": None}]),
        [user([{"type": "image"}])],
        None,
        {},
    ),
    ("columns of others", prompt(text="x", source="a book", n=[1, {}]), [user("x")], None, {}),
]


@pytest.mark.parametrize("file_name", ["p.jsonl", "p.parquet"])
@pytest.mark.parametrize(("name", "row", "messages", "mode", "sampling"), GOOD, ids=[case[0] for case in GOOD])
def test_read_prompt_table_good_row_is_a_prompt(
    tmp_path: Path,
    name: str,
    row: Row,
    messages: list[Any],
    mode: str | None,
    sampling: dict[str, Any],
    file_name: str,
) -> None:
    table = read_rows(tmp_path, [prompt("before"), row, prompt("after")], file_name)
    assert table.of("s") == (PromptRow("p", tuple(messages), mode, sampling),)
    assert (table.num_rows, table.num_unreadable) == (3, 0)


# name, row, what its message says after the row's number and the shard's name
BAD: list[tuple[str, Row, str]] = [
    ("text null", prompt(text=None), "it has neither text nor messages"),
    ("text and messages", prompt(messages=[user("x")]), "it has both text and messages"),
    ("text empty", prompt(text=""), "text is empty"),
    ("bad mode", prompt(thinking_mode="maybe"), "thinking_mode is 'maybe'; it must be auto, long or short"),
    ("empty mode", prompt(thinking_mode=""), "thinking_mode is ''; it must be auto, long or short"),
    ("sampling key", prompt(sampling={"top_kk": 1}), "sampling has the key 'top_kk'; it may have temperature, "),
    ("sampling value", prompt(sampling={"max_tokens": 0}), "sampling.max_tokens: "),
    ("sampling type", prompt(sampling={"temperature": "hot"}), "sampling.temperature: "),
    ("sampling null", prompt(sampling={"top_p": None}), "sampling.top_p: "),
    ("sampling of one thing too many", prompt(sampling={"top_k": 1, "stop": ["x", 3]}), "sampling.stop.1: "),
    ("surrogate in stop", prompt(sampling={"stop": ["\ud800"]}), "sampling.stop.0: "),
    ("sampling a list", prompt(sampling=[1]), "sampling is a list; it must be an object"),
    ("sampling a bad string", prompt(sampling="{a"), "sampling is a string that is not valid JSON: "),
    ("sampling with NaN", prompt(sampling='{"temperature": NaN}'), "sampling is a string that is not valid JSON: NaN"),
    ("messages empty", messages_row([]), "messages is an empty list"),
    ("messages an object", messages_row(user("x")), "messages is an object; it must be a list of {role, content}"),
    ("messages a bad string", messages_row("hello"), "messages is a string that is not valid JSON: "),
    ("messages of strings", messages_row(["x"]), "messages[0] is 'x'; it must be an object"),
    ("bad role", messages_row([user("x"), {"role": "bot", "content": "x"}]), "messages[1].role is 'bot'; it must be "),
    ("no role", messages_row([{"content": "x"}]), "messages[0].role is null; it must be system, user, assistant"),
    ("a list as role", messages_row([{"role": ["user"], "content": "x"}]), "messages[0].role is a list; it must be "),
    ("no content", messages_row([{"role": "user"}]), "messages[0].content is null; it must be a string"),
    ("content a number", messages_row([user(5)]), "messages[0].content is 5; it must be a string"),
    ("content empty", messages_row([user([])]), "messages[0].content is an empty list"),
    ("a key too many", messages_row([{**user("x"), "name": "y"}]), "messages[0] has the key 'name'; it may have role"),
    ("part a string", messages_row([user(["x"])]), "messages[0].content[0] is 'x'; it must be an object"),
    ("part without text", messages_row([user([{"type": "text"}])]), f"messages[0].content[0] {PARTS}"),
    ("an image with text", messages_row([user([{"type": "image", "text": "x"}])]), f"messages[0].content[0] {PARTS}"),
    ("part of no type", messages_row([user([{"text": "x"}])]), f"messages[0].content[0] {PARTS}"),
    (
        "an image by URL",
        messages_row([user([{"type": "image"}, {"type": "image_url", "image_url": {"url": "http://h/?key=SECRET"}}])]),
        f"messages[0].content[1] {PARTS}",
    ),
    ("text of a part", messages_row([user([{"type": "text", "text": [1]}])]), "messages[0].content[0].text is a list"),
    ("surrogate", messages_row([user("\ud800")]), "messages[0].content holds a lone surrogate"),
    (
        "assistant last",
        messages_row([user("x"), {"role": "assistant", "content": "y"}]),
        "the last of messages must be the user's",
    ),
]

# rows that a Parquet file cannot hold beside good ones
BAD_IN_JSON: list[tuple[str, Row, str]] = [
    ("text a number", prompt(text=5), "text is 5; it must be a string"),
    ("text false", prompt(text=False), "text is False; it must be a string"),
    ("surrogate in text", prompt(text="a\ud800"), "text holds a lone surrogate, which is no character"),
    ("mode a list", prompt(thinking_mode=["auto"]), "thinking_mode is a list; it must be auto, long or short"),
    ("messages a number", messages_row(7), "messages is 7; it must be a list of {role, content}"),
    ("sampling a number", prompt(sampling=0), "sampling is 0; it must be an object"),
]


@pytest.mark.parametrize("file_name", ["p.jsonl", "p.parquet"])
@pytest.mark.parametrize(("name", "row", "says"), BAD, ids=[case[0] for case in BAD])
def test_read_prompt_table_bad_row_is_an_error_row_of_its_sample(
    tmp_path: Path, name: str, row: Row, says: str, file_name: str
) -> None:
    check_bad_row(tmp_path, row, says, file_name)


@pytest.mark.parametrize(("name", "row", "says"), BAD_IN_JSON, ids=[case[0] for case in BAD_IN_JSON])
def test_read_prompt_table_bad_json_row_is_an_error_row_of_its_sample(
    tmp_path: Path, name: str, row: Row, says: str
) -> None:
    check_bad_row(tmp_path, row, says, "p.jsonl")


def check_bad_row(folder: Path, row: Row, says: str, file_name: str) -> None:
    table = read_rows(folder, [prompt("before"), row, prompt("after")], file_name)
    (bad,) = table.of("s")
    assert bad.prompt_id == "p"
    assert message_of(bad).startswith(f"Row #1 of {file_name}: {says}")
    assert message_of(bad).endswith(".")
    assert "SECRET" not in message_of(bad)
    assert [one.error for name in ("before", "after") for one in table.of(name)] == [None, None]
    assert (table.num_rows, table.num_unreadable) == (3, 0)


@pytest.mark.parametrize(
    ("prompt_id", "made_up", "shown"),
    [
        (None, "#1", "null"),
        ("", "#1", "''"),
        ("two words", "two_words#1", "'two words'"),
        ("é/..", "__..#1", "'é/..'"),
        ("a\n", "a_#1", "'a\\n'"),
        ("a#1", "a_1#1", "'a#1'"),
        ("x" * 101, "x" * 80 + "#1", f"'{'x' * 96}..."),
        (7, "#1", "7"),
        (["a"], "#1", "a list"),
    ],
)
def test_read_prompt_table_bad_prompt_id_is_an_error_row_under_a_made_up_id(
    tmp_path: Path, prompt_id: Any, made_up: str, shown: str
) -> None:
    table = read_rows(tmp_path, [prompt("t", "p"), prompt("s", prompt_id), prompt("s", "two_words")])
    bad, good = table.of("s")
    assert bad.prompt_id == made_up
    assert message_of(bad).startswith(f"Row #1 of p.jsonl: prompt_id is {shown}; it must be 1 to 100 letters")
    assert good == PromptRow("two_words", (user("What is it?"),), None, {})


@pytest.mark.parametrize("prompt_id", ["x" * 100, "A-Z_0.9", "-", ".."])
def test_read_prompt_table_odd_prompt_ids_are_good(tmp_path: Path, prompt_id: str) -> None:
    (row,) = read_rows(tmp_path, [prompt("s", prompt_id)]).of("s")
    assert (row.prompt_id, row.error) == (prompt_id, None)


def test_read_prompt_table_second_of_two_equal_keys_is_an_error_row_under_a_made_up_id(tmp_path: Path) -> None:
    rows = [
        prompt("s", "p", text="first"),
        prompt("t", "p", text="of another sample"),
        prompt("s", "p", text="second"),
        prompt("s", "q", text=None),
        prompt("s", "p", text="first"),
        prompt("s", "q", text="comes after a bad one"),
    ]
    table = read_rows(tmp_path, rows)
    assert [row.prompt_id for row in table.of("s")] == ["p", "p#2", "q", "p#4", "q#5"]
    first, second, _, third, after_bad = table.of("s")
    assert first == PromptRow("p", (user("first"),), None, {})
    assert message_of(second) == "Row #2 of p.jsonl: sample 's' has a prompt 'p' already."
    assert message_of(third) == "Row #4 of p.jsonl: sample 's' has a prompt 'p' already."
    assert message_of(after_bad) == "Row #5 of p.jsonl: sample 's' has a prompt 'q' already."
    assert [row.error for row in table.of("t")] == [None]
    keys = list(table.keys())
    assert len(keys) == len(set(keys)) == table.num_rows == 6
