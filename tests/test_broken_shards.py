"""One broken shard among five: what can be read is answered, the rest is reported, nothing is counted or read twice.

Every way of breaking goes through the readers, and some through whole jobs, which end the same when run again.
Not covered: every byte at which a tar or a compressed file may break (`test_tar`, `test_jsonlines`).
"""

import base64
import gzip
import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.batch import run_batch
from pipeline.errors import JobError, SpecError
from pipeline.plan import Plan, make_plan
from pipeline.records import Anchor, FailedShard, ReadChunk, Task, Work
from pipeline.spec import JobSpec
from tests.builders import encode, image_table, make_job, numbered_png
from tests.layouts import tar_bytes
from tests.reading import numbers_of, read_all, try_all
from tests.running import read_output
from tests.s3_server import S3Server

NUM_SHARDS, ROWS = 5, 10
CHUNK_ROWS = 4
SAMPLE_BYTES = 2048
"""Of a sample in these tars: two headers, two files of less than a block."""


def tar_shard(first: int) -> bytes:
    members = [
        (f"row-{n:03d}.{end}", data)
        for n in range(first, first + ROWS)
        for end, data in (("png", numbered_png(n)), ("json", b'{"fact": 1}'))
    ]
    return tar_bytes(members)


def noisy_tar_shard(first: int) -> bytes:
    """Samples of 60 kB that do not shrink, so that a cut of the gzip leaves some whole."""
    members = []
    for n in range(first, first + ROWS):
        pixels = bytes((n // 256, n % 256, 7)) + random.Random(n).randbytes(60_000 - 3)
        members.append((f"row-{n:03d}.png", encode(Image.frombytes("RGB", (200, 100), pixels))))
    return gzip.compress(tar_bytes(members))


def jsonl_shard(first: int) -> bytes:
    lines = []
    for n in range(first, first + ROWS):
        image = "data:;base64," + base64.b64encode(numbered_png(n)).decode()
        lines.append(json.dumps({"id": f"row-{n:03d}", "image": image}).encode() + b"\n")
    return b"".join(lines)


def jsonl_gz_shard(first: int) -> bytes:
    return gzip.compress(jsonl_shard(first))


def jsonl_zst_shard(first: int) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(jsonl_shard(first))
    return bytes(sink.getvalue())


def parquet_shard(first: int) -> bytes:
    ids = pa.array([f"row-{n:03d}" for n in range(first, first + ROWS)])
    sink = pa.BufferOutputStream()
    pq.write_table(image_table(ROWS, first).set_column(0, "id", ids), sink, row_group_size=3)
    return bytes(sink.getvalue())


WRITERS: dict[str, Callable[[int], bytes]] = {
    "tar": tar_shard,
    "tar.gz": noisy_tar_shard,
    "jsonl": jsonl_shard,
    "jsonl.gz": jsonl_gz_shard,
    "jsonl.zst": jsonl_zst_shard,
    "parquet": parquet_shard,
}


def write_shards(folder: Path, ending: str) -> list[Path]:
    """Five whole shards of ten samples, `row-000` to `row-049`; the image of each shows its number."""
    folder.mkdir(parents=True)
    shards = [folder / f"{number}.{ending}" for number in range(NUM_SHARDS)]
    for number, shard in enumerate(shards):
        shard.write_bytes(WRITERS[ending](ROWS * number))
    return shards


def cut(size: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:size]


def spoil(*places: int) -> Callable[[bytes], bytes]:
    """Wrong checksums of the headers at these places, so that they are none any more."""

    def change(data: bytes) -> bytes:
        for place in places:
            data = data[: place + 148] + b"\xff" * 8 + data[place + 156 :]
        return data

    return change


def set_line(number: int, line: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        return b"".join([*lines[:number], line + b"\n", *lines[number + 1 :]])

    return change


def spoil_page(group: int) -> Callable[[bytes], bytes]:
    """Zeros over the head of a row group's page of images."""

    def change(data: bytes) -> bytes:
        column = pq.read_metadata(pa.BufferReader(data)).row_group(group).column(1)
        start = column.dictionary_page_offset or column.data_page_offset
        return data[:start] + bytes(30) + data[start + 30 :]

    return change


def hide_page(group: int) -> Callable[[bytes], bytes]:
    """A row group's page of images as one of a kind that readers pass over: Arrow then gives no rows, and no error."""

    def change(data: bytes) -> bytes:
        start = pq.read_metadata(pa.BufferReader(data)).row_group(group).column(1).data_page_offset
        assert data[start : start + 2] == b"\x15\x00"  # the field `type` of the page's head: DATA_PAGE
        return data[: start + 1] + b"\x02" + data[start + 2 :]

    return change


def empty(data: bytes) -> bytes:
    return b""


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def headers_of(*samples: int) -> tuple[int, ...]:
    """Places of all headers of these samples in a tar."""
    return tuple(place for n in samples for place in (SAMPLE_BYTES * n, SAMPLE_BYTES * n + 1024))


DAMAGED = "shard_damaged"
ALL_BUT_5 = [0, 1, 2, 3, 4, 6, 7, 8, 9]


@dataclass(frozen=True)
class Breakage:
    """A way to break a shard: which of its samples are still whole, and the errors in the place of the others."""

    name: str
    ending: str
    change: Callable[[bytes], bytes]
    whole: Sequence[int]
    errors: Sequence[str] = (DAMAGED,)


BREAKAGES = [
    Breakage("tar cut in a file", "tar", cut(5 * SAMPLE_BYTES + 512 + 30), range(5)),
    Breakage("tar cut in a later file of a sample", "tar", cut(5 * SAMPLE_BYTES + 1536 + 5), range(5)),
    Breakage("tar cut in a header", "tar", cut(5 * SAMPLE_BYTES + 100), range(5)),
    Breakage("tar cut between samples", "tar", cut(5 * SAMPLE_BYTES), range(5)),
    Breakage("tar cut between chunks", "tar", cut(4 * SAMPLE_BYTES), range(4)),
    Breakage("tar cut between files of a sample", "tar", cut(5 * SAMPLE_BYTES + 1024), range(6)),
    Breakage("tar without its last zeros", "tar", cut(10 * SAMPLE_BYTES), range(10)),
    Breakage("tar with a broken header", "tar", spoil(5 * SAMPLE_BYTES), ALL_BUT_5, [DAMAGED, "image_missing"]),
    Breakage("tar with a broken sample", "tar", spoil(*headers_of(5)), ALL_BUT_5),
    Breakage("tar with a broken start", "tar", spoil(*headers_of(0, 1)), range(2, 10)),
    Breakage("tar with a broken end", "tar", spoil(*headers_of(8, 9)), range(8)),
    Breakage("tar with two broken places", "tar", spoil(*headers_of(1, 4, 5)), [0, 2, 3, 6, 7, 8, 9], [DAMAGED] * 2),
    Breakage("tar of nothing", "tar", empty, []),
    Breakage("tar of zeros", "tar", lambda data: bytes(10240), [], []),
    Breakage("tar of rubbish", "tar", lambda data: b"rubbish " * 640, []),
    Breakage("tar.gz of nothing", "tar.gz", empty, []),
    Breakage("tar.gz cut in its head", "tar.gz", cut(5), []),
    Breakage("jsonl with a bad line", "jsonl", set_line(5, b'{"id": '), ALL_BUT_5, ["row_invalid"]),
    Breakage("jsonl with a long line", "jsonl", set_line(5, b" " * (32 << 20) + b"{}"), ALL_BUT_5, ["row_too_long"]),
    Breakage("jsonl with a list", "jsonl", set_line(9, b"[1]"), range(9), ["row_invalid"]),
    Breakage("jsonl cut in a line", "jsonl", cut(-30), range(9), ["row_invalid"]),
    Breakage("jsonl of nothing", "jsonl", empty, [], []),
    Breakage("jsonl.gz of nothing", "jsonl.gz", empty, []),
    Breakage("jsonl.gz cut in its head", "jsonl.gz", cut(5), []),
    Breakage("jsonl.zst of nothing", "jsonl.zst", empty, []),
    Breakage("jsonl.zst cut", "jsonl.zst", half, []),
    Breakage("parquet without its footer", "parquet", cut(-20), []),
    Breakage("parquet of nothing", "parquet", empty, []),
    Breakage("parquet of rubbish", "parquet", lambda data: b"rubbish " * 64, []),
    Breakage("parquet with a hidden page", "parquet", hide_page(1), [0, 1, 2, 6, 7, 8, 9], [DAMAGED] * 3),
    Breakage("parquet with a broken page", "parquet", spoil_page(1), [0, 1, 2, 6, 7, 8, 9], [DAMAGED] * 3),
]  # fmt: skip


def job_of(folder: Path, **sections: Any) -> JobSpec:
    limits = {"max_error_rate": 1.0}
    return make_job(folder / "in", folder / "out", output={"chunk_rows": CHUNK_ROWS}, limits=limits, **sections)


def all_tasks(chunks: Sequence[ReadChunk]) -> list[Task]:
    return [task for chunk in chunks for task in chunk.tasks]


def names_of(chunks: Sequence[ReadChunk]) -> list[str]:
    return [chunk.work.chunk.chunk_id for chunk in chunks]


def outcome_of(chunks: Sequence[ReadChunk]) -> list[tuple[str, str, str]]:
    """Chunk, sample and error of each row, in an order that does not depend on who was read first."""
    return sorted(
        (chunk.work.chunk.chunk_id, task.sample_id, task.error.error_type if task.error else "")
        for chunk in chunks
        for task in chunk.tasks
    )


def check_chunks(chunks: Sequence[ReadChunk], broken: Path, whole: Sequence[int], errors: Sequence[str]) -> None:
    """`whole` are all numbers that must be answered; all errors must be of the broken shard, in this order."""
    tasks = all_tasks(chunks)
    good = [task for task in tasks if task.error is None]
    assert sorted(task.sample_id for task in good) == [f"row-{n:03d}" for n in whole]
    assert sorted(numbers_of(good), key=int) == list(whole)
    bad = [(chunk.work.chunk.shard, task) for chunk in chunks for task in chunk.tasks if task.error]
    assert [task.error.error_type for _, task in bad if task.error] == list(errors)
    for shard, task in bad:
        assert task.error is not None
        assert shard == str(broken)
        assert str(broken) in task.error.message or task.error.error_type == "image_missing"  # this names its key
    assert len({task.sample_id for task in tasks}) == len(tasks)
    assert len(set(names_of(chunks))) == len(chunks)
    assert sum(chunk.counts.num_samples for chunk in chunks) == len(tasks)


def check_again(job: JobSpec, first: Sequence[ReadChunk]) -> None:
    """A plan with surveys names the same chunks; without them, only chunks that have no part are read again."""
    plan = make_plan(job)
    assert plan.streams == ()
    assert sorted(chunk.chunk_id for chunk in plan.chunks) == sorted(names_of(first))
    assert outcome_of(read_all(job, plan)) == outcome_of(first)
    shutil.rmtree(f"{job.output.url}/_shards", ignore_errors=True)
    committed = frozenset(names_of(first)[::2])
    left = try_all(job, make_plan(job).without(committed), committed.__contains__)
    again = [chunk for chunk in left if isinstance(chunk, ReadChunk)]
    assert len(again) == len(left)
    # The last chunk of a stream has its name from the end, which its reader does not know beforehand.
    last = {chunk.work.chunk.shard: chunk.work.chunk.chunk_id for chunk in first}
    wanted = set(names_of(first)) - committed
    assert wanted <= set(names_of(again)) <= wanted | set(last.values())
    assert set(outcome_of(again)) <= set(outcome_of(first))


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.name)
def test_broken_shard_what_is_whole_is_answered_and_the_rest_reported(
    tmp_path: Path, breakage: Breakage, place: int
) -> None:
    shards = write_shards(tmp_path / "in", breakage.ending)
    shards[place].write_bytes(breakage.change(shards[place].read_bytes()))
    whole = [n for n in range(NUM_SHARDS * ROWS) if n // ROWS != place or n % ROWS in breakage.whole]
    job = job_of(tmp_path)
    chunks = read_all(job)
    check_chunks(chunks, shards[place], whole, breakage.errors)
    check_again(job, chunks)


@pytest.mark.parametrize("ending", ["tar.gz", "jsonl.gz"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_compressed_shard_that_is_cut_gives_what_stands_before_the_cut(
    tmp_path: Path, ending: str, share: float
) -> None:
    broken = write_shards(tmp_path / "in", ending)[2]
    data = broken.read_bytes()
    broken.write_bytes(data[: int(len(data) * share)])
    unpacked = zlib.decompressobj(wbits=31).decompress(broken.read_bytes())
    job = job_of(tmp_path)
    chunks = read_all(job)
    answered = [int(task.sample_id[4:]) for task in all_tasks(chunks) if task.error is None]
    ours = [n for n in answered if n // ROWS == 2]
    if ending == "jsonl.gz":
        assert len(ours) == unpacked.count(b"\n")
    else:  # what one step unpacks is lost, 131,072 bytes
        assert (len(unpacked) - 131_072) // 62_000 - 1 < len(ours) <= len(unpacked) // 60_000
    assert ours == list(range(20, 20 + len(ours)))
    check_chunks(chunks, broken, sorted(answered), [DAMAGED])
    assert len(answered) == 40 + len(ours)
    check_again(job, chunks)


@pytest.mark.parametrize("ending", WRITERS)
def test_nothing_but_broken_shards_is_refused_before_the_start(tmp_path: Path, ending: str) -> None:
    for shard in write_shards(tmp_path / "in", ending):
        shard.write_bytes(b"")
    with pytest.raises(SpecError, match=r"^input\.url: "):
        make_plan(job_of(tmp_path))


# Tars with an index.


def dali_index(num_samples: int = ROWS) -> bytes:
    lines = []
    for n in range(num_samples):
        start = n * SAMPLE_BYTES
        lines.append(f"png {start + 512} {len(numbered_png(n))} json {start + 1536} 11")
    return "\n".join([f"v1.1 {num_samples}", *lines]).encode() + b"\n"


def energon_index(num_samples: int = ROWS) -> bytes:
    return struct.pack(f"<{num_samples + 1}Q", *(n * SAMPLE_BYTES for n in range(num_samples + 1)))


def write_indexes(shards: Sequence[Path]) -> None:
    """Of both kinds, under both names."""
    for number, shard in enumerate(shards):
        name = shard.with_suffix(".idx") if number % 2 else Path(f"{shard}.idx")
        name.write_bytes(dali_index() if number % 2 else energon_index())


INDEXED = [
    Breakage("one sample", "tar", spoil(*headers_of(6)), [0, 1, 2, 3, 4, 5, 7, 8, 9]),
    Breakage("two of a chunk", "tar", spoil(*headers_of(5, 6)), [0, 1, 2, 3, 4, 7, 8, 9], [DAMAGED] * 2),
    Breakage("an end and a start of chunks", "tar", spoil(*headers_of(7, 8)), [0, 1, 2, 3, 4, 5, 6, 9], [DAMAGED] * 2),
    Breakage("all of a chunk but its start", "tar", spoil(*headers_of(1, 2, 3)), [0, 4, 5, 6, 7, 8, 9], [DAMAGED] * 3),
    Breakage("half a sample", "tar", spoil(6 * SAMPLE_BYTES), [0, 1, 2, 3, 4, 5, 7, 8, 9], [DAMAGED, "image_missing"]),
    Breakage("the last zeros", "tar", cut(10 * SAMPLE_BYTES), range(10)),
]  # fmt: skip


@pytest.mark.parametrize("place", [2, 3])
@pytest.mark.parametrize("breakage", INDEXED, ids=lambda breakage: breakage.name)
def test_indexed_tar_samples_that_cannot_be_read_are_error_rows(tmp_path: Path, breakage: Breakage, place: int) -> None:
    shards = write_shards(tmp_path / "in", "tar")
    write_indexes(shards)
    shards[place].write_bytes(breakage.change(shards[place].read_bytes()))
    job = job_of(tmp_path)
    plan = make_plan(job)
    assert plan.streams == ()
    assert plan.num_samples == NUM_SHARDS * ROWS
    chunks = read_all(job, plan)
    whole = [n for n in range(NUM_SHARDS * ROWS) if n // ROWS != place or n % ROWS in breakage.whole]
    check_chunks(chunks, shards[place], whole, breakage.errors)
    check_again(job, chunks)


@pytest.mark.parametrize(
    "index",
    [energon_index(9), dali_index(9), energon_index(11), b"", b"v1.1 2\nrubbish", b"rubbish", bytes(80)],
    ids=["short", "short text", "long", "empty", "bad text", "rubbish", "zeros"],
)
def test_index_that_does_not_fit_is_told_and_its_tar_read_as_a_stream(tmp_path: Path, index: bytes) -> None:
    shards = write_shards(tmp_path / "in", "tar")
    write_indexes(shards)
    Path(f"{shards[2]}.idx").write_bytes(index)
    job = job_of(tmp_path)
    plan = make_plan(job)
    assert [shard.url for shard in plan.streams] == [str(shards[2])]
    assert any(f"{shards[2]}.idx" in note for note in plan.notes)
    chunks = read_all(job, plan)
    check_chunks(chunks, shards[2], range(50), [])
    check_again(job, chunks)


def test_index_or_survey_or_neither_give_chunks_the_same_names(tmp_path: Path) -> None:
    """So an index that is written later changes nothing."""
    shards = write_shards(tmp_path / "in", "tar")
    job = job_of(tmp_path)
    by_stream = read_all(job)
    by_survey = read_all(job)
    write_indexes(shards)
    by_index = read_all(job)
    assert outcome_of(by_stream) == outcome_of(by_survey) == outcome_of(by_index)
    for chunks in (by_index, by_survey):  # each chunk is read from where it lies
        anchors = {(chunk.work.chunk.shard, chunk.work.chunk.anchor) for chunk in chunks}
        assert anchors == {(str(shard), Anchor(n, n * SAMPLE_BYTES)) for shard in shards for n in (0, 4, 8)}


# Shards that change between plan and read.


def delete(shard: Path) -> None:
    shard.unlink()


def replace_by_another(shard: Path) -> None:
    """Also of the same size; the time is set, for clocks of file systems may be coarse."""
    before = shard.stat().st_mtime_ns
    shard.write_bytes(WRITERS[shard.name.partition(".")[2]](100))
    os.utime(shard, ns=(before, before + 10**9))


def truncate(shard: Path) -> None:
    shard.write_bytes(half(shard.read_bytes()))


@pytest.mark.parametrize("change", [delete, replace_by_another, truncate])
@pytest.mark.parametrize("ending", ["tar", "tar indexed", "tar.gz", "jsonl", "jsonl.gz", "parquet"])
def test_shard_that_changed_since_the_plan_fails_alone_and_is_named(
    tmp_path: Path, ending: str, change: Callable[[Path], None]
) -> None:
    shards = write_shards(tmp_path / "in", ending.partition(" ")[0])
    if "indexed" in ending:
        write_indexes(shards)
    job = job_of(tmp_path)
    plan = make_plan(job)
    change(shards[2])
    made = try_all(job, plan)
    failed = [one for one in made if isinstance(one, FailedShard)]
    assert {one.shard for one in failed} == {str(shards[2])}
    assert all(str(shards[2]) in one.message for one in failed)
    others = [one for one in made if isinstance(one, ReadChunk)]
    check_chunks(others, shards[2], [*range(20), *range(30, 50)], [])
    again = read_all(job)
    answered = {task.sample_id for task in all_tasks(again) if task.error is None}
    assert {f"row-{n:03d}" for n in (*range(20), *range(30, 50))} <= answered
    assert set(names_of(others)) <= set(names_of(again))
    if change is delete:
        assert len(all_tasks(again)) == 40
    if change is replace_by_another and "indexed" not in ending:
        assert {f"row-{n:03d}" for n in range(100, 110)} <= answered


# Whole jobs.


@pytest.fixture
def ray_after_s3(s3: S3Server) -> S3Server:
    """Ray's workers have the environment of the moment when Ray started, and S3's credentials are in it."""
    return s3


def part_versions(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "out" / "data").iterdir()}


def check_output(folder: Path, whole: Sequence[int], num_errors: int) -> None:
    table = read_output(folder / "out")
    answered = [row["sample_id"] for row in table.to_pylist() if row["error_type"] is None]
    assert sorted(answered) == [f"row-{n:03d}" for n in whole]
    assert table.num_rows == len(answered) + num_errors
    assert len(set(table["sample_id"].to_pylist())) == table.num_rows


@pytest.mark.usefixtures("ray_after_s3")
@pytest.mark.parametrize(
    ("name", "indexed"),
    [
        ("tar with two broken places", False),
        ("one sample", True),
        ("jsonl.gz cut in its head", False),
        ("parquet with a broken page", False),
    ],
)
def test_job_over_a_broken_shard_ends_and_again_the_same(tmp_path: Path, name: str, indexed: bool) -> None:
    breakage = next(one for one in [*BREAKAGES, *INDEXED] if one.name == name)
    shards = write_shards(tmp_path / "in", breakage.ending)
    if indexed:
        write_indexes(shards)
    shards[2].write_bytes(breakage.change(shards[2].read_bytes()))
    whole = [n for n in range(NUM_SHARDS * ROWS) if n // ROWS != 2 or n % ROWS in breakage.whole]
    started: list[Plan] = []
    manifest = run_batch(job_of(tmp_path), on_start=lambda plan, works: started.append(plan))
    assert bool(started[0].streams) == (breakage.ending != "parquet" and not indexed)
    assert manifest.num_samples == manifest.num_rows == len(whole) + len(breakage.errors)
    assert manifest.num_errors == len(breakage.errors)
    assert manifest.errors_by_type == {DAMAGED: len(breakage.errors)}
    assert manifest.damaged_shards == [str(shards[2])]
    check_output(tmp_path, whole, len(breakage.errors))
    before = part_versions(tmp_path)
    works: list[Work] = []
    again = run_batch(job_of(tmp_path), on_start=lambda plan, due: works.extend(due))
    assert works == []
    assert again == manifest
    assert part_versions(tmp_path) == before


@pytest.mark.usefixtures("ray_after_s3")
def test_job_whose_shards_change_after_the_plan_does_all_others_names_them_and_can_go_on(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", "tar")
    changes = {0: delete, 2: truncate, 3: replace_by_another}

    def change_all(plan: Plan, works: list[Work]) -> None:
        for number, change in changes.items():
            change(shards[number])

    with pytest.raises(JobError, match=r"^3 shards could not be read; all others are done and committed\.") as failure:
        run_batch(job_of(tmp_path), on_start=change_all)
    assert all(str(shards[number]) in str(failure.value) for number in changes)
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    check_output(tmp_path, [*range(10, 20), *range(40, 50)], 0)
    before = part_versions(tmp_path)
    manifest = run_batch(job_of(tmp_path))
    whole = [*range(10, 20), *range(20, 28), *range(40, 50), *range(100, 110)]
    assert manifest.num_samples == manifest.num_rows == len(whole) + 1
    assert (manifest.num_errors, manifest.damaged_shards) == (1, [str(shards[2])])
    check_output(tmp_path, whole, 1)
    after = part_versions(tmp_path)
    assert {name: after[name] for name in before} == before
