"""R-4B's reasoning parser: what vLLM is told of thoughts and answers, whole and as a stream, and where grammars begin.

vLLM's side of a stream is its own incremental detokenizer, with its held-back text and its stop strings; the tokens are
the small checkpoint's. Covers R4BParser, which a deployment uses, and what vLLM makes of `--reasoning-parser r4b`.
Not covered: vLLM's serving around them; that is in test_structured_output.py.
"""

import copy
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager
from vllm.tokenizers import get_tokenizer
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from jobs.demo import CHECKPOINT
from pipeline.engine.plugin import register
from pipeline.engine.reasoning import R4BParser, R4BReasoningParser, decoder_of, find_tags
from pipeline.engine.thought_text import MAX_UNFINISHED, Reading, ThoughtStream, prompt_to_tail
from pipeline.thinking import CLOSE_TAG, OPEN_TAG, mode_of, split_thought

TOKENIZER: Any = get_tokenizer(str(CHECKPOINT))
TAGS = find_tags(TOKENIZER)
(END,) = TAGS.end_ids
TURN = "<|im_start|>user\nSay <think> or </think>.<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = {"auto": TURN + "<think>", "long": TURN + "<think>\n", "short": TURN + "<think>\n\n</think>", "none": TURN}


def encode(text: str) -> list[int]:
    """Token ids; `<think>` and `</think>` are one each, and `<|im_end|>` is the end of the turn."""
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def spell(text: str) -> list[int]:
    """The same text without tags: one token for each byte."""
    return [token for character in text for token in encode(character)]


@dataclass(frozen=True)
class Case:
    """A completion, as far as max_tokens lets it go, and what a client should get of it."""

    mode: str
    completion: str
    reasoning: str | None
    content: str | None
    request: dict[str, Any] = field(default_factory=dict)


