"""`read_chunks`: n samples and p prompts give n * p tasks, each with its own image, text and kept columns.

Covers Parquet shards and folders of images, what becomes an error row, and what raises.
Not covered: how images decode (`test_images`) and which chunks there are (`test_plan`).
"""

import errno
import io
import json
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import SampleError, SpecError
from pipeline.plan import make_plan
from pipeline.readers import read_chunks
from pipeline.records import CommittedChunk, FailedShard, ReadChunk, Reading, Retry, Work
from pipeline.spec import JobSpec
from pipeline.storage import LocalStore
from tests.builders import IMAGE_STRUCT, image_table, make_job, numbered_png, png_bytes, write_shard
from tests.reading import numbers_of, read_all, readings_of, settings_of, tasks_of, text_of, try_all
from tests.s3_server import S3Server

TWO_PROMPTS = [{"id": "a", "template": "First."}, {"id": "b", "template": "Second."}]


def job_over(folder: Path, table: pa.Table, **sections: Any) -> JobSpec:
    """A job over one shard that holds the table."""
    write_shard(folder / "in" / "shard.parquet", table)
    return make_job(folder / "in", folder / "out", **sections)


@pytest.mark.parametrize("row_group_size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("chunk_rows", [1, 3, 4, 100])
def test_read_chunks_any_row_groups_give_each_row_its_own_image(
    tmp_path: Path, row_group_size: int, chunk_rows: int
) -> None:
    table = image_table(11, first=300, label=[f"label-{n}" for n in range(300, 311)])
    write_shard(tmp_path / "in" / "a.parquet", table, row_group_size)
    job = make_job(
        tmp_path / "in",
        tmp_path / "out",
        prompts=[{"id": "p", "template": "Is it {{ label }}?"}],
        output={"chunk_rows": chunk_rows, "keep_columns": ["label"]},
    )
    chunks = read_all(job)
    tasks = [task for chunk in chunks for task in chunk.tasks]
    assert [task.sample_id for task in tasks] == [f"row-{n}" for n in range(300, 311)]
    assert numbers_of(tasks) == list(range(300, 311))
    assert [text_of(task) for task in tasks] == [f"Is it label-{n}?" for n in range(300, 311)]
    kept = [value for chunk in chunks for value in chunk.kept.column("label").to_pylist()]
    assert kept == [f"label-{n}" for n in range(300, 311)]


def test_read_chunks_several_prompts_give_a_task_for_each_pair(tmp_path: Path) -> None:
    prompts = [
        {"id": "a", "template": "First.", "thinking_mode": "long"},
        {
            "id": "b",
            "template": "Second {{ label }}.",
            "system": "Be brief with {{ label }}.",
            "thinking_mode": "short",
        },
    ]
    table = image_table(2, label=["x", "y"])
    (chunk,) = read_all(job_over(tmp_path, table, prompts=prompts, output={"keep_columns": ["label", "id"]}))
    assert [(task.sample_id, task.prompt_id) for task in chunk.tasks] == [
        ("row-0", "a"),
        ("row-0", "b"),
        ("row-1", "a"),
        ("row-1", "b"),
    ]
    assert [text_of(task) for task in chunk.tasks] == ["First.", "Second x.", "First.", "Second y."]
    systems = [message["content"] for task in chunk.tasks for message in task.messages if message["role"] == "system"]
    assert systems == ["Be brief with x.", "Be brief with y."]
    assert [task.mode_requested for task in chunk.tasks] == ["long", "short"] * 2
    assert numbers_of(chunk.tasks) == [0, 0, 1, 1]
    assert chunk.kept.to_pydict() == {"label": ["x", "x", "y", "y"], "id": ["row-0", "row-0", "row-1", "row-1"]}


def test_read_chunks_whatever_a_row_holds_there_is_a_task_for_it(tmp_path: Path) -> None:
    images = [numbered_png(0), None, b"", b"no image", numbered_png(4)[:45], numbered_png(5)]
    table = pa.table({"id": [str(n) for n in range(6)], "image": pa.array(images, pa.binary())})
    tasks = tasks_of(job_over(tmp_path, table, prompts=TWO_PROMPTS))
    assert [(task.sample_id, task.prompt_id) for task in tasks] == [(str(n), p) for n in range(6) for p in "ab"]
    expected = [0, "image_null", "image_empty", "image_unrecognized", "image_truncated", 5]
    assert numbers_of(tasks) == [outcome for outcome in expected for _ in "ab"]
    assert all(not task.images for task in tasks if task.error)


def test_read_chunks_limits_of_the_spec_reach_the_decoder(tmp_path: Path) -> None:
    table = pa.table({"image": [png_bytes(size=(10, 10)), png_bytes(size=(11, 10))]})
    job = job_over(tmp_path, table, limits={"max_image_pixels": 100})
    assert [task.error.error_type if task.error else None for task in tasks_of(job)] == [None, "image_too_many_pixels"]
    job = job_over(tmp_path, table, limits={"max_image_bytes": 10})
    assert numbers_of(tasks_of(job)) == ["image_too_many_bytes"] * 2


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(len(numbered_png(7)))])
def test_read_chunks_every_kind_of_bytes_column_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"image": pa.array([numbered_png(7), None], kind)})
    assert numbers_of(tasks_of(job_over(tmp_path, table))) == [7, "image_null"]


