"""Where a completion's thought ends and its answer begins.

R-4B's completions never start with `<think>`: the generation prompt has opened the tag (auto, long) or closed it
(short). So the split is decided from the tail of the rendered prompt and the token ids, whatever the chat template
does. The invariant: an answer never holds a part of a thought, and neither holds a tag.
Not covered: models that mark their thoughts with other tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.records import Mode

OPEN_TAG, CLOSE_TAG = "<think>", "</think>"


@dataclass(frozen=True)
class Tags:
    """Token ids of `<think>` and `</think>`, and of the tokens that end a turn."""

    open_id: int
    close_id: int
    end_ids: frozenset[int]


@dataclass(frozen=True)
class Thought:
    """Token ids on both sides of `</think>`, without the tags; `answer_ids` is None when no answer was reached."""

    reasoning_ids: tuple[int, ...]
    answer_ids: tuple[int, ...] | None


def opens_thought(prompt_tail: str) -> bool:
    """Whether the generation prompt leaves a thought open: only white space follows its last `<think>`."""
    return prompt_tail.rstrip().endswith(OPEN_TAG)


def split_thought(prompt_tail: str, token_ids: Sequence[int], tags: Tags) -> Thought:
    """Split one completion at `</think>`; the thought may be opened by the prompt or by the completion.

    A `</think>` that nothing opened ends a thought all the same: what stands before it is no answer. A thought
    that never ends leaves no answer. End-of-turn tokens at the end belong to neither side.
    """
    ids = list(token_ids)
    while ids and ids[-1] in tags.end_ids:
        ids.pop()
    thinking, boundary = opens_thought(prompt_tail), 0
    words: list[int] = []
    for token in ids:
        if token == tags.open_id:
            thinking = True
        elif token == tags.close_id:
            thinking, boundary = False, len(words)
        else:
            words.append(token)
    if thinking:
        return Thought(tuple(words), None)
    return Thought(tuple(words[:boundary]), tuple(words[boundary:]))


def mode_of(thought: Thought, reasoning_text: str) -> Mode:
    """`thinking` when a thought has words or was cut; an empty one, as R-4B's direct answers have, is none."""
    return "thinking" if thought.answer_ids is None or reasoning_text.strip() else "non-thinking"
