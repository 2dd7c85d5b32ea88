"""What each input format makes of its files: which format it is, where images are, what a sample's columns are.

Covers names and first bytes, where images are, side-cars, columns of each format, and how row groups are cut.
Not covered: damage (`test_broken_shards`), selections and kept columns (`test_selection`).
"""

import base64
import gzip
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import SampleError, SpecError
from pipeline.formats.contract import ImageRef
from pipeline.formats.parquet import cut_row_groups
from pipeline.formats.sources import to_source, to_sources
from pipeline.images import open_prepared
from pipeline.listing import choose_format
from pipeline.plan import make_plan
from pipeline.records import Task
from pipeline.spec import JobSpec
from tests.builders import IMAGE_STRUCT, encode, image_table, make_job, number_of, numbered_png, write_shard
from tests.layouts import tar_bytes
from tests.reading import numbers_of, tasks_of, text_of
from tests.s3_server import S3Server

Files = Mapping[str, bytes]


def write_files(folder: Path, files: Files) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def ask(template: str) -> list[dict[str, str]]:
    return [{"id": "p", "template": template}]


def images_of(task: Task) -> list[int]:
    """The numbers that all images of a task show."""
    return [number_of(open_prepared(image).tobytes()) for image in task.images]


def jsonl_bytes(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


# Which format it is.


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("a.parquet", "parquet"),
        ("a.PQ", "parquet"),
        ("v1.0.tar", "webdataset"),
        ("a.TAR.GZ b.tgz", "webdataset"),
        ("a.jsonl", "jsonl"),
        ("a.ndjson.zst b.JSONL.GZ", "jsonl"),
        ("a.jpg b.webp", "images"),
        ("a.parquet 1.png 2.png 3.png", "parquet"),
        ("m.jsonl p/1.png p/2.png", "jsonl"),
        ("a.tar a.idx a.json 1.png", "webdataset"),
        ("a.jpg a.txt a.json", "images"),
        ("a.parquet .b.tar _c.jsonl README.md", "parquet"),
        ("a.jpg b.zip b.gz", "images"),
    ],
)
def test_auto_goes_by_the_names_of_files(tmp_path: Path, names: str, expected: str) -> None:
    write_files(tmp_path, dict.fromkeys(names.split(), b""))
    files, decided = choose_format(make_job(tmp_path, "/nowhere/out"))
    assert (files.name, files.any_ending) == (expected, False)
    assert decided is not None


@pytest.mark.parametrize("names", ["a.parquet b.tar", "a.jsonl b.tgz", "a.pq b.jsonl.gz c.png", "x/a.tar y/b.ndjson"])
def test_auto_two_formats_side_by_side_are_refused_and_named(tmp_path: Path, names: str) -> None:
    write_files(tmp_path, dict.fromkeys(names.split(), b""))
    with pytest.raises(
        SpecError, match=r"^input\.format: the input holds 1 files of \w+ and 1 files of \w+; say which"
    ):
        make_plan(make_job(tmp_path, "/nowhere/out"))


@pytest.mark.parametrize("section", [{"url": "in/*.parquet"}, {"format": "parquet"}, {"url": "in/a.parquet"}])
def test_auto_two_formats_side_by_side_one_of_them_meant_is_read(tmp_path: Path, section: dict[str, str]) -> None:
    write_files(tmp_path / "in", {"b.tar": tar_bytes([("1.png", numbered_png(1))])})
    write_shard(tmp_path / "in" / "a.parquet", image_table(2))
    url = str(tmp_path / section.get("url", "in"))
    job = make_job(url, tmp_path / "out", input={**section, "url": url})
    assert numbers_of(tasks_of(job)) == [0, 1]


ONE_TAR = tar_bytes([("1.png", numbered_png(1))])
ONE_ROW = jsonl_bytes({"image": "data:image/png;base64," + base64.b64encode(numbered_png(1)).decode()})
SNIFFED = {
    "parquet": ("parquet", parquet_bytes(image_table(1, first=1))),
    "tar": ("webdataset", ONE_TAR),
    "tar in gzip": ("webdataset", gzip.compress(ONE_TAR)),
    "jsonl": ("jsonl", ONE_ROW),
    "jsonl behind blanks": ("jsonl", b"\xef\xbb\xbf\r\n " + ONE_ROW),
    "jsonl in gzip": ("jsonl", gzip.compress(ONE_ROW)),
    "jsonl in zstd": ("jsonl", zstd(ONE_ROW)),
    "image": ("images", numbered_png(1)),
}