def test_read_chunks_null_id_is_shard_and_row(tmp_path: Path) -> None:
    table = image_table(6).set_column(0, "id", pa.array(["x", None, "y", "z", "w", None]))
    shard = tmp_path / "in" / "shard.parquet"
    ids = [task.sample_id for task in tasks_of(job_over(tmp_path, table))]  # chunks of 4
    assert ids == ["x", f"{shard}#1", "y", "z", "w", f"{shard}#5"]


@pytest.mark.parametrize("columns", [{"id": None}, {}])
def test_read_chunks_no_id_column_numbers_the_rows_of_the_shard(tmp_path: Path, columns: dict[str, Any]) -> None:
    table = image_table(6) if columns else image_table(6).drop_columns(["id"])
    ids = [task.sample_id for task in tasks_of(job_over(tmp_path, table, input={"columns": columns}))]
    assert ids == [f"{tmp_path}/in/shard.parquet#{n}" for n in range(6)]


def test_read_chunks_number_as_id_becomes_text(tmp_path: Path) -> None:
    table = image_table(2).set_column(0, "id", pa.array([7, 8]))
    assert [task.sample_id for task in tasks_of(job_over(tmp_path, table))] == ["7", "8"]


def test_read_chunks_struct_without_bytes_reads_its_path_beside_the_shard(tmp_path: Path) -> None:
    (tmp_path / "in" / "images").mkdir(parents=True)
    (tmp_path / "in" / "images" / "é 3.png").write_bytes(numbered_png(3))
    images = [
        {"bytes": numbered_png(1), "path": "images/é 3.png"},  # bytes win
        {"bytes": None, "path": "images/é 3.png"},
        {"bytes": None, "path": "images/absent.png"},
        {"bytes": None, "path": "images"},
        {"bytes": None, "path": None},
        {"bytes": None, "path": ""},
        {"bytes": b"", "path": "images/é 3.png"},
        None,
    ]
    table = pa.table({"image": pa.array(images, IMAGE_STRUCT)})
    assert numbers_of(tasks_of(job_over(tmp_path, table, output={"chunk_rows": 100}))) == [
        1,
        3,
        "image_missing",
        "image_unreadable",
        "image_null",
        "image_null",
        "image_empty",
        "image_null",
    ]