CASES = {
    "auto, direct": Case("auto", "\n\n</think>\n\nThree.<|im_end|>", None, "Three."),
    "auto, thinking": Case("auto", "\nLet me count.</think>\n\nThree.<|im_end|>", "Let me count.", "Three."),
    "long": Case("long", "Let me count.\n</think>\n\nThree.<|im_end|>", "Let me count.", "Three."),
    "short": Case("short", "\n\nThree. \n<|im_end|>", None, "Three."),
    "lines and spaces inside stay": Case(
        "auto", "\n One \n\n two </think> \n three \n\n four \n<|im_end|>", "One \n\n two", "three \n\n four"
    ),
    "no blank line after the tag": Case("auto", "One</think>Two", "One", "Two"),
    "an empty thought": Case("auto", "</think>Two<|im_end|>", None, "Two"),
    "a thought of blanks": Case("long", " \n \n</think>\n\nTwo<|im_end|>", None, "Two"),
    "a cut thought": Case("auto", "\nLet me cou", "Let me cou", None),
    "a thought cut at a space": Case("auto", "\nLet me \n", "Let me", None),
    "a thought that ends its turn": Case("long", "Let me<|im_end|>", "Let me", None),
    "cut before the thought's first word": Case("auto", "\n", "", None),
    "cut at once": Case("auto", "", "", None),
    "cut between the thought and the answer": Case("auto", "\nLet me</think>\n\n", "Let me", None),
    "a cut answer": Case("auto", "\nLet me</think>\n\nThe re", "Let me", "The re"),
    "an empty answer": Case("auto", "\nLet me</think>\n\n<|im_end|>", "Let me", ""),
    "an empty answer, short": Case("short", "<|im_end|>", None, ""),
    "no tag in the prompt, none in the completion": Case("none", "Three.<|im_end|>", None, "Three."),
    "the completion opens the thought": Case("none", "<think>One</think>Two<|im_end|>", "One", "Two"),
    "the completion repeats the prompt's tag": Case("auto", "<think>\nOne</think>Two<|im_end|>", "One", "Two"),
    "nested tags, closed once": Case("auto", "One<think> two</think>Three<|im_end|>", "One two", "Three"),
    "two close tags in a row": Case("auto", "One</think></think>Two<|im_end|>", "One", "Two"),
    "characters of several tokens": Case(
        "auto", "\nEin 🍎 \u00fc</think>\n\n🍐 und 🍇<|im_end|>", "Ein 🍎 \u00fc", "🍐 und 🍇"
    ),
    "white space of several tokens": Case("auto", "\u3000One\u3000</think>\u3000Two\u3000<|im_end|>", "One", "Two"),
    "JSON": Case("long", 'Let me</think>\n\n{"a": [1, 2]}<|im_end|>', "Let me", '{"a": [1, 2]}'),
    "special tokens are not shown": Case("short", "One<|im_start|> two<|im_end|>", None, "One two"),
    "special tokens are shown": Case(
        "auto",
        "Hm<image></think>One<|im_start|> two<|im_end|>",
        "Hm<image>",
        "One<|im_start|> two",
        {"skip_special_tokens": False},
    ),
    "an answer stopped": Case("auto", "\nOne</think>\n\nTwo and three<|im_end|>", "One", "Two", {"stop": [" and"]}),
    "an answer stopped inside a token": Case("short", "The red", None, "The r", {"stop": ["ed"]}),
    "an answer stopped at its first word": Case("long", "One</think>\n\nTwo", "One", "", {"stop": ["Two"]}),
    "a stop string that is shown": Case(
        "short", "One, two, three", None, "One, two", {"stop": ["two"], "include_stop_str_in_output": True}
    ),
    "a thought stopped": Case("auto", "\nOne and two</think>\n\nThree", "One", None, {"stop": [" and"]}),
    "stopped from the thought into the tag": Case("auto", "\nOne.</think>\n\nTwo", "One", "", {"stop": [".</think>"]}),
    "a direct answer stopped by its own blank line": Case("auto", "\n\n</think>\n\nTwo", "", None, {"stop": ["\n\n"]}),
    "a stop string that never comes": Case(
        "auto", "\nOne</think>\n\nTwo an<|im_end|>", "One", "Two an", {"stop": [" and so on", "zzz"]}
    ),
    "a stop string longer than all": Case("auto", "\n\n</think>\n\n4<|im_end|>", None, "4", {"stop": ["x" * 40]}),
    "a stop token": Case("auto", "\nOne</think>\n\nTwo!", "One", "Two", {"stop_token_ids": encode("!")}),
    "the thought is not wanted": Case(
        "auto", "\nOne</think>\n\nTwo<|im_end|>", None, "Two", {"include_reasoning": False}
    ),
    "an answer goes on": Case(
        "none", " the red one <|im_end|>", None, " the red one", {"continue_final_message": True}
    ),
}


@dataclass(frozen=True)
class Delta:
    """What one output of vLLM's engine holds."""

    text: str
    token_ids: list[int]
    finished: bool


def make_request(**more: Any) -> ChatCompletionRequest:
    if more.get("continue_final_message"):
        more["add_generation_prompt"] = False
    return ChatCompletionRequest(model="r4b", messages=[{"role": "user", "content": "?"}], **more)


def to_deltas(
    completion: Sequence[int], request: Any, prompt_ids: list[int], sizes: Iterator[int], tokenizer: Any = TOKENIZER
) -> list[Delta]:
    """vLLM's outputs for a completion, of so many tokens each, up to the first that ends it."""
    params = SamplingParams(
        stop=request.stop,
        stop_token_ids=request.stop_token_ids,
        skip_special_tokens=request.skip_special_tokens,
        include_stop_str_in_output=request.include_stop_str_in_output,
    )
    core_request: Any = SimpleNamespace(sampling_params=params, prompt_token_ids=prompt_ids, request_id="r")
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, core_request)
    left, deltas = list(completion), list[Delta]()
    while not deltas or not deltas[-1].finished:
        size = next(sizes)
        text, token_ids, finished = "", list[int](), False
        while not finished and len(token_ids) < size:
            new = [left.pop(0)] if left else []
            ends = bool(new) and (new[0] in TAGS.end_ids or new[0] in (request.stop_token_ids or ()))
            finished = detokenizer.update(new, ends) is not None or ends or not left
            text += detokenizer.get_next_output_text(finished, delta=True)
            token_ids += new
        deltas.append(Delta(text, token_ids, finished))
    return deltas


