"""Which samples a job takes, `input.limit`, `input.sample` and `input.where`, and the columns that it carries along.

A selection is the same in every layout of a dataset, and what cannot be read is reported whatever is selected.
Not covered: how the spec's own form is checked (`test_spec`).
"""

import datetime
import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.batch import run_batch
from pipeline.errors import SpecError
from pipeline.formats import FORMATS
from pipeline.listing import choose_format
from pipeline.plan import Plan, count_samples, limit_samples, make_plan
from pipeline.records import Chunk, Shard
from pipeline.spec import JobSpec
from tests.builders import image_table, make_job, numbered_png, write_shard
from tests.layouts import LAYOUTS, Layout, tar_bytes
from tests.reading import numbers_of, read_all, tasks_of
from tests.running import read_output

NUM_ROWS = 106
"""Two shards."""
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
STREAMS = [layout for layout in LAYOUTS if layout.name in ("tar", "tar-gz", "jsonl")]


def layout_job(folder: Path, layout: Layout, output: dict[str, Any] | None = None, **selection: Any) -> JobSpec:
    """A job over 106 rows; the image of `row-007` shows 7, its `truth` is 7 and its `kind` `k1`."""
    if not (folder / "in").exists():
        rows = [
            {"id": f"row-{n:03d}", "image": numbered_png(n), "question": f"q{n}", "kind": f"k{n % 3}", "truth": n}
            for n in range(NUM_ROWS)
        ]
        layout.write(folder / "in", rows)
    section = {"format": layout.format, **selection}
    return make_job(folder / "in", folder / "out", input=section, output={"chunk_rows": 16, **(output or {})})


def names_of(layout: Layout, numbers: Any) -> list[str]:
    return [layout.id_of(f"row-{n:03d}") for n in numbers]


def ids_of(job: JobSpec, plan: Plan | None = None) -> list[str]:
    return [task.sample_id for task in tasks_of(job, plan)]


def counts_of(job: JobSpec) -> tuple[int, int]:
    """Samples that were read, and those of them that were left out."""
    counts = [chunk.counts for chunk in read_all(job)]
    return sum(one.num_samples for one in counts), sum(one.num_left_out for one in counts)


# limit


@each_layout
def test_limit_takes_the_first_samples(tmp_path: Path, layout: Layout) -> None:
    for limit in (1, 16, 40, 103, 106, 500):
        job = layout_job(tmp_path, layout, limit=limit)
        plan = make_plan(job)
        assert plan.streams == ()
        assert plan.num_samples == min(limit, NUM_ROWS)
        tasks = tasks_of(job, plan)
        assert [task.sample_id for task in tasks] == names_of(layout, range(min(limit, NUM_ROWS)))
        assert numbers_of(tasks) == list(range(min(limit, NUM_ROWS)))


@each_layout
def test_limit_keeps_the_names_of_whole_chunks(tmp_path: Path, layout: Layout) -> None:
    """So a job whose limit is raised has less to do; and so with what a run without a limit has learnt."""
    job, limited = layout_job(tmp_path, layout), layout_job(tmp_path, layout, limit=103)
    before = make_plan(limited)
    names = {chunk.work.chunk.chunk_id for chunk in read_all(job)}
    assert make_plan(job).streams == ()
    assert [chunk.chunk_id for chunk in before.chunks[:-1] if chunk.chunk_id not in names] == []
    after = make_plan(limited)
    assert [chunk.chunk_id for chunk in after.chunks] == [chunk.chunk_id for chunk in before.chunks]
    assert ids_of(limited, after) == ids_of(limited, before) == names_of(layout, range(103))