@pytest.mark.parametrize(
    ("path", "error_type"),
    [
        ("a\0b.png", "image_missing"),
        ("x" * 5000, "image_unreadable"),
        ("2.png/x", "image_missing"),
        ("~/x.png", "image_missing"),
        ("/etc/passwd", "image_unrecognized"),
        ("../absent.png", "image_missing"),
        ("file:///etc/passwd", "image_unrecognized"),
        ("ftp://example.com/x.png", "image_path_refused"),
        ("http://127.0.0.1:9/x.png", "url_refused"),
        ("data:image/png,abc", "image_name_invalid"),
    ],
)
def test_read_chunks_path_that_leads_to_no_image_harms_its_own_row_alone(
    tmp_path: Path, path: str, error_type: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "2.png").write_bytes(numbered_png(2))
    (tmp_path / "out.png").write_bytes(numbered_png(3))
    images = [{"bytes": None, "path": "2.png"}, {"bytes": None, "path": path}]
    tasks = tasks_of(job_over(tmp_path, pa.table({"image": pa.array(images, IMAGE_STRUCT)})))
    assert numbers_of(tasks) == [2, error_type]


def test_read_chunks_thinking_mode_may_come_from_the_row(tmp_path: Path) -> None:
    table = image_table(4, mode=["long", "short", "sometimes", None])
    prompt = {"id": "p", "template": "Look.", "thinking_mode": "{{ mode }}"}
    tasks = tasks_of(job_over(tmp_path, table, prompts=[prompt]))
    assert [task.mode_requested for task in tasks[:2]] == ["long", "short"]
    assert [task.error is None for task in tasks] == [True, True, False, False]
    assert tasks[2].error is not None
    assert tasks[2].error.error_type == "thinking_mode_invalid"
    assert "'sometimes'" in tasks[2].error.message
    assert {task.mode_requested for task in tasks[2:]} <= {"auto", "long", "short"}


def test_read_chunks_prompt_that_fails_harms_its_own_row_and_prompt_alone(tmp_path: Path) -> None:
    prompts = [{"id": "share", "template": "{{ 100 // n }} percent?"}, {"id": "plain", "template": "Look."}]
    tasks = tasks_of(job_over(tmp_path, image_table(3, n=[1, 0, 4]), prompts=prompts))
    assert [task.error.error_type if task.error else text_of(task) for task in tasks] == [
        "100 percent?",
        "Look.",
        "prompt_failed",
        "Look.",
        "25 percent?",
        "Look.",
    ]


def test_read_chunks_columns_of_any_type_reach_the_template(tmp_path: Path) -> None:
    table = image_table(1, words=pa.array([["a", "b"]]), meta=pa.array([{"source": {"name": "web"}}]))
    prompt = {"id": "p", "template": "{{ words | join('+') }} {{ meta.source.name }}"}
    assert text_of(tasks_of(job_over(tmp_path, table, prompts=[prompt]))[0]) == "a+b web"


def test_read_chunks_reads_only_the_columns_it_needs(tmp_path: Path) -> None:
    """Shards may be wide; here a column that nothing asks for cannot even be read."""
    job = job_over(tmp_path, image_table(50, unused=["text " * n for n in range(50)]), output={"chunk_rows": 50})
    shard = tmp_path / "in" / "shard.parquet"
    column = pq.read_metadata(shard).row_group(0).column(2)
    assert column.path_in_schema == "unused"
    start = column.dictionary_page_offset or column.data_page_offset
    data = shard.read_bytes()
    shard.write_bytes(data[:start] + bytes(50) + data[start + 50 :])
    assert numbers_of(tasks_of(job)) == list(range(50))
    all_columns = job.model_copy(update={"output": job.output.model_copy(update={"keep_columns": ["unused"]})})
    assert set(numbers_of(tasks_of(all_columns))) == {"shard_damaged"}


def test_read_chunks_kept_columns_keep_type_value_and_order(tmp_path: Path) -> None:
    kept: dict[str, Any] = {
        "dotted.name": pa.array(["p", None, "q"]),
        "tags": pa.array([["a"], [], None], pa.list_(pa.string())),
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
        "meta": pa.array([{"n": 1}, None, {"n": 3}]),
        "when": pa.array([1, 2, None], pa.timestamp("us", "UTC")),
    }
    names = ["when", "tags", "meta", "dotted.name", "kind"]
    job = job_over(tmp_path, image_table(3, **kept), prompts=TWO_PROMPTS, output={"keep_columns": names})
    (chunk,) = read_all(job)
    assert chunk.kept.column_names == names
    for name in names:
        assert chunk.kept.schema.field(name).type == kept[name].type
        assert chunk.kept.column(name).to_pylist() == [value for value in kept[name].to_pylist() for _ in range(2)]


