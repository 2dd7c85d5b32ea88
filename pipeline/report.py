"""What a job's parts say in sum: rows, modes, tokens, errors, and agreement with a column of true answers.

Reads one part at a time, so memory does not grow with the output.
Not covered: whether the job is complete (`commits`).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.errors import SpecError
from pipeline.records import read_part
from pipeline.spec import StorageSpec
from pipeline.storage import absolute_url, join_url, open_store

REPORT_COLUMNS = (
    "mode_chosen",
    "answer",
    "thinking_truncated",
    "prompt_tokens",
    "image_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "error_type",
)


@dataclass
class ModeTotals:
    """Sums over the rows of one mode."""

    rows: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    truncated: int = 0
    right: int = 0


@dataclass
class Report:
    """Sums over a job's parts; `modes` has a line for each mode and one named `error`."""

    num_parts: int = 0
    modes: dict[str, ModeTotals] = field(default_factory=dict)
    errors_by_type: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, ModeTotals] = field(default_factory=dict)

    @property
    def total(self) -> ModeTotals:
        sums = ModeTotals()
        for totals in self.modes.values():
            for name in vars(sums):
                setattr(sums, name, getattr(sums, name) + getattr(totals, name))
        return sums


def read_parts(output_url: str, storage: StorageSpec, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The parts of an output, one at a time."""
    url = join_url(absolute_url(output_url), "data") + "/"
    store = open_store(url, storage)
    for info in store.list(url):
        if info.url.endswith(".parquet"):
            with store.open(info.url) as file:
                yield read_part(file, columns)


def make_report(output_url: str, storage: StorageSpec, truth: str | None = None, kind: str | None = None) -> Report:
    """Sum up an output; `truth` names a kept column to compare answers with, `kind` one to group that by."""
    report = Report()
    columns = [*REPORT_COLUMNS, *(name for name in (truth, kind) if name is not None)]
    for table in read_parts(output_url, storage, columns):
        if missing := [name for name in columns if name not in table.column_names]:
            raise SpecError(f"{output_url}: its parts have no column {missing[0]!r}; is it in output.keep_columns?")
        report.num_parts += 1
        for row in table.to_pylist():
            if row["error_type"] is not None:
                report.errors_by_type[row["error_type"]] += 1
            right = truth is not None and row["answer"] is not None and row["answer"] == str(row[truth])
            _count(report.modes.setdefault(row["mode_chosen"] or "error", ModeTotals()), row, right)
            if kind is not None:
                _count(report.kinds.setdefault(str(row[kind]), ModeTotals()), row, right)
    if report.num_parts == 0:
        raise SpecError(f"{output_url} holds no parts (data/*.parquet).")
    return report


def _count(totals: ModeTotals, row: dict[str, int | None], right: bool) -> None:
    totals.rows += 1
    totals.right += right
    totals.truncated += bool(row["thinking_truncated"])
    for name in ("prompt_tokens", "image_tokens", "completion_tokens", "reasoning_tokens"):
        setattr(totals, name, getattr(totals, name) + (row[name] or 0))