@pytest.mark.parametrize("layout", STREAMS, ids=lambda layout: layout.name)
def test_limit_counts_streams_only_as_far_as_needed(tmp_path: Path, layout: Layout) -> None:
    job = layout_job(tmp_path, layout)
    one_format = FORMATS[layout.format]
    files, _ = choose_format(job)
    head = one_format.look(job, files.listings())
    shards = [listing.shard for listing in files.listings()]
    assert [count_samples(job, one_format, head, shards[0], most).num_samples for most in (1, 33, 100, 500)] == [
        1,
        33,
        100,
        100,
    ]

    def pieces() -> Iterator[Chunk | Shard]:
        yield from shards
        raise AssertionError("one shard too many was asked for")

    chunks = list(limit_samples(job, one_format, head, pieces(), NUM_ROWS))
    assert sum(chunk.num_samples for chunk in chunks) == NUM_ROWS


def test_limit_counts_ranges_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    line = '{"id": "row-%d", "image": "no.png"}\n'
    (tmp_path / "in" / "m.jsonl").write_text(line % 0 + "broken\n" + line % 2 + line % 3)
    job = make_job(tmp_path / "in", tmp_path / "out", input={"limit": 3})
    assert make_plan(job).num_samples == 3
    assert ids_of(job) == ["row-0", f"{tmp_path}/in/m.jsonl#1", "row-2"]


def test_limit_within_a_row_group_that_cannot_be_read_gives_no_row_more(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "in" / "a.parquet", image_table(20), row_group_size=10)
    damage_pages(shard, group=1, column="image")
    job = make_job(tmp_path / "in", tmp_path / "out", input={"limit": 13}, output={"chunk_rows": 10})
    assert numbers_of(tasks_of(job)) == [*range(10), *["shard_damaged"] * 3]


def test_limit_counts_samples_that_a_filter_leaves_out(tmp_path: Path) -> None:
    layout = STREAMS[0]
    job = layout_job(tmp_path, layout, limit=20, where=[["truth", ">=", 15]])
    assert ids_of(job) == names_of(layout, range(15, 20))
    assert counts_of(job) == (20, 15)


# sample


@each_layout
def test_sample_draws_the_same_ids_in_every_layout(tmp_path: Path, layout: Layout) -> None:
    """The reference is a plain list of the layout's ids, in another order and in shards of their own."""
    draw = {"fraction": 0.3, "seed": 5}
    names = names_of(layout, range(NUM_ROWS))
    table = pa.table({"id": names[::-1], "image": NO_IMAGES.slice(0, NUM_ROWS)})
    write_shard(tmp_path / "list" / "all.parquet", table)
    expected = set(ids_of(make_job(tmp_path / "list", tmp_path / "list-out", input={"sample": draw})))
    assert 0.15 * NUM_ROWS < len(expected) < 0.45 * NUM_ROWS
    job = layout_job(tmp_path, layout, sample=draw)
    assert ids_of(job) == [name for name in names if name in expected]
    assert counts_of(job) == (NUM_ROWS, NUM_ROWS - len(expected))


NO_IMAGES = pa.nulls(1000, pa.binary())
"""Where only ids matter: such rows are errors, and need no time."""


def drawn(folder: Path, **sample: Any) -> set[str]:
    if not (folder / "in").exists():
        names = [f"row-{n}" for n in range(1000)]
        write_shard(folder / "in" / "a.parquet", pa.table({"id": names, "image": NO_IMAGES}))
    return set(ids_of(make_job(folder / "in", folder / "out", input={"sample": sample}, output={"chunk_rows": 1000})))


def test_sample_fraction_is_about_kept_and_a_larger_one_holds_the_smaller(tmp_path: Path) -> None:
    tenth, half = drawn(tmp_path, fraction=0.1), drawn(tmp_path, fraction=0.5)
    assert 60 < len(tenth) < 140  # four standard deviations
    assert 430 < len(half) < 570
    assert tenth < half


def test_sample_other_seed_draws_others_and_the_same_seed_the_same(tmp_path: Path) -> None:
    first, second = drawn(tmp_path, fraction=0.1), drawn(tmp_path, fraction=0.1, seed=1)
    assert first == drawn(tmp_path, fraction=0.1, seed=0)
    assert len(first & second) < 30
    # Written down: other versions of this software must not draw others, or a job could not be resumed.
    assert sorted(first, key=lambda name: int(name[4:]))[:3] == ["row-23", "row-35", "row-37"]


