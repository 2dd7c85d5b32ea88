"""`make_report`: the sums over a job's parts, by mode, by error and by kind of question."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.commits import Output, commit_chunk
from pipeline.errors import SampleError, SpecError
from pipeline.records import Chunk
from pipeline.report import ModeTotals, make_report, read_parts
from pipeline.spec import StorageSpec, fingerprint_parts
from tests.builders import Result, make_generated, make_generation, make_job
from tests.s3_server import S3Server

STORAGE = StorageSpec()
THOUGHT = {
    "mode_chosen": "thinking",
    "reasoning": "Hm.",
    "prompt_tokens": 100,
    "image_tokens": 80,
    "completion_tokens": 30,
    "reasoning_tokens": 25,
}
BROKEN = SampleError("image_corrupt", "The image cannot be decoded.")


def fill(url: str, storage: StorageSpec = STORAGE) -> str:
    """Two parts of five rows: direct and thinking, right and wrong, one cut, one error."""
    job = make_job("/nowhere/in", url, storage=storage.model_dump())
    output = Output(job, fingerprint_parts(job, "model-identity", "parquet", pa.schema([])))
    cut = make_generation(**{**THOUGHT, "answer": None, "thinking_truncated": True, "finish_reason": "length"})
    parts: list[tuple[dict[str, Result], dict[str, Any]]] = [
        (
            {"a": make_generation(answer="4"), "b": make_generation(**THOUGHT, answer="5")},
            {"truth": ["4", "6"], "number": [4, 6], "kind": ["count", "count"]},
        ),
        (
            {"c": make_generation(**THOUGHT, answer="red"), "d": cut, "e": BROKEN},
            {"truth": ["red", "blue", "green"], "number": [1, 2, 3], "kind": ["color", "color", "count"]},
        ),
    ]
    for n, (results, kept) in enumerate(parts):
        commit_chunk(make_generated(Chunk("in/a.parquet", "v", n, n + 1), results, pa.table(kept)), output)
    return url


def test_make_report_sums_by_mode_and_error(tmp_path: Path) -> None:
    report = make_report(fill(str(tmp_path / "out")), STORAGE)
    assert report.num_parts == 2
    assert report.modes == {
        "non-thinking": ModeTotals(rows=1, prompt_tokens=20, image_tokens=9, completion_tokens=6),
        "thinking": ModeTotals(3, 300, 240, 90, 75, truncated=1),
        "error": ModeTotals(rows=1),
    }
    assert report.errors_by_type == {"image_corrupt": 1}
    assert report.total == ModeTotals(5, 320, 249, 96, 75, truncated=1)
    assert report.kinds == {}


def test_make_report_compares_with_the_truth_by_kind(tmp_path: Path) -> None:
    report = make_report(fill(str(tmp_path / "out")), STORAGE, truth="truth", kind="kind")
    assert {mode: totals.right for mode, totals in report.modes.items()} == {
        "non-thinking": 1,
        "thinking": 1,
        "error": 0,
    }
    assert {kind: (totals.rows, totals.right) for kind, totals in report.kinds.items()} == {
        "count": (3, 1),
        "color": (2, 1),
    }
    assert report.total.right == 2


def test_make_report_truth_of_another_type_is_compared_as_text(tmp_path: Path) -> None:
    report = make_report(fill(str(tmp_path / "out")), STORAGE, truth="number")
    assert report.total.right == 1  # "4" is right where the column says 4


@pytest.mark.parametrize(("truth", "kind"), [("truht", None), (None, "knid")])
def test_make_report_column_that_no_part_has_is_named(tmp_path: Path, truth: str | None, kind: str | None) -> None:
    url = fill(str(tmp_path / "out"))
    with pytest.raises(SpecError, match=truth or kind or ""):
        make_report(url, STORAGE, truth, kind)


def test_make_report_on_s3_reads_the_same(s3: S3Server, tmp_path: Path) -> None:
    storage = StorageSpec(endpoint_url=s3.endpoint_url)
    url = fill(s3.fresh_prefix("report"), storage)
    assert make_report(url, storage, "truth", "kind") == make_report(fill(str(tmp_path)), STORAGE, "truth", "kind")


def test_read_parts_leaves_unfinished_and_foreign_files(tmp_path: Path) -> None:
    url = fill(str(tmp_path / "out"))
    for name in (".tmp-abc", "notes.txt"):
        (tmp_path / "out" / "data" / name).write_bytes(b"no part")
    assert sorted(table.num_rows for table in read_parts(url, STORAGE)) == [2, 3]
    assert [table.column_names for table in read_parts(url, STORAGE, ["answer"])] == [["answer"]] * 2