ONE_BY_ONE = "one by one"
CHUNKINGS = [ONE_BY_ONE, "all at once", *(f"random {seed}" for seed in range(4))]


def to_sizes(chunking: str) -> Iterator[int]:
    rng = random.Random(chunking)
    while True:
        yield {ONE_BY_ONE: 1, "all at once": 10**6}.get(chunking) or rng.randint(1, 5)


@pytest.mark.parametrize("skip", [True, False])
def test_decoder_gives_what_the_tokenizer_does(skip: bool) -> None:
    decode = decoder_of(TOKENIZER, skip)
    rng = random.Random(3)
    for _ in range(200):
        ids = [rng.randrange(len(TOKENIZER)) for _ in range(rng.randint(0, 6))]
        assert decode(ids) == TOKENIZER.decode(ids, skip_special_tokens=skip)


def exact_parser(mode: str, tokenizer: Any = TOKENIZER) -> Any:
    return R4BParser.with_tags(TAGS)(tokenizer, None, chat_template_kwargs={"thinking_mode": mode})


def vllm_parser(mode: str, tokenizer: Any = TOKENIZER) -> Any:
    """What `vllm serve --reasoning-parser r4b` uses."""
    register()
    parser_class: Any = ParserManager.get_parser(reasoning_parser_name="r4b", tokenizer=tokenizer)
    return parser_class(tokenizer, None, chat_template_kwargs={"thinking_mode": mode})


def read_stream(parser: Any, request: Any, prompt_ids: list[int], deltas: Iterable[Delta]) -> tuple[str, str]:
    """All that a client would put together."""
    reasoning = content = ""
    for delta in deltas:
        message = parser.parse_delta(delta.text, delta.token_ids, request, prompt_ids, finished=delta.finished)
        if message is not None:
            assert message.reasoning or message.content, "an empty message costs a client a chunk"
            reasoning += message.reasoning or ""
            content += message.content or ""
    return reasoning, content


def read_full(parser: Any, request: Any, prompt_ids: list[int], deltas: list[Delta]) -> tuple[str | None, str | None]:
    text = "".join(delta.text for delta in deltas)
    token_ids = [token for delta in deltas for token in delta.token_ids]
    parser.set_prompt_token_ids(prompt_ids)
    reasoning, content, tool_calls = parser.parse(text, request, model_output_token_ids=token_ids)
    assert not tool_calls
    return reasoning if request.include_reasoning else None, content  # vLLM's serving drops it there


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_full_response_each_form_gives_both_sides(case: Case) -> None:
    request, prompt_ids = make_request(**case.request), encode(PROMPTS[case.mode])
    deltas = to_deltas(encode(case.completion), request, prompt_ids, to_sizes(ONE_BY_ONE))
    assert read_full(exact_parser(case.mode), request, prompt_ids, deltas) == (case.reasoning, case.content)


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_stream_each_form_adds_up_to_the_full_response(case: Case, chunking: str) -> None:
    request, prompt_ids = make_request(stream=True, **case.request), encode(PROMPTS[case.mode])
    deltas = to_deltas(encode(case.completion), request, prompt_ids, to_sizes(chunking))
    streamed = read_stream(exact_parser(case.mode), request, prompt_ids, deltas)
    assert streamed == (case.reasoning or "", case.content or "")