@pytest.mark.parametrize(("expected", "data"), SNIFFED.values(), ids=SNIFFED.keys())
@pytest.mark.parametrize("name", ["part-00000", "part.bin", "v1.7"])
def test_auto_without_known_endings_goes_by_first_bytes_and_reads(
    tmp_path: Path, name: str, expected: str, data: bytes
) -> None:
    write_files(tmp_path / "in", {name: data, f"_{name}": b"passed over"})
    for url in (tmp_path / "in", tmp_path / "in" / name):
        job = make_job(url, tmp_path / "out")
        files, _ = choose_format(job)
        assert (files.name, files.any_ending) == (expected, True)
        assert 1 in numbers_of(tasks_of(job))


@pytest.mark.parametrize(
    "data", [b"", b"words", b"[1, 2]\n", b"%PDF-1.7", b"\x1f\x8b broken", b"\x28\xb5\x2f\xfdbroken"]
)
def test_auto_of_bytes_that_say_nothing_is_refused(tmp_path: Path, data: bytes) -> None:
    write_files(tmp_path, {"a": data, "b.txt": data})
    with pytest.raises(SpecError, match=r"^input\.url: no file at .* is Parquet, a tar, JSONL or an image"):
        make_plan(make_job(tmp_path, "/nowhere/out"))


def test_auto_tar_in_zstd_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.tar.zst": zstd(ONE_TAR)})
    with pytest.raises(SpecError, match=r"^input\.url: "):
        make_plan(make_job(tmp_path, "/nowhere/out"))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.tar", gzip.compress(ONE_TAR)),
        ("a.tar.gz", ONE_TAR),
        ("a.jsonl", gzip.compress(ONE_ROW)),
        ("a.jsonl", zstd(ONE_ROW)),
        ("a.jsonl.gz", ONE_ROW),
        ("a.jsonl.zst", gzip.compress(ONE_ROW)),
    ],
)
def test_compression_is_what_the_bytes_are_whatever_the_name(tmp_path: Path, name: str, data: bytes) -> None:
    write_files(tmp_path / "in", {name: data})
    assert numbers_of(tasks_of(make_job(tmp_path / "in", tmp_path / "out"))) == [1]


# Where images are.

DISK, BUCKET = "/data/set/m.jsonl", "s3://b/set/m.jsonl"
REFUSED, INVALID = "image_path_refused", "image_name_invalid"


