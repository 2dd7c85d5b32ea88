"""From a completion's tokens to the text of its thought and of its answer: whole, or as it grows.

`split_thought` decides about the whole, and about each tag of a stream. The invariant: neither text holds a tag or the
white space around it, no character comes twice, and what a stream gives adds up to what the whole gives, however the
tokens arrive. A stream cannot take back: where a second thought opens after the answer, or one ends that nothing
opened, what came before was given as the answer that it seemed to be, and the whole calls it thought.
Not covered: finding the tags' ids, and stop strings. Who looks for those says how many characters may be shown.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.thinking import OPEN_TAG, Tags, mode_of, opens_thought, split_thought

Side = Literal["reasoning", "content", "tag"]
SIDES: tuple[Side, Side] = ("reasoning", "content")
Pieces = deque[tuple[Side, str]]

UNFINISHED = "\ufffd"
"""What bytes that are no character yet decode to."""
MAX_UNFINISHED = 32
"""Tokens that may wait for their character to be whole: four bytes make any, more than this is no text."""


@dataclass(frozen=True)
class Reading:
    """What one completion is read with. `tail` is the prompt's end, as `split_thought` takes it."""

    tags: Tags
    decode: Callable[[Sequence[int]], str]
    tail: str = ""
    keep_lead: bool = False
    """The completion goes on in the middle of a text: white space at its beginning belongs to it."""

    def keeps_lead(self, side: Side) -> bool:
        """Whether this side is the one that the completion begins with, and its white space stays."""
        return self.keep_lead and (side == "reasoning") == opens_thought(self.tail)


def prompt_to_tail(prompt_ids: Sequence[int], tags: Tags) -> str:
    """The prompt's end as `split_thought` takes it: `<think>` where the last turn leaves a thought open.

    A turn that the client began, to be continued, may hold the thought's first words.
    """
    for token in reversed(prompt_ids):
        if token == tags.open_id:
            return OPEN_TAG
        if token == tags.close_id or token in tags.end_ids:
            break
    return ""


def read_whole(
    reading: Reading, token_ids: Sequence[int], num_chars: float = math.inf
) -> tuple[str | None, str | None]:
    """Reasoning and content of a completion, of whose text the first `num_chars` characters may be shown, tags counted.

    As batch has them: no reasoning where it did not think; no content where it was cut before the answer's first word.
    """
    thought = split_thought(reading.tail, token_ids, reading.tags)
    pieces: Pieces = deque([("reasoning", reading.decode(thought.reasoning_ids))])
    pieces.append(("content", reading.decode(thought.answer_ids or ())))
    if num_chars != math.inf:
        pieces = deque(_in_order(reading, token_ids, len(thought.reasoning_ids)))
    is_stopped = sum(len(text) for _, text in pieces) > num_chars
    texts: dict[Side, str] = {"reasoning": "", "tag": "", "content": ""}
    for side, text in clip(pieces, num_chars):
        texts[side] += text
    reasoning, content = (texts[side].rstrip() if reading.keeps_lead(side) else texts[side].strip() for side in SIDES)
    is_ended = is_stopped or (len(token_ids) > 0 and token_ids[-1] in reading.tags.end_ids)
    has_content = thought.answer_ids is not None and (content or is_ended)
    return reasoning if mode_of(thought, reasoning) == "thinking" else None, content if has_content else None


def _in_order(reading: Reading, token_ids: Sequence[int], num_reasoning: int) -> Iterator[tuple[Side, str]]:
    """All text as vLLM shows it, tags between; the first `num_reasoning` words are the thought's."""
    tags = reading.tags
    for is_tag, run in itertools.groupby(token_ids, key=lambda token: token in (tags.open_id, tags.close_id)):
        ids = list(run)
        if is_tag:
            yield "tag", reading.decode(ids)
        else:
            yield "reasoning" if num_reasoning > 0 else "content", reading.decode(ids)
            num_reasoning -= len(ids)


def leaves_open(is_open: bool, token_ids: Iterable[int], tags: Tags) -> bool:
    """Whether a thought is open after these tokens, where it was (or was not) before them."""
    return split_thought(OPEN_TAG if is_open else "", list(token_ids), tags).answer_ids is None


