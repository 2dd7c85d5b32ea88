"""`split_thought` and `mode_of`: where a thought ends and an answer begins, for every form that a completion takes.

Covers the four forms that R-4B writes, forms that no chat template asks for, and random completions.
"""

import random

import pytest

from pipeline.thinking import Tags, Thought, mode_of, opens_thought, split_thought

OPEN, CLOSE, END, END_OF_TEXT, NEWLINES = 90, 91, 92, 93, 94
TAGS = Tags(OPEN, CLOSE, frozenset({END, END_OF_TEXT}))
AUTO_PROMPT = "<|im_start|>assistant\n<think>"
LONG_PROMPT = "<|im_start|>assistant\n<think>\n"
SHORT_PROMPT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
PLAIN_PROMPT = "<|im_start|>assistant\n"

# name, prompt, completion, reasoning, answer
SPLITS: list[tuple[str, str, list[int], list[int], list[int] | None]] = [
    ("auto, direct", AUTO_PROMPT, [NEWLINES, CLOSE, NEWLINES, 1, 2, END], [NEWLINES], [NEWLINES, 1, 2]),
    ("auto, thinking", AUTO_PROMPT, [1, 2, CLOSE, 3, 4, END], [1, 2], [3, 4]),
    ("long", LONG_PROMPT, [1, 2, CLOSE, NEWLINES, 3, END], [1, 2], [NEWLINES, 3]),
    ("short", SHORT_PROMPT, [1, 2, 3, END], [], [1, 2, 3]),
    ("no tag in the prompt, none in the completion", PLAIN_PROMPT, [1, 2, END], [], [1, 2]),
    ("the completion opens the thought", PLAIN_PROMPT, [OPEN, 1, CLOSE, 2, END], [1], [2]),
    ("the completion repeats the prompt's tag", AUTO_PROMPT, [OPEN, 1, CLOSE, 2, END], [1], [2]),
    ("only the close tag, never opened", PLAIN_PROMPT, [1, CLOSE, 2, END], [1], [2]),
    ("short, but it thinks all the same", SHORT_PROMPT, [1, CLOSE, 2, END], [1], [2]),
    ("nested open tags", AUTO_PROMPT, [1, OPEN, 2, CLOSE, 3, CLOSE, 4, END], [1, 2, 3], [4]),
    ("nested open tags, closed once", AUTO_PROMPT, [1, OPEN, 2, CLOSE, 3, END], [1, 2], [3]),
    ("a second, stray close tag", AUTO_PROMPT, [1, CLOSE, 2, CLOSE, 3, END], [1, 2], [3]),
    ("two close tags in a row", AUTO_PROMPT, [1, CLOSE, CLOSE, 2, END], [1], [2]),
    ("a stray close tag at the end", AUTO_PROMPT, [1, CLOSE, 2, CLOSE, END], [1, 2], []),
    ("a cut thought", AUTO_PROMPT, [1, 2, 3], [1, 2, 3], None),
    ("a thought that ends its turn", AUTO_PROMPT, [1, 2, END], [1, 2], None),
    ("a cut thought that the completion opened", PLAIN_PROMPT, [OPEN, 1, 2], [1, 2], None),
    ("an answer cut short", SHORT_PROMPT, [1, 2], [], [1, 2]),
    ("an answer cut before its first token", AUTO_PROMPT, [1, CLOSE], [1], []),
    ("an empty thought", AUTO_PROMPT, [CLOSE, 1, END], [], [1]),
    ("a thought reopened after an answer, closed", AUTO_PROMPT, [1, CLOSE, 2, OPEN, 3, CLOSE, 4], [1, 2, 3], [4]),
    ("a thought reopened after an answer, cut", AUTO_PROMPT, [1, CLOSE, 2, OPEN, 3], [1, 2, 3], None),
    ("a thought reopened by the last token", AUTO_PROMPT, [1, CLOSE, 2, OPEN], [1, 2], None),
    ("several end tokens", AUTO_PROMPT, [1, CLOSE, 2, END, END_OF_TEXT, END], [1], [2]),
    ("an end token inside the answer stays", SHORT_PROMPT, [1, END, 2, END], [], [1, END, 2]),
    ("only end tokens, thought open", AUTO_PROMPT, [END, END], [], None),
    ("only end tokens, thought closed", SHORT_PROMPT, [END, END], [], []),
    ("empty, thought open", AUTO_PROMPT, [], [], None),
    ("empty, thought closed", SHORT_PROMPT, [], [], []),
]