def test_read_chunks_retry_makes_only_the_tasks_that_are_asked_for(tmp_path: Path) -> None:
    table = image_table(4, label=["w", "x", "y", "z"])
    job = job_over(tmp_path, table, prompts=TWO_PROMPTS, output={"keep_columns": ["label"]})
    plan = make_plan(job)
    (chunk,) = plan.chunks
    reading = Reading((Work(chunk, Retry("version", frozenset({3, 6, 7}))),))
    (done,) = read_chunks(reading, settings_of(job, plan))
    assert isinstance(done, ReadChunk)
    assert [(task.sample_id, task.prompt_id) for task in done.tasks] == [("row-1", "b"), ("row-3", "a"), ("row-3", "b")]
    assert numbers_of(done.tasks) == [1, 3, 3]
    assert done.kept.column("label").to_pylist() == ["x", "z", "z"]


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_read_chunks_shard_that_is_not_what_the_plan_saw_fails_alone_and_is_named(tmp_path: Path, change: str) -> None:
    job = job_over(tmp_path, image_table(4))
    write_shard(tmp_path / "in" / "other.parquet", image_table(3, first=10))
    plan = make_plan(job)
    if change == "replaced":
        job_over(tmp_path, image_table(5))
    else:
        (tmp_path / "in" / "shard.parquet").unlink()
    other, failed = try_all(job, plan)
    assert isinstance(other, ReadChunk)
    assert numbers_of(other.tasks) == [10, 11, 12]
    assert isinstance(failed, FailedShard)
    assert "shard.parquet" in failed.message


def test_read_chunks_damaged_row_group_gives_an_error_for_each_of_its_rows_alone(tmp_path: Path) -> None:
    write_shard(tmp_path / "in" / "shard.parquet", image_table(50), row_group_size=10)
    job = make_job(tmp_path / "in", tmp_path / "out", prompts=TWO_PROMPTS, output={"chunk_rows": 25})
    shard = tmp_path / "in" / "shard.parquet"
    column = pq.read_metadata(shard).row_group(2).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    data = shard.read_bytes()
    shard.write_bytes(data[:start] + bytes(100) + data[start + 100 :])
    tasks = tasks_of(job)
    expected = [n if not 20 <= n < 30 else "shard_damaged" for n in range(50)]
    assert numbers_of(tasks) == [number for number in expected for _ in TWO_PROMPTS]
    lost = [task for task in tasks if task.error is not None]
    assert [task.sample_id for task in lost[::2]] == [f"{shard}#{n}" for n in range(20, 30)]
    assert lost[0].error is not None
    assert str(shard) in lost[0].error.message


class FailingDisk(io.FileIO):
    """A file of a disk that fails, from its `num_reads`-th read on."""

    def __init__(self, path: str, num_reads: int) -> None:
        super().__init__(path)
        self.num_reads = num_reads

    def read(self, size: int | None = -1) -> bytes:
        self.num_reads -= 1
        if self.num_reads < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(-1 if size is None else size)


def test_read_chunks_disk_that_fails_damages_no_row_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "in" / "shard.parquet", image_table(50), row_group_size=10)
    job = make_job(tmp_path / "in", tmp_path / "out", output={"chunk_rows": 50})
    plan, whole = make_plan(job), tasks_of(job)
    for num_reads in range(100):
        monkeypatch.setattr(LocalStore, "open", lambda store, url, *_, n=num_reads: FailingDisk(url, n))
        (made,) = try_all(job, plan)
        if not isinstance(made, FailedShard):
            break
        assert "Input/output error" in made.message
    assert isinstance(made, ReadChunk)
    assert list(made.tasks) == whole
    assert num_reads > 7, "it failed in its footer, which takes two, and in each of its row groups"