def test_sample_of_all_leaves_nothing_out(tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "a.parquet", pa.table({"image": NO_IMAGES}))
    job = make_job(tmp_path / "in", tmp_path / "out", input={"sample": 1}, output={"chunk_rows": 1000})
    assert counts_of(job) == (1000, 0)


@pytest.mark.parametrize("selection", [{"sample": {"fraction": 1e-9}}, {"where": [["n", "=", 0]]}])
def test_selection_that_takes_nothing_still_reports_what_cannot_be_read(
    tmp_path: Path, selection: dict[str, Any]
) -> None:
    parts = (("png", numbered_png(1)), ("json", b'{"n": 1}'))
    tar = tar_bytes([(f"{n}.{end}", data) for n in range(4) for end, data in parts])
    (tmp_path / "tar").mkdir()
    (tmp_path / "tar" / "a.tar").write_bytes(tar[: 512 * 9])
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "jsonl" / "a.jsonl").write_text('{"n": 1, "id": "x", "image": "no.png"}\nbroken\n')
    shard = write_shard(tmp_path / "parquet" / "a.parquet", image_table(20, n=[-1, 1] * 10), row_group_size=10)
    damage_pages(shard, group=1, column="image")
    (tmp_path / "parquet" / "b.parquet").write_bytes(b"PAR1")
    expected = {"tar": ["shard_damaged"], "jsonl": ["row_invalid"], "parquet": ["shard_damaged"] * 11}
    for name, errors in expected.items():
        job = make_job(tmp_path / name, tmp_path / "out", input=selection)
        assert numbers_of(tasks_of(job)) == errors, name


def damage_pages(shard: Path, group: int, column: str) -> None:
    """Zeros over the first page of one column of one row group."""
    footer = pq.read_metadata(shard).row_group(group)
    columns = [footer.column(n) for n in range(footer.num_columns)]
    found = next(one for one in columns if one.path_in_schema == column)
    start = found.dictionary_page_offset or found.data_page_offset
    data = bytearray(shard.read_bytes())
    data[start : start + 20] = bytes(20)
    shard.write_bytes(data)


# where


def filter_table(num_rows: int = 60) -> pa.Table:
    numbers = range(num_rows)
    return image_table(
        num_rows,
        n=numbers,
        half=[n / 2 for n in numbers],
        word=[f"w{n % 3}" for n in numbers],
        flag=[n % 2 == 0 for n in numbers],
        maybe=[n if n % 4 else None for n in numbers],
        tag=pa.array([f"t{n % 5}" for n in numbers]).dictionary_encode(),
        day=[datetime.date(2026, 1, 1) + datetime.timedelta(n) for n in numbers],
        when=pa.array([datetime.datetime(2026, 1, 1, n % 24) for n in numbers], pa.timestamp("ms")),
    )


CONDITIONS: dict[str, tuple[list[Any], Any]] = {
    "=": ([["n", "=", 7]], lambda n: n == 7),
    "==": ([["word", "==", "w1"]], lambda n: n % 3 == 1),
    "!=": ([["word", "!=", "w1"]], lambda n: n % 3 != 1),
    "<": ([["n", "<", 5]], lambda n: n < 5),
    "<=": ([["half", "<=", 2.5]], lambda n: n <= 5),
    ">": ([["half", ">", 3]], lambda n: n > 6),
    "> of a fraction": ([["n", ">", 2.5]], lambda n: n > 2.5),
    ">=": ([["n", ">=", 15]], lambda n: n >= 15),
    "in": ([["n", "in", [3, 17, 99]]], lambda n: n in (3, 17)),
    "not in": ([["word", "not in", ["w0", "w2"]]], lambda n: n % 3 == 1),
    "boolean": ([["flag", "=", True]], lambda n: n % 2 == 0),
    "null is not more": ([["maybe", ">", 10]], lambda n: n > 10 and n % 4),
    "null is not other": ([["maybe", "!=", 5]], lambda n: n != 5 and n % 4),
    "all": ([["n", ">", 5], ["n", "<", 16], ["flag", "=", False]], lambda n: 5 < n < 16 and n % 2),
    "any": ([[["n", "<", 3]], [["n", ">", 15], ["word", "=", "w0"]]], lambda n: n < 3 or (n > 15 and n % 3 == 0)),
}
ARROW_CONDITIONS: dict[str, tuple[list[Any], Any]] = {
    "dictionary": ([["tag", "in", ["t1", "t4"]]], lambda n: n % 5 in (1, 4)),
    "date": ([["day", "<", datetime.date(2026, 1, 9)]], lambda n: n < 8),
    "timestamp": ([["when", ">=", datetime.datetime(2026, 1, 1, 20)]], lambda n: n % 24 >= 20),
}
ALL_CONDITIONS = {**CONDITIONS, **ARROW_CONDITIONS}