# name, completion, what a stream gives, what the full response gives
TAKEN_BACK = [
    ("short, but it thinks", "short", "One</think>Two", ("", "OneTwo"), ("One", "Two")),
    ("a stray tag in the answer", "auto", "One</think>Two</think>Three", ("One", "TwoThree"), ("OneTwo", "Three")),
    (
        "a second thought",
        "auto",
        "One</think>Two<think>Three</think>Four",
        ("OneThree", "TwoFour"),
        ("OneTwoThree", "Four"),
    ),
    ("a second thought, cut", "auto", "One</think>Two<think>Three", ("OneThree", "Two"), ("OneTwoThree", None)),
]


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize(
    ("mode", "completion", "streamed", "full"), [case[1:] for case in TAKEN_BACK], ids=[case[0] for case in TAKEN_BACK]
)
def test_stream_what_looked_like_an_answer_was_sent_as_one(
    mode: str, completion: str, streamed: tuple[str, str], full: tuple[str, str | None], chunking: str
) -> None:
    request, prompt_ids = make_request(), encode(PROMPTS[mode])
    deltas = to_deltas(encode(completion), request, prompt_ids, to_sizes(chunking))
    assert read_stream(exact_parser(mode), request, prompt_ids, deltas) == streamed
    assert read_full(exact_parser(mode), request, prompt_ids, deltas) == full


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_a_spelled_tag_is_a_word_like_any_other(chunking: str) -> None:
    request, prompt_ids = make_request(), encode(PROMPTS["auto"])
    completion = spell("a </think> b") + encode("</think>") + spell("the <think> and </think> tags")
    deltas = to_deltas(completion, request, prompt_ids, to_sizes(chunking))
    expected = ("a </think> b", "the <think> and </think> tags")
    assert read_stream(exact_parser("auto"), request, prompt_ids, deltas) == expected
    assert read_full(exact_parser("auto"), request, prompt_ids, deltas) == expected


@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_a_character_cut_in_the_middle_is_shown_as_batch_shows_it(chunking: str) -> None:
    request, prompt_ids = make_request(), encode(PROMPTS["short"])
    apple = spell("🍎")
    assert len(apple) == 4
    deltas = to_deltas(spell("One ") + apple[:2], request, prompt_ids, to_sizes(chunking))
    assert read_stream(exact_parser("short"), request, prompt_ids, deltas) == ("", "One \ufffd")
    assert read_full(exact_parser("short"), request, prompt_ids, deltas) == (None, "One \ufffd")


def test_stream_gives_each_word_as_soon_as_it_is_whole() -> None:
    request, prompt_ids = make_request(), encode(PROMPTS["auto"])
    parser = exact_parser("auto")
    seen = []
    for delta in to_deltas(encode("\nLet me</think>\n\nRed 🍎.<|im_end|>"), request, prompt_ids, to_sizes(ONE_BY_ONE)):
        message = parser.parse_delta(delta.text, delta.token_ids, request, prompt_ids, finished=delta.finished)
        seen.append(None if message is None else message.model_dump(exclude_unset=True))
    shown = [message for message in seen if message is not None]
    assert shown[:3] == [{"reasoning": "Let"}, {"reasoning": " me"}, {"content": "R"}]
    assert shown[-2:] == [{"content": " 🍎"}, {"content": "."}]


def test_stream_of_one_delta_gives_both_sides_in_one_message() -> None:
    request, prompt_ids = make_request(), encode(PROMPTS["auto"])
    (delta,) = to_deltas(encode("One</think>Two<|im_end|>"), request, prompt_ids, to_sizes("all at once"))
    message = exact_parser("auto").parse_delta(delta.text, delta.token_ids, request, prompt_ids, finished=True)
    assert message.model_dump(exclude_unset=True) == {"reasoning": "One", "content": "Two"}