@pytest.mark.parametrize(
    ("name", "on_disk", "in_bucket"),
    [
        ("1.png", "/data/set/1.png", "s3://b/set/1.png"),
        ("p/1.png", "/data/set/p/1.png", "s3://b/set/p/1.png"),
        ("./p/../1.png", "/data/set/1.png", "s3://b/set/1.png"),
        ("../1.png", "/data/1.png", "s3://b/1.png"),
        ("../../1.png", "/1.png", REFUSED),
        ("../../../b/1.png", "/b/1.png", REFUSED),
        ("p//1.png", "/data/set/p/1.png", "s3://b/set/p//1.png"),
        ("a%20b c?d#é.png", "/data/set/a%20b c?d#é.png", "s3://b/set/a%20b c?d#é.png"),
        ("12:30/c.png", "/data/set/12:30/c.png", "s3://b/set/12:30/c.png"),
        ("http:x.png", "/data/set/http:x.png", "s3://b/set/http:x.png"),
        ("a/http://x", "/data/set/a/http:/x", "s3://b/set/a/http://x"),
        ("~/1.png", "/data/set/~/1.png", "s3://b/set/~/1.png"),
        ("/x/../y/1.png", "/y/1.png", REFUSED),
        ("file:///y/1.png", "/y/1.png", REFUSED),
        ("FILE:/y/1.png", "/y/1.png", REFUSED),
        ("s3://c/x/1.png", "s3://c/x/1.png", "s3://c/x/1.png"),
        ("S3://c/x/1.png", "s3://c/x/1.png", "s3://c/x/1.png"),
        ("s3://c/x/./../1.png", "s3://c/1.png", "s3://c/1.png"),
        ("s3://c/../1.png", REFUSED, REFUSED),
        ("s3://c", INVALID, INVALID),
        ("s3://", INVALID, INVALID),
        ("s3:///x", INVALID, INVALID),
        ("s3://b b/x", INVALID, INVALID),
        ("s3://c/a\nb", INVALID, INVALID),
        ("s3://c/\ud800", INVALID, INVALID),
        ("s3://c/" + "x" * 1025, INVALID, INVALID),
        ("https://h/1.png?key=1", "https://h/1.png?key=1", "https://h/1.png?key=1"),
        ("HTTP://h/1.png", "HTTP://h/1.png", "HTTP://h/1.png"),
        ("gs://b/1.png", REFUSED, REFUSED),
        ("hdfs://b/1.png", REFUSED, REFUSED),
        ("", None, None),
    ],
)
def test_to_source_name_is_seen_from_its_shard(name: str, on_disk: str | None, in_bucket: str | None) -> None:
    for shard_url, expected in ((DISK, on_disk), (BUCKET, in_bucket)):
        source = to_source(name, shard_url)
        if isinstance(source, SampleError):
            assert (source.error_type, shard_url) == (expected, shard_url)
        else:
            assert source == (None if expected is None else ImageRef(expected))


@pytest.mark.parametrize("name", ["ftp://me:secret@h/1.png", "ftp://h/1.png?key=secret", "s3://me:secret@b/?secret"])
def test_to_source_refusal_shows_no_secret(name: str) -> None:
    source = to_source(name, DISK)
    assert isinstance(source, SampleError)
    assert "secret" not in source.message
    assert name[:4] in source.message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"x", b"x"),
        (bytearray(b"x"), b"x"),
        (b"", b""),
        (None, None),
        ({"bytes": b"x", "path": "1.png"}, b"x"),
        ({"bytes": b"", "path": "1.png"}, b""),
        ({"bytes": None, "path": "1.png"}, ImageRef("/data/set/1.png")),
        ({"path": "1.png"}, ImageRef("/data/set/1.png")),
        ({"bytes": None, "path": None}, None),
        ({}, None),
        ("data:image/png;base64,eA==", b"x"),
        ("DATA:;base64,eA==", b"x"),
        ("data:image/png;base64,", b""),
        ("data:image/png;base64,e", INVALID),
        ("data:image/png;base64,é", INVALID),
        ("data:image/png;base64", INVALID),
        ("data:image/png,x", INVALID),
        ("data:", INVALID),
        (5, INVALID),
        (True, INVALID),
        ({"path": ["1.png"]}, INVALID),
        ([b"x"], INVALID),
    ],
)
def test_to_source_value_is_bytes_a_name_or_nothing(value: Any, expected: Any) -> None:
    source = to_source(value, DISK)
    assert (source.error_type if isinstance(source, SampleError) else source) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([b"x", "1.png"], (b"x", ImageRef("/data/set/1.png"))),
        ([[b"x", None], b"y", []], (b"x", None, b"y")),
        ([None], (None,)),
        ([[]], (None,)),
        ([[], []], (None,)),
    ],
)
def test_to_sources_lists_and_columns_stay_in_order_and_none_is_never_no_image(
    values: list[Any], expected: tuple[Any, ...]
) -> None:
    assert to_sources(values, DISK) == expected


def test_names_that_a_bucket_refuses_harm_their_own_row_alone(s3: S3Server) -> None:
    """Such a request is answered as one with bad credentials is, which would stop the job."""
    prefix = s3.fresh_prefix("names")
    names = ["1.png", "\0", "s3://", "s3://a b/x", "x" * 1100, "\ud800", "../in/1.png", "p//2.png", "../../../../x"]
    s3.put(f"{prefix}/in/m.jsonl", jsonl_bytes(*({"image": name} for name in names)))
    s3.put(f"{prefix}/in/1.png", numbered_png(1))
    s3.put(f"{prefix}/in/p//2.png", numbered_png(2))
    storage = {"endpoint_url": s3.endpoint_url}
    job = make_job(f"{prefix}/in/", f"{prefix}/out", storage=storage, input={"format": "jsonl"})
    assert numbers_of(tasks_of(job)) == [1, *[INVALID] * 5, 1, 2, REFUSED]


