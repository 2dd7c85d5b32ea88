"""`make_plan`: chunks cover each row once, keep their names, and change only where the input did.

Covers Parquet shards and folders of images on a disk, and every input that is refused.
Not covered: reading the samples (`test_readers`), listing on S3 (`test_storage`).
"""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SpecError
from pipeline.plan import Plan, make_plan
from pipeline.records import Anchor, Chunk
from tests.builders import IMAGE_STRUCT, image_table, make_job, numbered_png, write_shard
from tests.reading import readings_of
from tests.s3_server import S3Server


def plan_of(input_url: Path | str | list[str], output_url: Path | str = "/nowhere/out", **output: int) -> Plan:
    return make_plan(make_job(input_url, output_url, output=output))


def ids_of(plan: Plan) -> list[str]:
    return [chunk.chunk_id for chunk in plan.chunks]


def rows_of(plan: Plan) -> list[tuple[str, int]]:
    """(shard, row) of every row of every chunk, in order."""
    return [(chunk.shard, row) for chunk in plan.chunks for row in range(chunk.start, chunk.stop)]


@pytest.mark.parametrize("chunk_rows", [1, 3, 4, 10, 256])
@pytest.mark.parametrize("row_group_size", [1, 3, 7, None])
def test_make_plan_parquet_chunks_cover_every_row_exactly_once(
    tmp_path: Path, chunk_rows: int, row_group_size: int | None
) -> None:
    sizes = {"a": 1, "b": 4, "c": 10, "d": 23, "empty": 0}
    for name, size in sizes.items():
        write_shard(tmp_path / f"{name}.parquet", image_table(size), row_group_size)
    plan = plan_of(tmp_path, chunk_rows=chunk_rows)
    expected = [(str(tmp_path / f"{name}.parquet"), row) for name, size in sizes.items() for row in range(size)]
    assert rows_of(plan) == expected
    assert all(0 < chunk.num_samples <= chunk_rows for chunk in plan.chunks)
    assert len(set(ids_of(plan))) == len(plan.chunks)
    assert (plan.num_samples, plan.num_shards) == (38, 4)


def test_make_plan_again_gives_the_same_names(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", image_table(10))
    assert ids_of(plan_of(tmp_path)) == ids_of(plan_of(tmp_path))


def test_make_plan_relative_and_absolute_path_and_glob_give_the_same_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "in" / "a.parquet", image_table(10))
    monkeypatch.chdir(tmp_path)
    names = ids_of(plan_of(tmp_path / "in"))
    for url in ("in", "./in/", "in/../in", f"file://{tmp_path}/in", "in/*.parquet", "in/a.parquet", "**/*.parquet"):
        assert ids_of(plan_of(url)) == names, url


def test_make_plan_new_shard_adds_chunks_and_changes_none(tmp_path: Path) -> None:
    write_shard(tmp_path / "b.parquet", image_table(10))
    before = ids_of(plan_of(tmp_path))
    write_shard(tmp_path / "a.parquet", image_table(5))
    now = ids_of(plan_of(tmp_path))
    assert now[2:] == before  # a.parquet sorts first, and gives two
    assert len(now) == len(before) + 2


def test_make_plan_changed_shard_renames_its_chunks_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.parquet", image_table(8))
    before = ids_of(plan_of(tmp_path))
    write_shard(tmp_path / "a.parquet", image_table(8, first=1000, note=["changed"] * 8))
    now = ids_of(plan_of(tmp_path))
    assert not set(now[:2]) & set(before)
    assert now[2:] == before[2:]