def test_stream_of_a_thought_that_is_not_wanted_sends_nothing_of_it() -> None:
    request, prompt_ids = make_request(include_reasoning=False), encode(PROMPTS["auto"])
    parser = exact_parser("auto")
    for token in encode("\nLet me</think>\n\n"):
        assert parser.parse_delta("", [token], request, prompt_ids, finished=False) is None


# Random completions, against the rule and not against this code.


def read_as_batch(prompt_ids: list[int], completion: list[int]) -> tuple[str | None, str | None]:
    """Both sides as VLLMEngine makes them of one that ended by itself."""
    thought = split_thought(TOKENIZER.decode(prompt_ids[-16:]), completion, TAGS)
    reasoning, answer = (
        str(TOKENIZER.decode(list(ids or ()), skip_special_tokens=True)).strip()
        for ids in (thought.reasoning_ids, thought.answer_ids)
    )
    shown = reasoning if mode_of(thought, reasoning) == "thinking" else None
    return shown, None if thought.answer_ids is None else answer


SCRAPS = [
    encode(text) for text in ("\n", "\n\n", " ", "red", " two", "x", "<", "/think>", "\u00fc", "🍎", "<|im_start|>")
]
BROKEN_SCRAPS = [*SCRAPS, *([byte] for byte in spell("🍎\u00fc\u3000"))]


def orderly_completion(rng: random.Random, mode: str, scraps: list[list[int]]) -> list[int]:
    """What a model that keeps to its format may write, tags inside the thought included."""

    def words() -> list[int]:
        return [token for _ in range(rng.randint(0, 8)) for token in rng.choice(scraps)]

    if mode == "short":
        return words()
    opened = [TAGS.open_id] if mode == "none" else []
    tags = [TAGS.open_id] * rng.randint(0, 1)
    thought = [*opened, *words(), *tags, *words()]
    return thought if rng.random() < 0.2 else [*thought, TAGS.close_id, *words()]


@pytest.mark.parametrize("mode", PROMPTS)
def test_random_orderly_completions_stream_and_full_equal_batch(mode: str) -> None:
    rng = random.Random(mode)
    prompt_ids, request = encode(PROMPTS[mode]), make_request()
    for number in range(400):
        completion = [*orderly_completion(rng, mode, BROKEN_SCRAPS), END]
        expected = read_as_batch(prompt_ids, completion)
        deltas = to_deltas(completion, request, prompt_ids, to_sizes(f"random {number}"))
        assert read_full(exact_parser(mode), request, prompt_ids, deltas) == expected
        parser = exact_parser(mode)
        assert read_stream(parser, request, prompt_ids, deltas) == (expected[0] or "", expected[1] or "")


@pytest.mark.parametrize("mode", PROMPTS)
def test_random_orderly_completions_with_stop_strings_stream_equals_full(mode: str) -> None:
    rng = random.Random(mode)
    prompt_ids = encode(PROMPTS[mode])
    num_stopped = 0
    for number in range(400):
        stops = ["".join(rng.choice(["red", " two", "x", "\n", "<", "k>"]) for _ in range(rng.randint(1, 2)))]
        request = make_request(stop=stops, include_stop_str_in_output=rng.random() < 0.2)
        completion = [*orderly_completion(rng, mode, SCRAPS), END]
        deltas = to_deltas(completion, request, prompt_ids, to_sizes(f"random {number}"))
        num_stopped += sum(len(delta.token_ids) for delta in deltas) < len(completion)
        reasoning, content = read_full(exact_parser(mode), request, prompt_ids, deltas)
        streamed = read_stream(exact_parser(mode), request, prompt_ids, deltas)
        assert streamed == (reasoning or "", content or "")
        if stops[0].strip() == stops[0] and not request.include_stop_str_in_output:
            assert stops[0] not in (reasoning or "")
            assert stops[0] not in (content or "")
    assert 50 < num_stopped < 390


WILD_SCRAPS = [scrap for scrap in SCRAPS if scrap != encode("<")]  # so that no tag is spelled