# Side-cars of loose images.


def test_side_cars_belong_by_name_and_are_columns(tmp_path: Path) -> None:
    files = {
        "a.jpg.txt": b"of a.jpg",
        "a-b.json": b'{"caption": "dash", "id": "no", "path": "no", "txt": "no"}',
        "ab.txt": b"caf\xe9",
        "d/a.json": b"[1, 2]",
        "e.txt": b"of no image",
        "f.k.txt": b"behind a folder",
    }
    pictures = ["a.jpg", "a-b.png", "ab.png", "d/a.png", "f.j.png", "f.k.png", "f.k.q/x.png", "g.png"]
    write_files(tmp_path / "in", {**files, **{name: numbered_png(n) for n, name in enumerate(pictures)}})
    prompts = ask(
        "{{ path }} {{ id }}: {{ txt | default('-') }} {{ caption | default('-') }} {{ json | default('-') }}"
    )
    tasks = tasks_of(make_job(tmp_path / "in", tmp_path / "out", prompts=prompts))
    assert {task.sample_id: text_of(task) for task in tasks} == {
        "a.jpg": "a.jpg a.jpg: of a.jpg - -",
        "a-b.png": "a-b.png a-b.png: no dash " + str(json.loads(files["a-b.json"])),
        "ab.png": "ab.png ab.png: caf\ufffd - -",
        "d/a.png": "d/a.png d/a.png: - - [1, 2]",
        "f.j.png": "f.j.png f.j.png: - - -",
        "f.k.q/x.png": "f.k.q/x.png f.k.q/x.png: - - -",
        "f.k.png": "f.k.png f.k.png: behind a folder - -",
        "g.png": "g.png g.png: - - -",
    }
    assert {task.sample_id: number for task, number in zip(tasks, numbers_of(tasks), strict=True)} == {
        name: n for n, name in enumerate(pictures)
    }


def test_side_car_of_one_stem_serves_all_its_images_and_both_kinds_join(tmp_path: Path) -> None:
    pictures = {"a.jpg": numbered_png(1), "a.png": numbered_png(2)}
    write_files(tmp_path / "in", {**pictures, "a.txt": b"words", "a.png.json": b'{"n": 7}'})
    job = make_job(tmp_path / "in", tmp_path / "out", prompts=ask("{{ txt }} {{ n | default(0) }}"))
    assert [text_of(task) for task in tasks_of(job)] == ["words 0", "words 7"]


@pytest.mark.parametrize("broken", [b"", b"{", b'{"n": 1e}', b"\xff\xff", b'{"n": ' + b"9" * 5000 + b"}", b"[" * 5000])
@pytest.mark.parametrize("first", ["a", "c"])
def test_side_car_that_is_no_json_is_its_rows_error_alone(tmp_path: Path, broken: bytes, first: str) -> None:
    write_files(tmp_path / "in", {f"{name}.png": numbered_png(n) for n, name in enumerate("abc")})
    write_files(tmp_path / "in", {f"{name}.json": b'{"n": 1}' for name in "abc"})
    write_files(tmp_path / "in", {f"{first}.json": broken})
    job = make_job(tmp_path / "in", tmp_path / "out", prompts=ask("{{ n }}"), output={"keep_columns": ["n"]})
    tasks = {task.sample_id: task for task in tasks_of(job)}
    bad = tasks.pop(f"{first}.png")
    assert bad.error is not None
    assert bad.error.error_type == "row_invalid"
    assert f"{first}.json" in bad.error.message
    assert [text_of(task) for task in tasks.values()] == ["1", "1"]


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_side_car_that_is_not_what_the_plan_saw_is_its_rows_error(tmp_path: Path, change: str) -> None:
    write_files(tmp_path / "in", {"a.png": numbered_png(1), "b.png": numbered_png(2), "a.txt": b"a", "b.txt": b"b"})
    job = make_job(tmp_path / "in", tmp_path / "out", prompts=ask("{{ txt }}"))
    plan = make_plan(job)
    (tmp_path / "in" / "a.txt").unlink()
    if change == "replaced":
        (tmp_path / "in" / "a.txt").write_bytes(b"others")
    assert numbers_of(tasks_of(job, plan)) == ["row_unreadable", 2]