@pytest.mark.parametrize(("where", "holds"), ALL_CONDITIONS.values(), ids=ALL_CONDITIONS.keys())
def test_where_over_parquet_gives_the_rows_that_it_holds_for(tmp_path: Path, where: list[Any], holds: Any) -> None:
    write_shard(tmp_path / "in" / "a.parquet", filter_table(), row_group_size=10)
    job = make_job(tmp_path / "in", tmp_path / "out", input={"where": where}, output={"chunk_rows": 7})
    assert numbers_of(tasks_of(job)) == [n for n in range(60) if holds(n)]
    num_samples, num_left_out = counts_of(job)
    assert num_samples == make_plan(job).num_samples
    assert num_samples - num_left_out == sum(1 for n in range(60) if holds(n))


def write_json_inputs(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as lines, as JSON members of a tar, and as side-cars; the image of row N shows N."""
    for name in ("jsonl", "tar", "folder"):
        (folder / name).mkdir()
    members = []
    for n, row in enumerate(rows):
        picture, text = numbered_png(n), json.dumps(row)
        members += [(f"{n:03d}.json", text.encode()), (f"{n:03d}.png", picture)]
        for name in ("jsonl", "folder"):
            (folder / name / f"{n:03d}.png").write_bytes(picture)
        (folder / "folder" / f"{n:03d}.json").write_text(text)
    (folder / "tar" / "a.tar").write_bytes(tar_bytes(members))
    lines = [json.dumps({**row, "image": f"{n:03d}.png"}) + "\n" for n, row in enumerate(rows)]
    (folder / "jsonl" / "a.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def json_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    write_json_inputs(folder, filter_table(24).drop_columns(["image", "tag", "day", "when"]).to_pylist())
    return folder


@pytest.mark.parametrize("name", ["jsonl", "tar", "folder"])
@pytest.mark.parametrize(("where", "holds"), CONDITIONS.values(), ids=CONDITIONS.keys())
def test_where_over_json_gives_the_rows_that_it_holds_for(
    tmp_path: Path, json_inputs: Path, name: str, where: list[Any], holds: Any
) -> None:
    """Fields of lines, of JSON members and of side-cars, by the same rules as columns of Parquet."""
    chunks = read_all(make_job(json_inputs / name, tmp_path / "out", input={"where": where}))
    expected = [n for n in range(24) if holds(n)]
    assert numbers_of([task for chunk in chunks for task in chunk.tasks]) == expected
    assert sum(chunk.counts.num_samples for chunk in chunks) == 24
    assert sum(chunk.counts.num_left_out for chunk in chunks) == 24 - len(expected)


def test_where_row_groups_that_statistics_rule_out_are_no_part_of_the_plan(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "in" / "a.parquet", filter_table(), row_group_size=10)
    write_shard(tmp_path / "in" / "b.parquet", image_table(10, first=100, n=range(1000, 1010)))
    damage_pages(shard, group=0, column="image")  # nothing of it is read
    job = make_job(tmp_path / "in", tmp_path / "out", input={"where": [["n", ">=", 35], ["n", "<", 48]]})
    plan = make_plan(job)
    assert {(chunk.shard, chunk.start // 10) for chunk in plan.chunks} == {(str(shard), 3), (str(shard), 4)}
    assert (plan.num_samples, plan.num_shards) == (20, 1)
    assert numbers_of(tasks_of(job, plan)) == list(range(35, 48))
    names = {chunk.chunk_id for chunk in make_plan(make_job(tmp_path / "in", tmp_path / "out")).chunks}
    assert {chunk.chunk_id for chunk in plan.chunks} < names


def test_where_that_statistics_rule_out_everywhere_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "a.parquet", filter_table())
    job = make_job(tmp_path / "in", tmp_path / "out", input={"where": [["n", ">", 100]]})
    with pytest.raises(SpecError, match=r"^input\.url: the input .* has no rows that input\.where can hold for\.$"):
        make_plan(job)


def test_where_values_of_rows_that_are_left_out_are_not_looked_at(tmp_path: Path) -> None:
    """Neither their images, nor their prompts, nor their kept columns: each of these would be an error."""
    bad = pa.array([b"\xff", b"fine"]).view(pa.string())
    table = pa.table({"id": bad, "image": bad, "q": bad, "n": [1, 2]})
    write_shard(tmp_path / "in" / "a.parquet", table)
    spec = {"prompts": [{"id": "p", "template": "{{ q }}"}], "output": {"keep_columns": ["q"]}}
    taken = make_job(tmp_path / "in", tmp_path / "out", **spec)
    assert numbers_of(tasks_of(taken)) == ["row_invalid", "image_missing"]
    job = make_job(tmp_path / "in", tmp_path / "out", input={"where": [["n", ">", 1]]}, **spec)
    assert numbers_of(tasks_of(job)) == ["image_missing"]
    assert counts_of(job) == (2, 1)


def test_where_kept_column_that_does_not_fit_harms_no_row_that_is_left_out(tmp_path: Path) -> None:
    values = [1] * 70 + ["no number"] * 2
    write_json_inputs(tmp_path, [{"kept": value, "n": n} for n, value in enumerate(values)])
    for name in ("jsonl", "tar", "folder"):
        select = {"where": [["n", "<", 71], ["n", ">=", 65]]}
        job = make_job(tmp_path / name, tmp_path / "out", input=select, output={"keep_columns": ["kept"]})
        assert numbers_of(tasks_of(job)) == [*range(65, 70), "column_type"], name


@pytest.mark.parametrize(
    "where",
    [
        [["n", "=", "7"]],
        [["n", ">", "x"]],
        [["word", ">", 5]],
        [["word", "in", [1]]],
        [["flag", "=", 1]],
        [["flag", ">", "yes"]],
        [["words", "=", "a"]],
        [["facts", "=", "a"]],
        [["word", "=", "w1"], ["n", "=", "x"]],
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["parquet", "jsonl"])
def test_where_value_of_a_type_that_does_not_fit_is_refused(tmp_path: Path, name: str, where: list[Any]) -> None:
    table = filter_table(3).append_column("words", pa.array([["a"]] * 3))
    table = table.append_column("facts", pa.array([{"a": 1}] * 3))
    write_shard(tmp_path / "parquet" / "a.parquet", table)
    (tmp_path / "jsonl").mkdir()
    rows = table.drop_columns(["image", "day", "when"]).append_column("image", pa.array(["a"] * 3)).to_pylist()
    (tmp_path / "jsonl" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = make_job(tmp_path / name, tmp_path / "out", input={"where": where})
    with pytest.raises(SpecError, match=r"^input\.where: it cannot be applied to the columns of .*: "):
        make_plan(job)


def test_where_unknown_column_is_refused_and_names_shard_and_columns(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "in" / "a.parquet", image_table(3))
    job = make_job(tmp_path / "in", tmp_path / "out", input={"where": [["width", ">", 5]]})
    with pytest.raises(SpecError, match=f"^input.where: {shard} has no column 'width'; it has id, image.$"):
        make_plan(job)


def test_where_column_of_two_types_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "a.parquet", image_table(3, n=[1, 2, 3]))
    write_shard(tmp_path / "in" / "b.parquet", image_table(3, n=["1", "2", "3"]))
    job = make_job(tmp_path / "in", tmp_path / "out", input={"where": [["n", ">", 1]]})
    with pytest.raises(SpecError, match=r"^input\.where: it cannot be applied to the columns of .*/b\.parquet: "):
        make_plan(job)


# Kept columns.


def kept_columns() -> dict[str, tuple[pa.Array, pa.Array]]:
    """Every type that Parquet takes, as columns of two shards of six rows; dictionaries differ between the shards."""
    fact = {"a": 1, "b": [{"c": "x"}]}
    required = pa.struct([pa.field("a", pa.int32(), nullable=False)])
    plain: dict[str, tuple[list[Any], pa.DataType]] = {
        "int8": ([1, None, -128], pa.int8()),
        "uint64": ([2**64 - 1, None, 0], pa.uint64()),
        "float16": ([1.5, None, float("inf")], pa.float16()),
        "float64": ([1e300, None, float("-inf")], pa.float64()),
        "bool": ([True, None, False], pa.bool_()),
        "decimal32": ([Decimal("1.23"), None, Decimal(-5)], pa.decimal32(5, 2)),
        "decimal64": ([Decimal("1.23"), None, Decimal(-5)], pa.decimal64(12, 2)),
        "decimal128": ([Decimal("1.23"), None, Decimal(-5)], pa.decimal128(38, 10)),
        "decimal256": ([Decimal("1.23"), None, Decimal(-5)], pa.decimal256(50, 10)),
        "date32": ([datetime.date(2026, 1, 2), None, datetime.date(1900, 1, 1)], pa.date32()),
        "date64": ([datetime.date(2026, 1, 2), None, datetime.date(1900, 1, 1)], pa.date64()),
        "time32": ([datetime.time(1, 2, 3), None, datetime.time(0)], pa.time32("ms")),
        "time64": ([datetime.time(1, 2, 3, 4), None, datetime.time(0)], pa.time64("us")),
        "timestamp": ([1, None, -1], pa.timestamp("ns")),
        "timestamp with zone": ([1, None, -1], pa.timestamp("us", "Europe/Berlin")),
        "timestamp with offset": ([1, None, -1], pa.timestamp("ms", "+02:00")),
        "duration": ([1, None, -1], pa.duration("us")),
        "string": (["a\0b", None, "é😀"], pa.string()),
        "large_string": (["a", None, ""], pa.large_string()),
        "string_view": (["a", None, "longer than the twelve bytes of a view"], pa.string_view()),
        "binary": ([b"\xff", None, b""], pa.binary()),
        "large_binary": ([b"\xff", None, b""], pa.large_binary()),
        "binary_view": ([b"\xff", None, b"longer than twelve bytes"], pa.binary_view()),
        "fixed_size_binary": ([b"abc", None, b"\0\0\0"], pa.binary(3)),
        "null": ([None, None, None], pa.null()),
        "list": ([[1, None], None, []], pa.list_(pa.int64())),
        "large_list": ([["a"], None, []], pa.large_list(pa.string())),
        "fixed_size_list": ([[1, 2], None, [3, None]], pa.list_(pa.float32(), 2)),
        "list_view": ([[1], None, []], pa.list_view(pa.int32())),
        "struct": (
            [fact, None, {"a": None, "b": None}],
            pa.struct([("a", pa.int64()), ("b", pa.list_(pa.struct({"c": pa.string()})))]),
        ),
        "struct that requires": ([{"a": 1}, None, {"a": 3}], required),
        "map": ([[("k", 1), ("l", None)], None, []], pa.map_(pa.string(), pa.int32())),
        "map of structs": (
            [[("k", {"z": [1]})], None, []],
            pa.map_(pa.string(), pa.struct({"z": pa.list_(pa.int32())})),
        ),
        "list of dictionary": ([["x", "y"], None, []], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    }
    columns = {name: (pa.array(values * 2, kind),) * 2 for name, (values, kind) in plain.items()}
    first, second = pa.array(["x", "y", None] * 2), pa.array(["z", None, "y"] * 2)
    columns["dictionary"] = (first.dictionary_encode(), second.dictionary_encode())
    columns["dictionary of int8"] = (first.cast(SMALL), second.cast(SMALL))
    for name, kind, values in EXTENSIONS:
        columns[name] = (pa.ExtensionArray.from_storage(kind, pa.array(values * 2, kind.storage_type)),) * 2
    return columns


SMALL = pa.dictionary(pa.int8(), pa.string())
EXTENSIONS: list[tuple[str, Any, list[Any]]] = [
    ("uuid", pa.uuid(), [b"0123456789abcdef", None, b"\0" * 16]),
    ("json", pa.json_(), ['{"a": 1}', None, "[]"]),
    ("bool8", pa.bool8(), [1, None, 0]),
    ("tensor", pa.fixed_shape_tensor(pa.int32(), [2]), [[1, 2], None, [3, 4]]),
]


@pytest.mark.usefixtures("s3")  # Ray's workers have the environment of the moment when Ray started
def test_keep_columns_of_every_type_stand_in_the_parts_as_in_the_input(tmp_path: Path) -> None:
    kept = kept_columns()
    tables = []
    for part in (0, 1):
        table = image_table(6, first=6 * part, **{name: columns[part] for name, columns in kept.items()})
        shard = write_shard(tmp_path / "in" / f"{part}.parquet", table, row_group_size=3)
        file = pq.ParquetFile(shard, pre_buffer=False)  # as a whole, Arrow does not read lists of dictionaries
        tables += [file.read_row_group(group, use_threads=False) for group in range(2)]
    damage_pages(tmp_path / "in" / "1.parquet", group=1, column="image")  # its rows keep nothing, in every type
    job = make_job(
        tmp_path / "in",
        tmp_path / "out",
        prompts=[{"id": "p", "template": "a"}, {"id": "q", "template": "b"}],
        output={"chunk_rows": 5, "keep_columns": list(kept)},
        limits={"max_error_rate": 1.0},
    )
    manifest = run_batch(job)
    assert (manifest.num_samples, manifest.num_rows, manifest.num_errors) == (12, 24, 6)
    output = read_output(tmp_path / "out")
    rows = {(row["sample_id"], row["prompt_id"]): row for row in output.to_pylist()}
    assert len(rows) == 24
    for table in tables:
        for field in table.select(list(kept)).schema:
            assert output.schema.field(field.name).type == field.type
        for row in table.drop_columns(["image"]).to_pylist():
            is_lost = row["id"] in ("row-9", "row-10", "row-11")
            name = f"{tmp_path}/in/1.parquet#{int(row['id'][4:]) - 6}" if is_lost else row["id"]
            for prompt in "pq":
                found = {column: rows[name, prompt][column] for column in kept}
                assert found == {column: None if is_lost else row[column] for column in kept}


def kept_of(folder: Path, values: list[Any]) -> tuple[pa.DataType, list[Any]]:
    """The type of a kept JSON column and what the parts hold of it; for an error row its error_type."""
    (folder / "in").mkdir(exist_ok=True)
    (folder / "in" / "1.png").write_bytes(numbered_png(1))
    rows = [{"image": "1.png", **({} if value is ABSENT else {"c": value})} for value in values]
    (folder / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = make_job(folder / "in", folder / "out", output={"keep_columns": ["c"], "chunk_rows": 1000})
    (chunk,) = read_all(job)
    column = pa.concat_arrays(chunk.kept.column("c").chunks)
    errors = [task.error.error_type if task.error else None for task in chunk.tasks]
    return column.type, [error or value for error, value in zip(errors, column.to_pylist(), strict=True)]


ABSENT = object()
FACTS = pa.struct({"a": pa.int64(), "b": pa.string()})


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, None, ABSENT, -5], pa.int64(), [1, None, None, -5]),
        ([1, 1.5], pa.float64(), [1.0, 1.5]),
        ([True, None], pa.bool_(), [True, None]),
        (["a", "é\ud800"], pa.string(), ["a", "é?"]),
        ([None, None], pa.string(), [None, None]),
        ([["a"], [], None], pa.list_(pa.string()), [["a"], [], None]),
        ([[1, 2], [1.5]], pa.list_(pa.float64()), [[1, 2], [1.5]]),
        ([{"a": 1}, {"b": "x"}, {}], FACTS, [{"a": 1, "b": None}, {"a": None, "b": "x"}, None]),
        ([1, "a", None, [2]], pa.string(), ["1", '"a"', None, "[2]"]),
        ([1, True], pa.string(), ["1", "true"]),
        ([1.5, True], pa.string(), ["1.5", "true"]),
        (["ab", ["a", "b"]], pa.string(), ['"ab"', '["a", "b"]']),
        ([{"a": 1}, {"a": "é"}], pa.string(), ['{"a": 1}', '{"a": "é"}']),
        ([2**70, 1], pa.string(), [str(2**70), "1"]),
        ([2**60 + 1, 0.5], pa.string(), [str(2**60 + 1), "0.5"]),
        ([[], None], pa.string(), ["[]", None]),
        ([{"a": None, "b": 1}], pa.string(), ['{"a": null, "b": 1}']),
    ],
    ids=str,
)  # fmt: skip
def test_keep_columns_of_json_have_the_type_of_the_first_values(
    tmp_path: Path, values: list[Any], kind: pa.DataType, expected: list[Any]
) -> None:
    assert kept_of(tmp_path, values) == (kind, expected)


@pytest.mark.parametrize(
    ("first", "later", "is_kept"),
    [
        (1, 2, True),
        (1, None, True),
        (1, ABSENT, True),
        (1, 2.0, True),
        (1, 2.5, False),
        (1, "2", False),
        (1, True, False),
        (1, 2**70, False),
        (1.5, 2, True),
        (1.5, True, False),
        (1.5, 2**60 + 1, False),
        (True, 1, False),
        ("a", "b", True),
        ("a", 1, False),
        ("a", ["b"], False),
        (["a"], ["b", None], True),
        (["a"], "bc", False),
        (["a"], [1], False),
        (["a"], {"a": 1}, False),
        ({"a": 1}, {"a": None}, True),
        ({"a": 1}, {}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"a": 1}, {"a": 1.5}, False),
        ({"a": 1}, [], False),
        ({"a": [{"b": 1}]}, {"a": [{"b": 1, "c": 2}]}, False),
        (None, "a", True),
        (None, 1, False),
    ],
    ids=str,
)
def test_keep_columns_of_json_later_value_is_kept_whole_or_an_error(
    tmp_path: Path, first: Any, later: Any, is_kept: bool
) -> None:
    """None is cut, cast or dropped silently: 2.5 is not 2, and "bc" is no list."""
    _, values = kept_of(tmp_path, [first] * 64 + [later])
    kept = None if later in (ABSENT, {}) else {"a": None} if later == {"a": None} else later
    assert values[:64] == [first] * 64
    assert values[64] == (kept if is_kept else "column_type")


def test_keep_columns_of_json_nested_without_end_are_error_rows(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(600):
        deep = [deep]
    shallow = ["words"]
    _, values = kept_of(tmp_path, [shallow, deep, None])
    assert values == [json.dumps(shallow), "column_type", None]
    deep_in_parquet: Any = 1
    for _ in range(60):
        deep_in_parquet = [deep_in_parquet]
    kind, values = kept_of(tmp_path, [deep_in_parquet])
    assert (kind, values) == (pa.string(), [json.dumps(deep_in_parquet)])