def wild_completion(rng: random.Random) -> list[int]:
    kinds = [[TAGS.open_id], [TAGS.close_id], [END], *WILD_SCRAPS]
    return [token for _ in range(rng.randint(0, 15)) for token in rng.choice(kinds)]


def decode(token_ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(token_ids), skip_special_tokens=True))


def to_letters(*texts: str | None) -> Counter[str]:
    return Counter("".join("".join(text or "" for text in texts).split()))


@pytest.mark.parametrize("mode", PROMPTS)
def test_random_wild_completions_lose_and_double_nothing_and_show_no_tag(mode: str) -> None:
    rng = random.Random(mode)
    prompt_ids, request = encode(PROMPTS[mode]), make_request(ignore_eos=True)
    for _ in range(400):
        completion = wild_completion(rng)
        deltas = [Delta("", [token], False) for token in completion] + [Delta("", [], True)]
        streamed = read_stream(exact_parser(mode), request, prompt_ids, deltas)
        at_once = read_stream(exact_parser(mode), request, prompt_ids, [Delta("", completion, True)])
        full = read_full(exact_parser(mode), request, prompt_ids, deltas)
        words = [token for token in completion if token not in (TAGS.open_id, TAGS.close_id)]
        assert streamed == at_once
        assert to_letters(*streamed) == to_letters(*full) == to_letters(decode(words))
        for text in (*streamed, *full):
            assert text is None or text == text.strip()
            assert not set(re.findall("</?think>", text or ""))


# Usage.


@pytest.mark.parametrize("mode", PROMPTS)
def test_reasoning_tokens_are_those_that_batch_counts_after_each_token(mode: str) -> None:
    rng = random.Random(mode)
    prompt_ids, request = encode(PROMPTS[mode]), make_request()
    for _ in range(200):
        completion = wild_completion(rng)
        streaming, full = exact_parser(mode), exact_parser(mode)
        full.set_prompt_token_ids(prompt_ids)
        for number, token in enumerate(completion, start=1):
            streaming.parse_delta("", [token], request, prompt_ids, finished=number == len(completion))
            so_far = completion[:number]
            expected = len(split_thought(TOKENIZER.decode(prompt_ids[-16:]), so_far, TAGS).reasoning_ids)
            assert streaming.count_reasoning_tokens(tuple(so_far)) == expected
            assert full.count_reasoning_tokens(so_far) == expected


@pytest.mark.parametrize(
    ("mode", "completion", "num_tokens"),
    [
        ("auto", "\n\n</think>\n\nThree.<|im_end|>", 1),  # the blank line of an empty thought, as batch has it
        ("long", "red two</think>x<|im_end|>", len(encode("red two"))),
        ("long", "red two<|im_end|>", len(encode("red two"))),
        ("short", "red two<|im_end|>", 0),
        ("auto", "", 0),
    ],
)
def test_reasoning_tokens_are_those_before_the_tag(mode: str, completion: str, num_tokens: int) -> None:
    parser = exact_parser(mode)
    parser.set_prompt_token_ids(encode(PROMPTS[mode]))
    assert parser.count_reasoning_tokens(encode(completion)) == num_tokens