def test_make_plan_other_chunk_rows_rename_all_chunks_that_differ(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", image_table(8))
    assert not set(ids_of(plan_of(tmp_path, chunk_rows=4))) & set(ids_of(plan_of(tmp_path, chunk_rows=3)))


@pytest.mark.parametrize(("limit", "chunks"), [(1, [1]), (4, [4]), (5, [4, 1]), (10, [4, 4, 2]), (99, [4, 4, 4, 4])])
def test_make_plan_limit_cuts_the_last_chunk(tmp_path: Path, limit: int, chunks: list[int]) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.parquet", image_table(8))
    plan = make_plan(make_job(tmp_path, "/nowhere/out", input={"limit": limit}))
    assert [chunk.num_samples for chunk in plan.chunks] == chunks
    assert rows_of(plan) == rows_of(plan_of(tmp_path))[:limit]


def test_make_plan_several_urls_keep_their_order(tmp_path: Path) -> None:
    for name in ("x/b", "y/a"):
        write_shard(tmp_path / f"{name}.parquet", image_table(2))
    plan = plan_of([str(tmp_path / "y"), str(tmp_path / "x" / "*.parquet")])
    assert [chunk.shard for chunk in plan.chunks] == [str(tmp_path / "y/a.parquet"), str(tmp_path / "x/b.parquet")]


def test_make_plan_shard_reached_by_two_urls_counts_once(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", image_table(6))
    plan = plan_of([str(tmp_path), str(tmp_path / "*.parquet"), str(tmp_path / "a.parquet")])
    assert len(set(ids_of(plan))) == len(plan.chunks)
    assert plan.num_samples == 6


def test_make_plan_folder_takes_shards_by_extension_and_leaves_hidden_ones(tmp_path: Path) -> None:
    for name in ("a.parquet", "sub/b.PARQUET", "c.pq", ".hidden.parquet", "_meta.parquet"):
        write_shard(tmp_path / name, image_table(1))
    (tmp_path / "README.md").write_text("no shard")
    names = [os.path.relpath(chunk.shard, tmp_path) for chunk in plan_of(tmp_path).chunks]
    assert names == ["a.parquet", "c.pq", "sub/b.PARQUET"]


def test_make_plan_folder_with_brackets_in_its_name_is_a_folder(tmp_path: Path) -> None:
    write_shard(tmp_path / "run [1]" / "a.parquet", image_table(1))
    (tmp_path / "run [1]" / "README.md").write_text("no shard")
    assert plan_of(tmp_path / "run [1]").num_samples == 1


@pytest.mark.parametrize(
    ("image", "is_taken"),
    [
        (pa.array([b"x"], pa.binary()), True),
        (pa.array([b"x"], pa.large_binary()), True),
        (pa.array([b"x"], pa.binary(1)), True),
        (pa.array([{"bytes": b"x", "path": None}], IMAGE_STRUCT), True),
        (pa.array([{"path": "x.png"}], pa.struct([("path", pa.string())])), True),
        (pa.array(["x.png"], pa.string()), True),
        (pa.array(["x.png"]).dictionary_encode(), True),
        (pa.array([["x.png"]], pa.list_(pa.string())), True),
        (pa.array([[b"x"]], pa.large_list(pa.binary())), True),
        (pa.array([[{"bytes": b"x", "path": None}]], pa.list_(IMAGE_STRUCT)), True),
        (pa.array([{"url": "x.png"}], pa.struct([("url", pa.string())])), False),
        (pa.array([[1]], pa.list_(pa.uint8())), False),
        (pa.array([1], pa.int64()), False),
    ],
)
def test_make_plan_image_column_of_a_wrong_type_is_named(tmp_path: Path, image: pa.Array, is_taken: bool) -> None:
    shard = write_shard(tmp_path / "a.parquet", pa.table({"id": ["1"], "image": image}))
    if is_taken:
        assert plan_of(tmp_path).num_samples == 1
        return
    with pytest.raises(SpecError) as caught:
        plan_of(tmp_path)
    stored = pq.read_schema(shard).field("image").type
    assert str(caught.value).startswith(f"input.columns.image: column 'image' of {shard} is {stored}; ")


@pytest.mark.parametrize(
    ("sections", "key", "column"),
    [
        ({"input": {"columns": {"image": "picture"}}}, "input.columns.image", "picture"),
        ({"input": {"columns": {"id": "key"}}}, "input.columns.id", "key"),
        ({"prompts": [{"id": "ask", "template": "{{ question }}"}]}, "prompts.ask", "question"),
        ({"prompts": [{"id": "ask", "template": "x", "system": "{{ who }}"}]}, "prompts.ask", "who"),
        ({"prompts": [{"id": "ask", "template": "x", "thinking_mode": "{{ mode }}"}]}, "prompts.ask", "mode"),
        ({"output": {"keep_columns": ["label"]}}, "output.keep_columns", "label"),
    ],
)
def test_make_plan_missing_column_names_key_shard_and_columns(
    tmp_path: Path, sections: dict[str, object], key: str, column: str
) -> None:
    shard = write_shard(tmp_path / "a.parquet", image_table(1))
    with pytest.raises(SpecError) as caught:
        make_plan(make_job(tmp_path, "/nowhere/out", **sections))
    assert str(caught.value) == f"{key}: {shard} has no column {column!r}; it has id, image."


def test_make_plan_column_missing_in_a_later_shard_is_found(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", image_table(1, label=["x"]))
    write_shard(tmp_path / "b.parquet", image_table(1))
    with pytest.raises(SpecError, match=r"b\.parquet has no column 'label'"):
        make_plan(make_job(tmp_path, "/nowhere/out", output={"keep_columns": ["label"]}))


def test_make_plan_kept_column_of_two_types_is_refused(tmp_path: Path) -> None:
    """All parts must have one schema."""
    write_shard(tmp_path / "a.parquet", image_table(1, label=["x"], other=[1]))
    write_shard(tmp_path / "b.parquet", image_table(1, label=[5], other=["y"]))
    with pytest.raises(SpecError) as caught:
        make_plan(make_job(tmp_path, "/nowhere/out", output={"keep_columns": ["label"]}))
    assert str(caught.value) == (
        f"output.keep_columns: column 'label' is string in the first shard and int64 in {tmp_path}/b.parquet."
    )
    assert plan_of(tmp_path).num_samples == 2


def test_make_plan_default_id_column_may_be_absent(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", image_table(3).drop_columns(["id"]))
    assert plan_of(tmp_path).num_samples == 3


@pytest.mark.parametrize("input_format", ["auto", "parquet", "webdataset", "jsonl", "images"])
@pytest.mark.parametrize("url", ["empty", "absent", "absent.parquet", "empty/*.parquet", "none/**/*"])
def test_make_plan_nothing_there_names_the_input(tmp_path: Path, url: str, input_format: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("no shard")
    with pytest.raises(SpecError) as caught:
        make_plan(make_job(tmp_path / url, "/nowhere/out", input={"format": input_format}))
    assert str(caught.value).startswith("input.url: no ")
    assert str(tmp_path / url) in str(caught.value)


def test_make_plan_one_of_several_urls_with_nothing_there_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "a" / "a.parquet", image_table(1))
    with pytest.raises(SpecError, match=r"input\.url: no parquet files at .*/b;"):
        plan_of([str(tmp_path / "a"), str(tmp_path / "b")])


def test_make_plan_only_empty_shards_is_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", image_table(0))
    with pytest.raises(SpecError, match=r"input\.url: the input .* has no rows"):
        plan_of(tmp_path)


BROKEN_PARQUET = [b"", b"PAR1", b"this is no Parquet file at all", b"PAR1" + bytes(50) + b"PAR1"]


@pytest.mark.parametrize("content", BROKEN_PARQUET)
def test_make_plan_broken_shard_among_others_is_a_chunk_that_says_why(tmp_path: Path, content: bytes) -> None:
    write_shard(tmp_path / "b.parquet", image_table(1))
    (tmp_path / "a.parquet").write_bytes(content)
    broken, whole = plan_of(tmp_path).chunks
    assert broken.num_samples == 1
    assert broken.damage is not None
    assert broken.damage.startswith(f"{tmp_path}/a.parquet is not a readable Parquet file: ")
    assert whole.damage is None


@pytest.mark.parametrize("content", BROKEN_PARQUET)
def test_make_plan_nothing_but_broken_shards_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(SpecError, match=r"^input\.url: .*/a\.parquet is not a readable Parquet file: "):
        plan_of(tmp_path)


@pytest.mark.parametrize(
    ("input_url", "output_url"),
    [
        ("in", "in"),
        ("in", "in/out"),
        ("in/", "in/deep/out/"),
        ("in", "elsewhere/../in/out"),
        ("in/**/*.parquet", "in/out"),  # the next run would read the parts as its input
        ("in/data", "in"),  # the parts would go among the shards, and the shards be taken for parts
    ],
)
def test_make_plan_parts_and_input_in_one_place_are_refused(tmp_path: Path, input_url: str, output_url: str) -> None:
    for name in ("in", "in/data"):
        write_shard(tmp_path / name / "a.parquet", image_table(1))
    with pytest.raises(SpecError, match=r"^output\.url: "):
        plan_of(f"{tmp_path}/{input_url}", f"{tmp_path}/{output_url}")


@pytest.mark.parametrize(
    ("input_url", "output_url"),
    [("in", "in-out"), ("in", "out"), ("in/a.parquet", "in/out"), ("in/*.parquet", "in/out")],
)
def test_make_plan_output_beside_the_input_is_fine(tmp_path: Path, input_url: str, output_url: str) -> None:
    write_shard(tmp_path / "in" / "a.parquet", image_table(1))
    assert plan_of(tmp_path / input_url, tmp_path / output_url).num_samples == 1


def test_make_plan_missing_bucket_names_the_input(s3: S3Server) -> None:
    job = make_job("s3://no-such-bucket/in/", "s3://no-such-bucket/out", storage={"endpoint_url": s3.endpoint_url})
    with pytest.raises(SpecError, match=r"^input\.url: s3://no-such-bucket/in/: the store answered NoSuchBucket"):
        make_plan(job)


def test_plan_without_and_unplanned_split_by_chunk_id(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", image_table(12))
    plan = plan_of(tmp_path)
    first, second, third = ids_of(plan)
    assert ids_of(plan.without({second, "foreign"})) == [first, third]
    assert plan.unplanned({second, "foreign", "another"}) == ["another", "foreign"]


def test_chunk_id_depends_on_each_field() -> None:
    chunks = [
        Chunk("s", "v", 0, 2),
        Chunk("t", "v", 0, 2),
        Chunk("s", "w", 0, 2),
        Chunk("s", "v", 1, 2),
        Chunk("s", "v", 0, 3),
        Chunk("s", "v", 0, 2, ((("u", "1"),),)),
        Chunk("s", "v", 0, 2, ((("u", "2"),),)),
        Chunk("s", "v", 0, 2, ((("u", "2"), ("u.txt", "1")),)),
        Chunk("s", "v", 0, 2, prompts=("p", "1")),
        Chunk("s", "v", 0, 2, prompts=("p", "2")),
    ]
    assert len({chunk.chunk_id for chunk in chunks}) == len(chunks)
    assert Chunk("s", "v", 0, 2, anchor=Anchor(7, 9), end=3, damage="x").chunk_id == chunks[0].chunk_id
    assert all(len(chunk.chunk_id) == 32 for chunk in chunks)


# Folders of images. Planning opens no image, so the files need no pixels.


def make_files(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def folder_plan(folder: Path | str, chunk_rows: int, **sections: object) -> Plan:
    job = make_job(folder, "/nowhere/out", input={"format": "images"}, output={"chunk_rows": chunk_rows}, **sections)
    return make_plan(job)


def members_of(plan: Plan) -> list[str]:
    return [member[0][0] for chunk in plan.chunks for member in chunk.members]


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 16, 1000])
def test_make_plan_folder_chunks_cover_every_file_once_and_stay_small(tmp_path: Path, chunk_rows: int) -> None:
    names = sorted(f"{n % 3}/img-{n:03d}.png" for n in range(150))
    make_files(tmp_path, names)
    plan = folder_plan(tmp_path, chunk_rows)
    assert members_of(plan) == [str(tmp_path / name) for name in names]
    assert all(0 < len(chunk.members) <= chunk_rows for chunk in plan.chunks)
    assert all((chunk.start, chunk.stop) == (0, len(chunk.members)) for chunk in plan.chunks)
    assert len(plan.chunks) < 150 or chunk_rows <= 2
    assert ids_of(plan) == ids_of(folder_plan(tmp_path, chunk_rows))


def test_make_plan_folder_one_new_file_changes_few_chunks(tmp_path: Path) -> None:
    make_files(tmp_path, [f"img-{n:05d}.png" for n in range(0, 20_000, 10)])
    before = set(ids_of(folder_plan(tmp_path, 64)))
    assert len(before) > 30
    for n in range(5, 20_000, 1000):
        make_files(tmp_path, [f"img-{n:05d}.png"])
        now = set(ids_of(folder_plan(tmp_path, 64)))
        assert 1 <= len(now - before) <= 10  # one, and with odds of 1 in 8 each one more
        before = now


def test_make_plan_folder_changed_file_changes_its_chunk_alone(tmp_path: Path) -> None:
    make_files(tmp_path, [f"img-{n:03d}.png" for n in range(100)])
    before = folder_plan(tmp_path, 10)
    (tmp_path / "img-050.png").write_bytes(b"other content")
    now = folder_plan(tmp_path, 10)
    changed = [chunk for chunk in now.chunks if chunk.chunk_id not in ids_of(before)]
    assert len(changed) == 1
    assert str(tmp_path / "img-050.png") in [member[0][0] for member in changed[0].members]


def test_make_plan_folder_with_and_without_its_slash_gives_the_same_names(tmp_path: Path) -> None:
    make_files(tmp_path, [f"{n}.png" for n in range(20)])
    assert ids_of(folder_plan(str(tmp_path), 4)) == ids_of(folder_plan(f"{tmp_path}/", 4))


def test_make_plan_folder_takes_images_by_extension(tmp_path: Path) -> None:
    make_files(tmp_path, ["a.JPG", "b.png", "c.txt", "d", ".e.png", "_f.png", "g.tar", "h/i.webp"])
    assert [os.path.relpath(url, tmp_path) for url in members_of(folder_plan(tmp_path, 10))] == [
        "a.JPG",
        "b.png",
        "h/i.webp",
    ]


def test_make_plan_folder_limit_counts_files(tmp_path: Path) -> None:
    make_files(tmp_path, [f"{n:02d}.png" for n in range(20)])
    job = make_job(tmp_path, "/nowhere/out", input={"format": "images", "limit": 7})
    plan = make_plan(job)
    assert plan.num_samples == 7
    assert [os.path.basename(url) for url in members_of(plan)] == [f"{n:02d}.png" for n in range(7)]


def test_make_plan_folder_image_reached_by_two_urls_counts_once(tmp_path: Path) -> None:
    make_files(tmp_path, ["a.png", "b.png"])
    job = make_job([str(tmp_path), str(tmp_path / "a.png")], "/nowhere/out", input={"format": "images"})
    assert members_of(make_plan(job)) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_make_plan_folder_without_images_is_named(tmp_path: Path) -> None:
    make_files(tmp_path, ["a.txt"])
    with pytest.raises(SpecError, match=r"^input\.url: no image files at "):
        folder_plan(tmp_path, 4)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"prompts": [{"id": "ask", "template": "{{ question }}"}]}, "prompts.ask"),
        ({"output": {"keep_columns": ["question"]}}, "output.keep_columns"),
    ],
)
def test_make_plan_folder_has_only_id_and_path_columns(tmp_path: Path, sections: dict[str, object], key: str) -> None:
    make_files(tmp_path, ["a.png"])
    with pytest.raises(SpecError) as caught:
        make_plan(make_job(tmp_path, "/nowhere/out", **{"input": {"format": "images"}, **sections}))
    assert str(caught.value).startswith(f"{key}: ")
    assert "'question'" in str(caught.value)
    assert str(caught.value).endswith(" id, path.")


def test_no_two_readings_of_a_plan_have_one_name(tmp_path: Path) -> None:
    """The watch tells passes apart by their names."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number:02d}.png").write_bytes(numbered_png(number))
    plan = make_plan(make_job(folder, tmp_path / "out", input={"format": "images"}))
    names = [reading.name for reading in readings_of(plan)]
    assert len(names) > 3
    assert len(set(names)) == len(names)