def test_side_car_changes_the_name_of_its_chunk(tmp_path: Path) -> None:
    """Its words are part of what is asked."""
    write_files(tmp_path / "in", {"a.png": numbered_png(1)})
    ids = set()
    for words in (None, b"one", b"others"):
        write_files(tmp_path / "in", {} if words is None else {"a.txt": words})
        ids.add(make_plan(make_job(tmp_path / "in", tmp_path / "out")).chunks[0].chunk_id)
    assert len(ids) == 3


# Tars.


def tar_job(folder: Path, members: list[tuple[str, bytes]], **sections: Any) -> JobSpec:
    write_files(folder / "in", {"a.tar": tar_bytes(members)})
    return make_job(folder / "in", folder / "out", **sections)


def sample(key: str, **members: bytes) -> list[tuple[str, bytes]]:
    return [(f"{key}.{extension.replace('_', '.')}", data) for extension, data in members.items()]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, [[1, 2], [4, 3]]),
        ({"image": "image"}, [[1, 2], [4, 3]]),
        ({"image": "right.png"}, [[1], [3]]),
        ({"image": ["left.PNG", "right.png"]}, [[2, 1], [4, 3]]),
        ({"image": ["right.png", "left.png"]}, [[1, 2], [3, 4]]),
    ],
)
def test_tar_images_come_in_the_order_of_the_tar_or_of_the_spec(
    tmp_path: Path, columns: dict[str, Any], expected: list[list[int]]
) -> None:
    members = [
        *sample("d/x", right_png=numbered_png(1), txt=b"-", left_png=numbered_png(2)),
        *sample("d/y", LEFT_PNG=numbered_png(4), right_png=numbered_png(3)),
    ]
    tasks = tasks_of(tar_job(tmp_path, members, input={"columns": columns}))
    assert [task.sample_id for task in tasks] == ["d/x", "d/y"]
    assert [images_of(task) for task in tasks] == expected


def test_tar_sample_that_lacks_an_image_is_never_asked_with_fewer(tmp_path: Path) -> None:
    members = [
        *sample("a", left_png=numbered_png(1), right_png=numbered_png(2)),
        *sample("b", left_png=numbered_png(3)),
        *sample("c", txt=b"no image at all"),
    ]
    both = tar_job(tmp_path, members, input={"columns": {"image": ["left.png", "right.png"]}})
    assert numbers_of(tasks_of(both)) == [1, "image_missing", "image_missing"]
    assert numbers_of(tasks_of(tar_job(tmp_path, members))) == [1, 3, "image_missing"]


def test_tar_columns_are_key_texts_and_fields_of_json(tmp_path: Path) -> None:
    facts = json.dumps({"caption": "of json", "n": 7, "key": "not this", "txt": "nor this"}).encode()
    members = [
        *sample("a", png=numbered_png(1), txt=b"words", cls=b"3", json=facts),
        *sample("b", png=numbered_png(2), txt=b"caf\xe9", cls=b"", seg_json=b'["in a list"]', n=b"unused"),
    ]
    template = (
        "{{ key }}|{{ txt }}|{{ cls }}|{{ caption | default('-') }}|{{ n | default('-') }}|{{ json | default('-') }}"
    )
    tasks = tasks_of(tar_job(tmp_path, members, prompts=ask(template)))
    assert [text_of(task) for task in tasks] == [f"a|words|3|of json|7|{json.loads(facts)}", "b|caf\ufffd||-|-|-"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, ["x/a", "x/b", "x/c"]),
        ({"id": "name"}, ["one", "x/b", "7"]),
        ({"id": "key"}, ["x/a", "x/b", "x/c"]),
        ({"id": None}, ["{shard}#0", "{shard}#1", "{shard}#2"]),
    ],
)
def test_tar_sample_id_is_the_key_or_a_named_column_or_a_number(
    tmp_path: Path, columns: dict[str, Any], expected: list[str]
) -> None:
    members = [
        *sample("x/a", png=numbered_png(1), json=b'{"name": "one", "id": "unused"}'),
        *sample("x/b", png=numbered_png(2), json=b'{"name": null}'),
        *sample("x/c", png=numbered_png(3), json=b'{"name": 7}'),
    ]
    job = tar_job(tmp_path, members, input={"columns": columns})
    shard = str(tmp_path / "in" / "a.tar")
    assert [task.sample_id for task in tasks_of(job)] == [one.format(shard=shard) for one in expected]


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_tar_bad_json_is_its_rows_error_alone(tmp_path: Path, bad: int) -> None:
    members = []
    for n in range(3):
        members += sample(f"k{n}", png=numbered_png(n), json=b"{" if n == bad else b'{"n": 1}')
    tasks = tasks_of(tar_job(tmp_path, members, prompts=ask("{{ n }}"), output={"keep_columns": ["n"]}))
    assert numbers_of(tasks) == ["row_invalid" if n == bad else n for n in range(3)]
    assert [task.sample_id for task in tasks] == ["k0", "k1", "k2"]