def test_stream_of_many_tokens_decodes_each_a_few_times_at_most() -> None:
    """The work of a delta must not grow with what came before: 20,000 tokens of a thought are not rare."""
    num_decoded = 0

    def count(token_ids: Sequence[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(token_ids)
        return decode(token_ids)

    stream = ThoughtStream(Reading(TAGS, count, OPEN_TAG))
    apple = spell("🍎")
    completion = [*encode("red two ") * 1000, *apple * 500, *encode("\n") * 2000, *apple[:1] * 2000, TAGS.close_id]
    for token in completion:
        stream.feed([token])
        stream.take()
    assert num_decoded < MAX_UNFINISHED * len(completion)
    ordinary = encode("red two ") * 1000
    num_decoded = 0
    for token in ordinary:
        stream.feed([token])
    assert num_decoded == len(ordinary)


# Prompts, and where the engine's grammar begins.


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        (PROMPTS["auto"], True),
        (PROMPTS["long"], True),
        (PROMPTS["short"], False),
        (PROMPTS["short"] + "\n\n", False),
        (PROMPTS["none"], False),
        (TURN + "<think>\nLet me", True),  # a client's own beginning of a thought, to be continued
        (TURN + "<think>\nLet me</think>\n\nThe red", False),
        (TURN + "The red", False),
        (TURN + "The red one.<|im_end|>\n", False),
        ("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n", False),  # no one's thought but the user's
        ("", False),
    ],
)
def test_a_thought_is_open_where_the_last_turn_leaves_it_so(prompt: str, is_open: bool) -> None:
    assert prompt_to_tail(encode(prompt), TAGS) == (OPEN_TAG if is_open else "")
    assert R4BReasoningParser(TOKENIZER).is_reasoning_end(encode(prompt)) is not is_open


def test_a_thought_that_the_client_began_goes_on_as_one() -> None:
    request, prompt_ids = make_request(continue_final_message=True), encode(TURN + "<think>\nLet me")
    deltas = to_deltas(encode(" count</think>\n\nTwo<|im_end|>"), request, prompt_ids, to_sizes(ONE_BY_ONE))
    assert read_full(exact_parser("auto"), request, prompt_ids, deltas) == (" count", "Two")
    assert read_stream(exact_parser("auto"), request, prompt_ids, deltas) == (" count", "Two")


@pytest.mark.parametrize(
    ("delta", "is_end"),
    [
        ("red", False),
        ("", False),
        ("</think>", True),
        ("red</think>\n\n", True),
        ("</think>red<think>", False),
        ("</think>red<think>x</think>", True),
        ("<|im_end|>", False),
    ],
)
def test_engine_grammar_begins_after_the_tag(delta: str, is_end: bool) -> None:
    parser = R4BReasoningParser(TOKENIZER)
    so_far = encode(PROMPTS["long"]) + encode(delta)
    assert parser.is_reasoning_end_streaming(so_far, iter(encode(delta))) is is_end


@pytest.mark.parametrize("mode", PROMPTS)
def test_engine_and_client_agree_where_the_answer_begins(mode: str) -> None:
    rng = random.Random(mode)
    prompt_ids = encode(PROMPTS[mode])
    for _ in range(200):
        completion = orderly_completion(rng, mode, SCRAPS)
        parser = R4BReasoningParser(TOKENIZER)
        is_answer = parser.is_reasoning_end(prompt_ids)
        answer: list[int] = []
        for number, token in enumerate(completion, start=1):
            if is_answer:
                answer.append(token)
            else:
                is_answer = parser.is_reasoning_end_streaming([*prompt_ids, *completion[:number]], [token])
        if mode != "none":  # there the engine takes what comes first for the answer, as nothing opened a thought
            assert answer == parser.extract_content_ids(completion)


# What vLLM makes of `--reasoning-parser r4b` by itself.

# A stream goes out as it is where the prompt leaves no thought open; what a request says of special tokens is not seen.
STREAMS_IT_LEAVES = {name for name, case in CASES.items() if case.mode in ("short", "none")} | {
    "special tokens are shown"
}


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("name", [name for name in CASES if name not in STREAMS_IT_LEAVES])
def test_vllm_by_itself_stream_splits_too(name: str, chunking: str) -> None:
    case = CASES[name]
    request, prompt_ids = make_request(**case.request), encode(PROMPTS[case.mode])
    deltas = to_deltas(encode(case.completion), request, prompt_ids, to_sizes(chunking))
    streamed = read_stream(vllm_parser(case.mode), request, prompt_ids, deltas)
    assert streamed == (case.reasoning or "", case.content or "")