def test_plan_over_a_disk_that_fails_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_over(tmp_path, image_table(4))
    write_shard(tmp_path / "in" / "zz.parquet", image_table(3, first=10))
    open_file = LocalStore.open

    def open_or_fail(store: LocalStore, url: str, version: str | None = None) -> BinaryIO:
        return FailingDisk(url, 0) if url.endswith("zz.parquet") else open_file(store, url, version)

    monkeypatch.setattr(LocalStore, "open", open_or_fail)
    with pytest.raises(SpecError, match=r"input\.url: .*zz\.parquet cannot be read: Input/output error\."):
        make_plan(job)


def test_read_chunks_shard_whose_name_is_not_utf8_gives_ids_that_parquet_can_hold(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "in" / os.fsdecode(b"caf\xe9.parquet"), image_table(1).drop_columns(["id"]))
    assert os.fsencode(shard).endswith(b"caf\xe9.parquet")
    (task,) = tasks_of(make_job(tmp_path / "in", tmp_path / "out"))
    task.sample_id.encode()  # raises if not; `--retry-errors` compares it with what the part holds


# Folders of images.


def test_read_chunks_stream_gives_its_chunks_the_same_places_whatever_is_committed(tmp_path: Path) -> None:
    """Ray reads a shard again for one chunk that was lost, and takes the one in its place."""
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(numbered_png(number))
    lines = [json.dumps({"id": f"row-{number}", "image": f"{number}.png"}) for number in range(10)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    job = make_job(tmp_path / "lines.jsonl", tmp_path / "out")
    plan = make_plan(job)
    (reading,) = readings_of(plan)
    settings = settings_of(job, plan)
    first = list(read_chunks(reading, settings))
    ids = [made.work.chunk.chunk_id for made in first if isinstance(made, ReadChunk)]
    assert len(ids) == len(first) == 3
    again = list(read_chunks(reading, settings, lambda chunk_id: chunk_id == ids[1]))
    assert [type(made) for made in again] == [ReadChunk, CommittedChunk, ReadChunk]
    assert [getattr(made, "chunk_id", None) or made.work.chunk.chunk_id for made in again] == ids  # type: ignore[union-attr]


def folder_job(folder: Path, **sections: Any) -> JobSpec:
    return make_job(f"{folder}/in", folder / "out", **{**sections, "input": {"format": "images"}})


def make_folder(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_read_chunks_folder_ids_are_paths_in_the_folder(tmp_path: Path) -> None:
    make_folder(tmp_path, {"b/2.png": numbered_png(2), "a é.png": numbered_png(1), "b/broken.png": b"no image"})
    prompt = {"id": "p", "template": "{{ id }} {{ path }}"}
    chunks = read_all(folder_job(tmp_path, prompts=[prompt], output={"chunk_rows": 100, "keep_columns": ["path"]}))
    tasks = [task for chunk in chunks for task in chunk.tasks]
    assert [task.sample_id for task in tasks] == ["a é.png", "b/2.png", "b/broken.png"]
    assert numbers_of(tasks) == [1, 2, "image_unrecognized"]
    assert text_of(tasks[0]) == "a é.png a é.png"
    kept = [path for chunk in chunks for path in chunk.kept.column("path").to_pylist()]
    assert kept == [task.sample_id for task in tasks]


def test_read_chunks_folder_file_whose_name_is_not_utf8_is_read(tmp_path: Path) -> None:
    make_folder(tmp_path, {os.fsdecode(b"caf\xe9.png"): numbered_png(9)})
    prompt = {"id": "p", "template": "{{ path }}"}
    (chunk,) = read_all(folder_job(tmp_path, prompts=[prompt], output={"keep_columns": ["id"]}))
    assert numbers_of(chunk.tasks) == [9]
    assert (chunk.tasks[0].sample_id, text_of(chunk.tasks[0])) == ("caf?.png", "caf?.png")
    assert chunk.kept.column("id").to_pylist() == ["caf?.png"]


def test_read_chunks_folder_file_that_changed_or_vanished_is_an_error_row(tmp_path: Path) -> None:
    make_folder(tmp_path, {f"{n}.png": numbered_png(n) for n in range(3)})
    job = folder_job(tmp_path, output={"chunk_rows": 100})
    plan = make_plan(job)
    (tmp_path / "in" / "0.png").write_bytes(numbered_png(100) + b"grown")
    (tmp_path / "in" / "2.png").unlink()
    assert numbers_of(tasks_of(job, plan)) == ["image_missing", 1, "image_missing"]


def test_read_chunks_one_image_file_as_input_has_its_name_as_id(tmp_path: Path) -> None:
    make_folder(tmp_path, {"one.png": numbered_png(1)})
    job = make_job(tmp_path / "in" / "one.png", tmp_path / "out", input={"format": "images"})
    (task,) = tasks_of(job)
    assert (task.sample_id, numbers_of([task])) == ("one.png", [1])


def test_read_chunks_folder_and_glob_give_the_same_ids(tmp_path: Path) -> None:
    """Else naming the same images another way would have them answered twice."""
    make_folder(tmp_path, {"b/2.png": numbered_png(2), "1.png": numbered_png(1)})
    by_glob = make_job(tmp_path / "in" / "**" / "*.png", tmp_path / "out", input={"format": "images"})
    ids = [task.sample_id for task in tasks_of(by_glob)]
    assert ids == [task.sample_id for task in tasks_of(folder_job(tmp_path))]


def test_folder_ids_of_several_inputs_are_whole_urls(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(numbered_png(1))
    urls = [str(tmp_path / "a"), str(tmp_path / "b" / "1.png")]
    job = make_job(urls, str(tmp_path / "out"), input={"format": "images"})
    assert [task.sample_id for task in tasks_of(job)] == [f"{tmp_path}/a/1.png", f"{tmp_path}/b/1.png"]


def test_read_chunks_on_s3_reads_shards_paths_and_folders(s3: S3Server) -> None:
    prefix = s3.fresh_prefix("readers")
    storage = {"endpoint_url": s3.endpoint_url}
    for n in range(3):
        s3.put(f"{prefix}/in/images/é {n}.png", numbered_png(n))
    images = [{"bytes": None, "path": path} for path in ("images/é 1.png", "images/9.png", "images/é 2.png")]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": pa.array(images, IMAGE_STRUCT)}), sink)
    s3.put(f"{prefix}/in/a.parquet", sink.getvalue().to_pybytes())
    job = make_job(f"{prefix}/in/", f"{prefix}/out", storage=storage)
    assert numbers_of(tasks_of(job)) == [1, "image_missing", 2]
    job = make_job(f"{prefix}/in/", f"{prefix}/out", storage=storage, input={"format": "images"})
    tasks = tasks_of(job)
    assert [task.sample_id for task in tasks] == [f"images/é {n}.png" for n in range(3)]
    assert numbers_of(tasks) == [0, 1, 2]


def test_sample_error_of_a_task_is_the_decoders_own(tmp_path: Path) -> None:
    (task,) = tasks_of(job_over(tmp_path, pa.table({"image": [b"no image"]})))
    assert isinstance(task.error, SampleError)
    assert "b'no image'" in task.error.message


@pytest.mark.parametrize("opened", [True, False])
def test_read_chunks_images_by_url_are_fetched_where_the_network_is_opened(tmp_path: Path, opened: bool) -> None:
    make_folder(tmp_path, {f"{n}.png": numbered_png(n) for n in range(3)})
    handler = partial(SilentHandler, directory=str(tmp_path / "in"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        site = f"http://127.0.0.1:{server.server_port}"
        lines = [{"id": n, "image": f"{site}/{n}.png?key=secret"} for n in (*range(3), 9)]
        (tmp_path / "urls.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        http = {"allow_networks": ["127.0.0.0/8"]} if opened else {}
        tasks = tasks_of(make_job(tmp_path / "urls.jsonl", tmp_path / "out", http=http))
        server.shutdown()
    assert numbers_of(tasks) == ([0, 1, 2, "http_status"] if opened else ["url_refused"] * 4)
    assert all("secret" not in task.error.message for task in tasks if task.error)


class SilentHandler(SimpleHTTPRequestHandler):
    """Files of a folder, without a line for each request."""

    def log_message(self, *args: Any) -> None:
        """Nothing."""