def test_tar_image_above_the_limit_is_its_rows_error(tmp_path: Path) -> None:
    large = encode_noise()
    members = [*sample("a", png=numbered_png(1)), *sample("b", png=large), *sample("c", png=numbered_png(3))]
    job = tar_job(tmp_path, members, limits={"max_image_bytes": len(large) - 1})
    assert numbers_of(tasks_of(job)) == [1, "image_too_many_bytes", 3]


def encode_noise() -> bytes:
    """An image of a good kilobyte."""
    return encode(Image.frombytes("RGB", (20, 20), random.Random(1).randbytes(1200)))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"input": {"columns": {"image": "jpg"}}},
            r"^input\.columns\.image: none of the first 2 samples of .* has jpg; ",
        ),
        ({"prompts": ask("{{ caption }}")}, r"^prompts\.p: .*their columns are key, txt\.$"),
        ({"output": {"keep_columns": ["caption"]}}, r"^output\.keep_columns: .*'caption'; they have key, txt\.$"),
        ({"input": {"where": [["n", ">", 1]]}}, r"^input\.where: .* has a column 'n'; they have key, txt\.$"),
    ],
)
def test_tar_column_that_no_sample_has_is_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    members = [*sample("a", png=numbered_png(1), txt=b"x"), *sample("b", png=numbered_png(2), txt=b"x")]
    with pytest.raises(SpecError, match=message):
        make_plan(tar_job(tmp_path, members, **sections))


# Columns of JSONL and Parquet.


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("1.png", [1]),
        ({"path": "2.png"}, [2]),
        ({"bytes": None, "path": "2.png"}, [2]),
        (["1.png", {"path": "2.png"}, "1.png"], [1, 2, 1]),
        (None, "image_null"),
        ([], "image_null"),
        (["1.png", None], "image_null"),
        (["1.png", ["2.png"]], INVALID),
        ({"bytes": 5}, INVALID),
        (7, INVALID),
    ],
)
def test_jsonl_image_is_a_name_an_object_or_a_list(tmp_path: Path, image: Any, expected: Any) -> None:
    write_files(tmp_path / "in", {f"{n}.png": numbered_png(n) for n in (1, 2)})
    write_files(tmp_path / "in", {"m.jsonl": jsonl_bytes({"id": "x", "image": image})})
    (task,) = tasks_of(make_job(tmp_path / "in", tmp_path / "out"))
    assert (task.error.error_type if task.error else images_of(task)) == expected


def test_jsonl_several_columns_of_images_come_in_the_order_of_the_spec(tmp_path: Path) -> None:
    write_files(tmp_path / "in", {f"{n}.png": numbered_png(n) for n in range(4)})
    rows = [{"b": "1.png", "a": ["2.png", "3.png"]}, {"a": "0.png"}]
    write_files(tmp_path / "in", {"m.jsonl": jsonl_bytes(*rows)})
    tasks = tasks_of(make_job(tmp_path / "in", tmp_path / "out", input={"columns": {"image": ["a", "b"]}}))
    assert images_of(tasks[0]) == [2, 3, 1]
    assert numbers_of(tasks[1:]) == ["image_null"]


