"""A remote job's log on this terminal: each line once, progress bars in place, the result kept aside."""

import json
import re
import shutil
import sys
from contextlib import suppress
from itertools import pairwise
from typing import Any

from jobs.shipping import RESULT_MARK

BAR = re.compile(r"\[\d[\d:]*(<[\d:?]+)?, +\S+\]$")
"""The end of a line of tqdm's: `[00:05<02:30,  6.40row/s]`."""


class LogView:
    """Shows a log on stderr from texts that may overlap; `position` is how much of it was taken, in characters."""

    def __init__(self) -> None:
        self.position = 0
        self.result: dict[str, Any] | None = None
        self.partial = ""
        self.in_place = sys.stderr.isatty()
        self.bar_stands = False

    def take(self, position: int, text: str) -> None:
        """Show what is new in a text that begins at `position` of the log."""
        fresh = text[max(0, self.position - position) :]
        self.position += len(fresh)
        *lines, self.partial = (self.partial + fresh).replace("\r", "\n").split("\n")
        lines = [line for line in lines if line.strip()]
        for line, following in pairwise([*lines, ""]):
            if not (BAR.search(line) and BAR.search(following)):  # of bars that come at once the last says it all
                self._show(line)

    def close(self) -> None:
        """Show what has no line's end, and leave the bar's line."""
        if self.partial.strip():
            self._show(self.partial)
        self.partial = ""
        if self.bar_stands:
            self._write("\n")
        self.bar_stands = False

    def _show(self, line: str) -> None:
        if line.startswith(RESULT_MARK):
            with suppress(ValueError):  # a log that ends in its middle
                self.result = json.loads(line.removeprefix(RESULT_MARK))
            return
        is_bar = self.in_place and BAR.search(line) is not None
        if is_bar:
            line = line[: shutil.get_terminal_size().columns - 1]
        self._write(("\r\x1b[K" if self.in_place else "") + line + ("" if is_bar else "\n"))
        self.bar_stands = is_bar

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