@pytest.mark.parametrize(
    ("prompt", "completion", "reasoning", "answer"), [case[1:] for case in SPLITS], ids=[case[0] for case in SPLITS]
)
def test_split_thought_each_form_gives_both_sides(
    prompt: str, completion: list[int], reasoning: list[int], answer: list[int] | None
) -> None:
    expected = Thought(tuple(reasoning), None if answer is None else tuple(answer))
    assert split_thought(prompt, completion, TAGS) == expected


def test_split_thought_leaves_callers_tokens_alone() -> None:
    completion = [1, CLOSE, 2, END]
    split_thought(AUTO_PROMPT, completion, TAGS)
    assert completion == [1, CLOSE, 2, END]


@pytest.mark.parametrize(
    ("tail", "opens"),
    [
        (AUTO_PROMPT, True),
        (LONG_PROMPT, True),
        ("<think> \n\t\n", True),
        (SHORT_PROMPT, False),
        ("</think>", False),
        (PLAIN_PROMPT, False),
        ("", False),
        ("Say <think> aloud", False),
        ("<think>\nLet me", False),
    ],
)
def test_opens_thought_only_white_space_may_follow_the_tag(tail: str, opens: bool) -> None:
    assert opens_thought(tail) is opens


@pytest.mark.parametrize(
    ("answer_ids", "reasoning_text", "mode"),
    [
        ((1,), "Let me count.", "thinking"),
        ((1,), "", "non-thinking"),
        ((1,), "\n\n \t", "non-thinking"),
        ((), "Let me count.", "thinking"),
        ((), "", "non-thinking"),
        (None, "Let me", "thinking"),
        (None, "", "thinking"),
    ],
)
def test_mode_of_words_or_a_cut_make_it_thinking(
    answer_ids: tuple[int, ...] | None, reasoning_text: str, mode: str
) -> None:
    assert mode_of(Thought((), answer_ids), reasoning_text) == mode


def ends_in_thought(prompt: str, tokens: list[int]) -> bool:
    """Whether the last tag of prompt and completion together is an open one."""
    tags = [token for token in tokens if token in (OPEN, CLOSE)]
    return tags[-1] == OPEN if tags else prompt in (AUTO_PROMPT, LONG_PROMPT)


def is_in_order(part: tuple[int, ...], whole: list[int]) -> bool:
    rest = iter(whole)
    return all(token in rest for token in part)


def test_split_thought_random_completions_keep_the_invariants() -> None:
    rng = random.Random(0)
    for _ in range(5000):
        prompt = rng.choice([AUTO_PROMPT, LONG_PROMPT, SHORT_PROMPT, PLAIN_PROMPT])
        # Words are all different, so that none can be lost, doubled or moved unseen.
        tokens = [rng.choice([OPEN, CLOSE, END, 1000 + n, 1000 + n]) for n in range(rng.randint(0, 12))]
        thought = split_thought(prompt, tokens, TAGS)
        answer = thought.answer_ids or ()
        words = [token for token in tokens if token >= 1000]
        said = (*thought.reasoning_ids, *answer)
        assert OPEN not in said
        assert CLOSE not in said
        assert (thought.answer_ids is None) is ends_in_thought(prompt, tokens)
        assert len(said) <= len(tokens)
        assert [token for token in said if token >= 1000] == words
        assert is_in_order(thought.reasoning_ids, tokens)
        assert is_in_order(answer, tokens)
        if CLOSE in tokens and thought.answer_ids is not None:
            last_close = len(tokens) - tokens[::-1].index(CLOSE)
            assert is_in_order(answer, tokens[last_close:])