A, B = numbered_png(1), numbered_png(2)
BYTES, URL = pa.array([[A, B]] * 2), pa.array([["1.png", "2.png"]] * 2)
STRUCTS = pa.array([[{"bytes": A, "path": None}, {"bytes": None, "path": "2.png"}]] * 2, pa.list_(IMAGE_STRUCT))
IMAGE_COLUMNS = {
    "binary": (pa.array([A, B]), [[1], [2]]),
    "large_binary": (pa.array([A, B], pa.large_binary()), [[1], [2]]),
    "fixed_size_binary": (pa.array([A, B], pa.binary(len(A))), [[1], [2]]),
    "binary_view": (pa.array([A, B], pa.binary_view()), [[1], [2]]),
    "dictionary of bytes": (pa.array([A, B]).dictionary_encode(), [[1], [2]]),
    "string": (pa.array(["1.png", "2.png"]), [[1], [2]]),
    "large_string": (pa.array(["1.png", "2.png"], pa.large_string()), [[1], [2]]),
    "string_view": (pa.array(["1.png", "2.png"], pa.string_view()), [[1], [2]]),
    "dictionary of names": (pa.array(["2.png", "2.png"]).dictionary_encode(), [[2], [2]]),
    "struct": (pa.array([{"bytes": A, "path": "no.png"}, {"bytes": None, "path": "2.png"}], IMAGE_STRUCT), [[1], [2]]),
    "struct of path": (pa.array([{"path": "1.png"}, {"path": "2.png"}]), [[1], [2]]),
    "struct of bytes": (pa.array([{"bytes": A}, {"bytes": B}]), [[1], [2]]),
    "list of bytes": (BYTES, [[1, 2]] * 2),
    "large_list": (BYTES.cast(pa.large_list(pa.binary())), [[1, 2]] * 2),
    "fixed_size_list": (BYTES.cast(pa.list_(pa.binary(), 2)), [[1, 2]] * 2),
    "list_view": (pa.array([[A, B]] * 2, pa.list_view(pa.binary())), [[1, 2]] * 2),
    "list of names": (URL, [[1, 2]] * 2),
    "list of dictionary": (
        pa.array([["1.png"], ["2.png"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        [[1], [2]],
    ),
    "list of structs": (STRUCTS, [[1, 2]] * 2),
}


@pytest.mark.parametrize(("column", "expected"), IMAGE_COLUMNS.values(), ids=IMAGE_COLUMNS.keys())
def test_parquet_image_column_of_every_kind_is_read(
    tmp_path: Path, column: pa.Array, expected: list[list[int]]
) -> None:
    write_files(tmp_path / "in", {"1.png": A, "2.png": B})
    write_shard(tmp_path / "in" / "a.parquet", pa.table({"image": column}))
    tasks = tasks_of(make_job(tmp_path / "in", tmp_path / "out"))
    assert [images_of(task) for task in tasks] == expected


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[[A]]]),
        pa.array([[1, 2]]),
        pa.array([True]),
        pa.array([{"url": "1.png"}]),
        pa.array([1]).dictionary_encode(),
        pa.nulls(1),
    ],
    ids=lambda column: str(column.type),
)
def test_parquet_column_that_holds_no_images_is_refused(tmp_path: Path, column: pa.Array) -> None:
    write_shard(tmp_path / "a.parquet", pa.table({"image": column}))
    with pytest.raises(SpecError, match=r"^input\.columns\.image: column 'image' of "):
        make_plan(make_job(tmp_path, "/nowhere/out"))


def test_parquet_several_columns_of_images_come_in_the_order_of_the_spec(tmp_path: Path) -> None:
    table = pa.table({"b": [A, A], "more": pa.array([[B], []]), "image": [B, None]})
    write_shard(tmp_path / "in" / "a.parquet", table)
    job = make_job(tmp_path / "in", tmp_path / "out", input={"columns": {"image": ["more", "b"]}})
    assert [images_of(task) for task in tasks_of(job)] == [[2, 1], [1]]
    job = make_job(tmp_path / "in", tmp_path / "out", input={"columns": {"image": ["b", "image"]}})
    assert [task.error.error_type if task.error else images_of(task) for task in tasks_of(job)] == [
        [1, 2],
        "image_null",
    ]