@pytest.mark.parametrize("name", [name for name in CASES if name != "special tokens are shown"])
def test_vllm_by_itself_full_response_splits_too(name: str) -> None:
    case = CASES[name]
    request, prompt_ids = make_request(**case.request), encode(PROMPTS[case.mode])
    deltas = to_deltas(encode(case.completion), request, prompt_ids, to_sizes(ONE_BY_ONE))
    parser = vllm_parser(case.mode)
    parser.is_reasoning_end(prompt_ids)  # as its serving does for the grammar, and the only sight of the prompt
    reasoning, content = read_full(parser, request, prompt_ids, deltas)
    assert (reasoning or "", content or "") == (case.reasoning or "", (case.content or "").strip())


def test_vllm_by_itself_goes_by_thinking_mode_where_it_never_sees_the_prompt() -> None:
    request = make_request()
    assert vllm_parser("auto").parse("\nLet me", request)[:2] == ("Let me", None)
    assert vllm_parser("short").parse("Let me", request)[0] is None


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("make_parser", [exact_parser, vllm_parser])
def test_tags_that_vllm_would_not_show_are_found_all_the_same(make_parser: Any, chunking: str) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert tokenizer.decode([TAGS.open_id, TAGS.close_id], skip_special_tokens=True) == ""
    prompt_ids = encode(PROMPTS["auto"])
    for stops, content in ([], "Two and three"), ([" and"], "Two"):
        parser = make_parser("auto", tokenizer)
        request = parser.adjust_request(make_request(stop=stops))
        completion = encode("\nOne</think>\n\nTwo and three<|im_end|>")
        deltas = to_deltas(completion, request, prompt_ids, to_sizes(chunking), tokenizer)
        assert read_stream(parser, request, prompt_ids, deltas) == ("One", content)
        assert read_full(make_parser("auto", tokenizer), request, prompt_ids, deltas) == ("One", content)


# Names.


def test_register_is_an_entry_point_that_vllm_calls() -> None:
    (entry,) = entry_points(group="vllm.general_plugins", name="r4b")
    assert entry.load() is register


def test_register_again_and_again_leaves_names_only() -> None:
    script = """
import sys
from pipeline.engine.plugin import register
register(); register()
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY
from vllm.reasoning import ReasoningParserManager
assert "r4b" in ReasoningParserManager.list_registered()
assert "r4b" in MEDIA_CONNECTOR_REGISTRY.name2class
late = {"pipeline.engine.reasoning", "pipeline.engine.media", "pipeline.engine.vllm_engine", "vllm.parser"}
assert not late & set(sys.modules), late & set(sys.modules)
assert ReasoningParserManager.get_reasoning_parser("r4b").__name__ == "R4BReasoningParser"
assert type(MEDIA_CONNECTOR_REGISTRY.load("r4b", media_io_kwargs={})).__name__ == "R4BMediaConnector"
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_find_tags_a_tokenizer_without_tags_is_refused() -> None:
    plain = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
    with pytest.raises(ValueError, match="does not mark its thoughts"):
        find_tags(type(TOKENIZER)(tokenizer_object=plain, unk_token="?"))


def test_find_tags_asks_a_tokenizer_once_however_many_requests_come() -> None:
    asked = []

    class Counted(type(TOKENIZER)):  # type: ignore[misc]  # transformers has no types
        def convert_tokens_to_ids(self, tokens: Any) -> Any:
            asked.append(tokens)
            return super().convert_tokens_to_ids(tokens)

    tokenizer = Counted(tokenizer_object=TOKENIZER.backend_tokenizer, eos_token=TOKENIZER.eos_token)
    asked.clear()
    parsers = [R4BReasoningParser(tokenizer) for _ in range(3)]
    assert {parser.reasoning_end_str for parser in parsers} == {CLOSE_TAG}
    assert (asked.count(OPEN_TAG), asked.count(CLOSE_TAG)) == (1, 1)