def clip(pieces: Pieces, num_chars: float) -> Iterator[tuple[Side, str]]:
    """Take this many characters off the front; the rest stays."""
    while pieces and num_chars >= len(pieces[0][1]):
        num_chars -= len(pieces[0][1])
        yield pieces.popleft()
    if pieces and num_chars > 0:
        side, text = pieces.popleft()
        pieces.appendleft((side, text[int(num_chars) :]))
        yield side, text[: int(num_chars)]


class ThoughtStream:
    """One completion as it grows: feed it new tokens, take new text."""

    def __init__(self, reading: Reading) -> None:
        self._tags, self._decode = reading.tags, reading.decode
        self._is_open = opens_thought(reading.tail)
        self._texts = {side: SideText(reading, side) for side in SIDES}
        self._ends: list[int] = []
        self._pieces: Pieces = deque()
        self._allowance = 0.0
        self._num_words = self._num_before_close = 0
        self.num_tokens = 0

    @property
    def num_reasoning_tokens(self) -> int:
        """As many as `split_thought` puts on the thought's side by now."""
        return self._num_words if self._is_open else self._num_before_close

    def feed(self, token_ids: Sequence[int]) -> None:
        """Take the next tokens. End-of-turn tokens wait: at the completion's end they belong to neither side."""
        self.num_tokens += len(token_ids)
        words: list[int] = []
        for token in token_ids:
            if token in self._tags.end_ids:
                self._ends.append(token)
                continue
            words += self._ends
            self._ends.clear()
            if token in (self._tags.open_id, self._tags.close_id):
                self._say(words)
                words = []
                self._pass(token)
            else:
                words.append(token)
        self._say(words)

    def finish(self) -> None:
        """No more tokens come."""
        self._pieces.append((self._side, self._texts[self._side].flush()))

    def take(self, num_chars: float = math.inf) -> tuple[str, str]:
        """New text of the thought and of the answer, where so many characters more may be shown, tags counted."""
        self._allowance += num_chars
        shown: dict[Side, str] = {"reasoning": "", "tag": "", "content": ""}
        for side, text in clip(self._pieces, self._allowance):
            self._allowance -= len(text)
            if side != "tag":
                shown[side] += self._texts[side].strip(text)
        return shown["reasoning"], shown["content"]

    @property
    def _side(self) -> Side:
        return "reasoning" if self._is_open else "content"

    def _say(self, words: list[int]) -> None:
        if words:
            self._num_words += len(words)
            self._pieces.append((self._side, self._texts[self._side].decode(words)))

    def _pass(self, tag: int) -> None:
        is_open = leaves_open(self._is_open, [tag], self._tags)
        if is_open != self._is_open:
            self.finish()
        self._is_open = is_open
        self._pieces.append(("tag", self._decode([tag])))
        if tag == self._tags.close_id:
            self._num_before_close = self._num_words


class SideText:
    """The text of one side of a stream: whole characters, without the white space around it."""

    def __init__(self, reading: Reading, side: Side) -> None:
        self._decode = reading.decode
        self._unfinished: list[int] = []
        self._is_begun = reading.keeps_lead(side)
        self._space = ""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the next tokens, up to the last character that is whole."""
        self._unfinished.extend(token_ids)
        text = self._decode(self._unfinished)
        if text.endswith(UNFINISHED) and len(self._unfinished) < MAX_UNFINISHED:
            return ""
        self._unfinished.clear()
        return text

    def flush(self) -> str:
        """What waits for a character that will not be whole."""
        text = self._decode(self._unfinished) if self._unfinished else ""
        self._unfinished.clear()
        return text

    def strip(self, text: str) -> str:
        """The text up to its last word, after the white space that was held back; nothing before the first word."""
        if not self._is_begun:
            text = text.lstrip()
            self._is_begun = bool(text)
        words = text.rstrip()
        if not words:
            self._space += text
            return ""
        shown, self._space = self._space + words, text[len(words) :]
        return shown