@pytest.mark.parametrize("name", ["0.parquet", "2.parquet"])
def test_parquet_shard_without_rows_decides_nothing(tmp_path: Path, name: str) -> None:
    """Writers do not know the types of columns that have no value."""
    write_shard(tmp_path / "in" / name, pa.table({"id": pa.nulls(0), "image": pa.nulls(0), "n": pa.nulls(0)}))
    write_shard(tmp_path / "in" / "1.parquet", image_table(2, n=[1, 2]))
    sections = {"output": {"keep_columns": ["n"]}, "input": {"where": [["n", ">", 1]]}}
    assert numbers_of(tasks_of(make_job(tmp_path / "in", tmp_path / "out", **sections))) == [1]


BAD_TEXT = pa.array([b"1.png", b"\xff", b"1.png"]).view(pa.string())


@pytest.mark.parametrize(
    ("columns", "sections"),
    [
        ({"id": BAD_TEXT}, {}),
        ({"q": BAD_TEXT}, {"prompts": ask("{{ q }}")}),
        ({"q": BAD_TEXT}, {"output": {"keep_columns": ["q"]}}),
        ({"q": BAD_TEXT.dictionary_encode()}, {"prompts": ask("{{ q }}")}),
        ({"image": BAD_TEXT}, {}),
        ({"q": pa.array([1, 2**60, 3], pa.timestamp("ms"))}, {"prompts": ask("{{ q }}")}),
        ({"q": pa.array([1, 2**60, 3], pa.duration("s"))}, {"prompts": ask("{{ q }}")}),
    ],
    ids=["id", "prompt", "kept", "dictionary", "image", "timestamp", "duration"],
)
def test_parquet_value_that_cannot_be_read_is_its_rows_error_alone(
    tmp_path: Path, columns: dict[str, pa.Array], sections: dict[str, Any]
) -> None:
    write_files(tmp_path / "in", {"1.png": A})
    shard = write_shard(tmp_path / "in" / "a.parquet", pa.table({"image": [A] * 3, **columns}))
    tasks = tasks_of(make_job(tmp_path / "in", tmp_path / "out", **sections))
    assert numbers_of(tasks) == [1, "row_invalid", 1]
    assert tasks[1].sample_id == f"{shard}#1"


@pytest.mark.parametrize("name", ["id", "image", "q", "n"])
def test_parquet_two_columns_of_one_name_are_refused_where_the_name_is_used(tmp_path: Path, name: str) -> None:
    names = ["id", "image", "q", "n", "unused", "unused", name]
    table = pa.Table.from_arrays([pa.array([A])] * len(names), names)
    write_shard(tmp_path / "a.parquet", table)
    job = make_job(tmp_path, "/nowhere/out", prompts=ask("{{ q }}"), output={"keep_columns": ["n"]})
    with pytest.raises(SpecError, match=f"has several columns '{name}'"):
        make_plan(job)


@pytest.mark.parametrize("seed", range(40))
def test_cut_row_groups_covers_each_row_once_by_whole_groups_or_pieces_of_one(seed: int) -> None:
    rng = random.Random(seed)
    chunk_rows = rng.randint(1, 12)
    sizes = [rng.choice([0, 1, rng.randint(0, 40), chunk_rows, chunk_rows + 1]) for _ in range(rng.randint(0, 20))]
    starts = [sum(sizes[:group]) for group in range(len(sizes) + 1)]
    row = 0
    for start, stop, anchor, groups in cut_row_groups(sizes, chunk_rows):
        assert start == row < stop <= start + chunk_rows
        assert anchor.sample == starts[anchor.position] <= start
        assert anchor.position == groups[0]
        first, last = starts[groups[0]], starts[groups[-1] + 1]
        if (start, stop) != (first, last):  # a piece, of a row group that is larger than a chunk
            assert len([group for group in groups if sizes[group]]) == 1
            assert first <= start < stop <= last
            assert last - first > chunk_rows
        row = stop
    assert row == sum(sizes)
