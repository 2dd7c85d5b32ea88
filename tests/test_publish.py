"""`r4b publish`: every row once and in order, all or nothing for readers, whatever is killed.

Through the command line (in this process where nothing is killed), on a disk and on a real S3 store; parts are made by
real commits.
Not covered: ten thousand parts and their memory (benchmarks/publishing.py).
"""

import io
import json
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from jobs.publish import parse_size
from pipeline.commits import drop_parts
from pipeline.errors import JobError, ShardChangedError, SpecError
from pipeline.plan import part_url
from pipeline.publish import PublishOptions, Target, Version, publish
from pipeline.records import Chunk, read_part
from pipeline.spec import StorageSpec
from pipeline.storage import LocalStore, Store, join_url, open_store
from tests.publishing import OutputMaker, PollingReader, call, json_of, run_measured, wait_for
from tests.running import Finished, kill_tree, r4b, started_r4b
from tests.s3_server import S3Server


@dataclass(frozen=True)
class Place:
    """Where a job's output is, and where it is published to."""

    url: str
    storage: StorageSpec

    @property
    def store(self) -> Store:
        return open_store(self.url, self.storage)

    @property
    def maker(self) -> OutputMaker:
        return OutputMaker(f"{self.url}/out", self.storage)

    @property
    def target(self) -> str:
        return f"{self.url}/published"

    @property
    def options(self) -> list[str]:
        endpoint = self.storage.endpoint_url
        return [] if endpoint is None else ["--endpoint-url", endpoint]

    def command(self, *more: str) -> list[str]:
        return ["publish", self.maker.url, "--to", self.target, *self.options, *more]

    def publish(self, *more: str) -> dict[str, Any]:
        return json_of(call(*self.command("--json", *more)))

    def files(self) -> list[str]:
        """As `r4b published` prints them."""
        finished = call("published", self.target, *self.options)
        assert finished.code == 0, finished.stderr
        return finished.stdout.splitlines()

    def read(self, urls: list[str]) -> pa.Table:
        return pa.concat_tables([self.read_one(url) for url in urls])

    def read_one(self, url: str) -> pa.Table:
        with self.store.open(url) as file:
            return read_part(file)

    def parts(self) -> list[str]:
        return [info.url for info in self.store.list(f"{self.maker.url}/data/")]

    def version_files(self) -> dict[str, bytes]:
        """Everything below versions/, by the path in its version's folder."""
        folder = f"{self.target}/versions/"
        urls = [info.url for info in self.store.list(folder)]
        return {url.removeprefix(folder).partition("/")[2]: self.store.read(url) for url in urls if ".tmp" not in url}

    def num_files(self, version: str | None = None) -> int:
        """Parquet files of all versions, or of all but one."""
        urls = [info.url for info in self.store.list(f"{self.target}/versions/")]
        return sum(url.endswith(".parquet") and (version is None or version not in url) for url in urls)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place(str(tmp_path), StorageSpec())
    server: S3Server = request.getfixturevalue("s3")
    return Place(server.fresh_prefix("publish"), StorageSpec(endpoint_url=server.endpoint_url))


@pytest.fixture
def local(tmp_path: Path) -> Place:
    return Place(str(tmp_path), StorageSpec())


def assert_same_rows(found: pa.Table, parts: pa.Table) -> None:
    """Neither has a row that the other lacks, counted."""
    columns = ", ".join(f'"{name}"' for name in parts.column_names)
    for one, other in (("found", "parts"), ("parts", "found")):
        query = f"SELECT count(*) FROM (SELECT {columns} FROM {one} EXCEPT ALL SELECT {columns} FROM {other})"
        assert duckdb.sql(query).fetchall() == [(0,)]


# What is published.


def test_publish_has_every_row_once_in_the_order_of_the_input(place: Place) -> None:
    place.maker.fill(40)
    done = place.publish("--target-size", "20KB")
    files = place.files()
    assert 3 < len(files) < 40
    assert len(files) == done["num_files"] == done["files_written"]
    found = place.read(files)
    assert_same_rows(found, place.read(place.parts()))
    ids = found.column("sample_id").to_pylist()
    assert ids == sorted(ids)
    assert done["num_rows"] == len(ids) == 320
    assert done["moved"] is True
    assert done["num_bytes"] == sum(len(data) for path, data in place.version_files().items() if "parquet" in path)


def test_publish_files_are_about_as_large_as_asked(local: Place) -> None:
    replace(local.maker, rows_per_part=50).fill(60)
    local.publish("--target-size", "100KB")
    sizes = [Path(path).stat().st_size for path in local.files()]
    assert all(60_000 < size < 110_000 for size in sizes[:-1]), sizes


def test_publish_again_writes_nothing_and_elsewhere_writes_the_same_bytes(place: Place) -> None:
    place.maker.fill(20)
    first = place.publish("--target-size", "20KB")
    before = place.version_files()
    again = place.publish("--target-size", "20KB")
    assert (again["version"], again["files_written"], again["moved"]) == (first["version"], 0, False)
    assert place.version_files() == before
    finished = call("publish", place.maker.url, "--to", f"{place.url}/other", "--target-size", "20KB", *place.options)
    assert finished.code == 0, finished.stderr
    folder = f"{place.url}/other/versions/{first['version']}/"
    other = {info.url.removeprefix(folder): place.store.read(info.url) for info in place.store.list(folder)}
    del other["_manifest.json"], before["_manifest.json"]
    assert other == before


def test_publish_of_more_or_replaced_parts_is_another_version(local: Place) -> None:
    maker = local.maker.claim()
    maker.add(0, 0)
    versions = [local.publish("--unfinished")["version"]]
    maker.add(0, 1)
    versions.append(local.publish("--unfinished")["version"])
    maker.finish(2, 16)
    versions += [local.publish()["version"], local.publish("--target-size", "1MB")["version"]]
    (path, *_) = (Path(url) for url in local.parts())
    path.write_bytes(path.read_bytes())
    versions.append(local.publish()["version"])
    assert len(set(versions)) == 5


def test_publish_footer_says_what_the_rows_were_made_with(local: Place) -> None:
    local.maker.fill(2)
    version = local.publish()["version"]
    (path,) = local.files()
    footer = {
        key.decode(): value.decode() for key, value in pq.read_metadata(path).metadata.items() if key[:3] == b"r4b"
    }
    assert footer == {
        "r4b.model": "YannQi/R-4B",
        "r4b.revision": "",
        "r4b.fingerprint": local.maker.output.fingerprint_hash,
        "r4b.version": version,
        "r4b.software_version": "0.1.0",
    }


def test_published_json_names_files_rows_and_source(place: Place) -> None:
    place.maker.fill(20)
    place.publish("--target-size", "20KB", "--partition-by", "kind")
    facts = json_of(call("published", place.target, "--json", *place.options))
    assert (facts["source"], facts["fingerprint"]) == (place.maker.url, place.maker.output.fingerprint_hash)
    assert (facts["finished"], facts["num_parts"], facts["num_rows"]) == (True, 20, 160)
    for file in facts["files"]:
        assert place.read_one(file["url"]).num_rows == file["rows"]
        assert len(place.store.read(file["url"])) == file["bytes"]
    assert {file["partition"]["kind"] for file in facts["files"]} == {"count", "a/b=c %", None, "größe"}


def test_publish_target_can_be_moved(local: Place, tmp_path: Path) -> None:
    local.maker.fill(3)
    local.publish()
    (tmp_path / "published").rename(tmp_path / "moved")
    finished = call("published", str(tmp_path / "moved"))
    assert [Path(line).is_file() for line in finished.stdout.splitlines()] == [True]


def test_publish_folders_of_images_keep_the_order_of_their_files(local: Place) -> None:
    maker = replace(local.maker, input_format="images").claim()
    for n in range(6):
        members = tuple(((f"in/{n}-{i}.png", "v"),) for i in range(8))
        maker.add_chunk(Chunk("in/", "", 0, 8, members), f"folder-{n}")
    maker.finish(6, 48)
    local.publish()
    ids = local.read(local.files()).column("sample_id").to_pylist()
    assert len(ids) == 48
    assert ids == sorted(ids)


# Odd parts.


def test_publish_one_large_part_is_one_file_and_a_part_without_rows_is_none(local: Place) -> None:
    maker = local.maker.claim()
    maker.add(0, 0)
    maker.add(0, 1, rows=0)
    replace(maker, rows_per_part=3000).add(1, 0)
    maker.add(2, 0)
    maker.finish(4, 3016)
    local.publish("--target-size", "20KB")
    assert [pq.read_metadata(path).num_rows for path in local.files()] == [8, 3000, 8]


@pytest.mark.parametrize("partition", [[], ["--partition-by", "kind"]])
def test_publish_of_no_rows_has_the_columns(local: Place, partition: list[str]) -> None:
    maker = local.maker.claim()
    maker.add(0, 0, rows=0)
    maker.finish(1, 0)
    assert local.publish(*partition)["num_rows"] == 0
    (path,) = local.files()
    expected = [name for name in local.read(local.parts()).column_names if not partition or name != "kind"]
    with Path(path).open("rb") as file:
        assert pq.ParquetFile(file).schema_arrow.names == expected
    assert local.publish(*partition)["files_written"] == 0


def test_publish_large_part_is_read_in_pieces(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.publish.parts.WHOLE_BYTES", 1000)
    monkeypatch.setattr("pipeline.publish.parts.BATCH_BYTES", 2000)
    monkeypatch.setattr("pipeline.publish.files.MAX_GROUP_BYTES", 20_000)
    replace(local.maker, rows_per_part=100).fill(3)
    publish(local.maker.url, local.target, local.storage, PublishOptions())
    (path,) = local.files()
    assert pq.read_metadata(path).num_row_groups > 2
    assert_same_rows(local.read([path]), local.read(local.parts()))


@pytest.mark.parametrize("how", ["cut", "no parquet", "bytes in the middle"])
def test_publish_damaged_part_is_named_and_nothing_is_published(place: Place, how: str) -> None:
    place.maker.fill(20)
    url = place.parts()[7]
    data = bytearray(place.store.read(url))
    data[200:1200] = b"\xff" * 1000
    broken = {"cut": bytes(data[:1000]), "no parquet": b"no parquet", "bytes in the middle": bytes(data)}[how]
    place.store.put(url, broken)
    finished = call(*place.command("--target-size", "20KB"))
    assert finished.code == 1
    assert url in finished.stderr
    assert "Traceback" not in finished.stderr
    assert "Nothing is published" in finished.stderr
    assert place.store.stat(f"{place.target}/_latest.json") is None
    assert call("published", place.target, *place.options).code == 2


def test_publish_text_that_is_no_utf8_is_named_for_no_reader_could_read_it(local: Place) -> None:
    lone = pa.StringArray.from_buffers(1, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff"))
    fill_kept(local.maker, pa.table({"kind": pa.concat_arrays([PLAIN[:7], lone]), "number": NUMBERS}))
    finished = call(*local.command())
    assert (finished.code, local.parts()[0] in finished.stderr) == (1, True)


def test_publish_parts_of_other_settings_or_makers_are_named(local: Place) -> None:
    local.maker.fill(2)
    replace(local.maker, url=f"{local.url}/other", input_format="jsonl").claim().add(5, 5)
    (foreign,) = Path(f"{local.url}/other/data").iterdir()
    (Path(local.maker.url) / "data" / foreign.name).write_bytes(foreign.read_bytes())
    finished = call(*local.command())
    assert (finished.code, "other settings" in finished.stderr) == (1, True)
    table = pa.table({"a": [1]})
    pq.write_table(table, Path(local.maker.url) / "data" / foreign.name)
    finished = call(*local.command())
    assert (finished.code, "not written by this software" in finished.stderr) == (1, True)


# Schemas.

PLAIN = pa.array(["x", "y"] * 4)
NUMBERS = pa.array(range(8), pa.int64())


def fill_kept(maker: OutputMaker, *tables: pa.Table) -> None:
    maker.claim()
    for n, table in enumerate(tables):
        maker.add(0, n, table)
    maker.finish(len(tables), 8 * len(tables))


@pytest.mark.parametrize(
    ("other", "merged"),
    [
        (PLAIN.dictionary_encode(), pa.string()),
        (PLAIN.cast(pa.large_string()), pa.large_string()),
        (pa.nulls(8), pa.string()),
    ],
    ids=["dictionary", "large", "null"],
)
def test_publish_columns_that_differ_without_loss_are_brought_together(
    local: Place, other: pa.Array, merged: pa.DataType
) -> None:
    fill_kept(local.maker, pa.table({"kind": PLAIN, "number": NUMBERS}), pa.table({"kind": other, "number": NUMBERS}))
    local.publish()
    found = local.read(local.files())
    assert found.schema.field("kind").type == merged
    assert found.column("kind").to_pylist() == PLAIN.to_pylist() + other.to_pylist()


def test_publish_dictionaries_and_columns_that_may_be_null_in_some_parts(local: Place) -> None:
    full = pa.schema([pa.field("kind", pa.dictionary(pa.int32(), pa.string())), pa.field("number", pa.int64())])
    never = pa.schema([full.field(0).with_nullable(False), full.field(1)])
    one = pa.table([PLAIN.dictionary_encode(), NUMBERS], schema=never)
    two = pa.table([pa.array(["z", None] * 4).dictionary_encode(), NUMBERS], schema=full)
    fill_kept(local.maker, one, two, one)
    local.publish()
    found = local.read(local.files())
    assert found.schema.field("kind") == full.field("kind")
    assert found.column("kind").to_pylist() == ["x", "y"] * 4 + ["z", None] * 4 + ["x", "y"] * 4


def test_publish_dictionaries_whose_small_indices_cannot_count_the_values_of_all_parts(local: Place) -> None:
    texts = [[f"{part}-{row}" for row in range(8)] for part in range(17)]
    small = pa.dictionary(pa.int8(), pa.string())
    fill_kept(local.maker, *(pa.table([pa.array(one, small), NUMBERS], ["kind", "number"]) for one in texts))
    local.publish()
    assert local.read(local.files()).column("kind").to_pylist() == [text for one in texts for text in one]


@pytest.mark.parametrize(
    "other",
    [
        pa.table({"kind": PLAIN, "number": pa.array(range(8), pa.float64())}),
        pa.table({"kind": PLAIN, "number": PLAIN}),
        pa.table({"kind": PLAIN}),
        pa.table({"number": NUMBERS, "kind": PLAIN}),
    ],
    ids=["lossy", "type", "missing", "order"],
)
def test_publish_columns_that_do_not_fit_fail_and_name_the_part(local: Place, other: pa.Table) -> None:
    fill_kept(local.maker, pa.table({"kind": PLAIN, "number": NUMBERS}), other)
    finished = call(*local.command())
    assert finished.code == 1
    assert any(url in finished.stderr for url in local.parts())
    assert "does not fit" in finished.stderr


def test_publish_partitions_columns_that_arrow_cannot_filter(local: Place) -> None:
    views = pa.array([[str(n)] for n in range(8)], pa.list_(pa.string_view()))
    fill_kept(local.maker, pa.table({"kind": PLAIN, "number": views}))
    local.publish("--partition-by", "kind")
    values = [local.read([path]).column("number").to_pylist() for path in local.files()]
    assert values == [[["0"], ["2"], ["4"], ["6"]], [["1"], ["3"], ["5"], ["7"]]]


# Partitions.


def test_publish_partitions_are_read_back_as_hive_writes_them(local: Place) -> None:
    local.maker.fill(40)
    done = local.publish("--partition-by", "kind", "--target-size", "20KB")
    files = local.files()
    folders = {Path(path).parent.name for path in files}
    assert folders == {"kind=count", "kind=a%2Fb%3Dc%20%25", "kind=__HIVE_DEFAULT_PARTITION__", "kind=größe"}
    assert len(files) > len(folders)
    found = duckdb.sql(
        f"SELECT * FROM read_parquet({files}, hive_partitioning = true, hive_types = {{'kind': VARCHAR}})"
    ).to_arrow_table()
    assert_same_rows(found, local.read(local.parts()))
    frame = pd.read_parquet(files, partitioning=ds.partitioning(pa.schema([("kind", pa.string())]), flavor="hive"))
    assert frame["kind"].value_counts().to_dict() == {"count": 128, "a/b=c %": 64, "größe": 64}
    assert frame["kind"].isna().sum() == 64
    for folder in folders:
        ids = local.read([path for path in files if folder in path]).column("sample_id").to_pylist()
        assert ids == sorted(ids)
    assert done["num_rows"] == 320


def test_publish_more_partitions_than_files_are_open_at_once(local: Place) -> None:
    replace(local.maker, rows_per_part=100).fill(3)
    local.publish("--partition-by", "number", "--target-size", "1GB")
    files = local.files()
    assert len(files) == 300
    found = duckdb.sql(f"SELECT * FROM read_parquet({files}, hive_partitioning = true)").to_arrow_table()
    assert_same_rows(found, local.read(local.parts()))


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ("knid", "no column 'knid'"),
        ("latency_s", "float"),
        ("sample_id", "more than 5 different values"),
        ("answer", "cannot name a folder"),
    ],
)
def test_publish_column_that_cannot_name_folders_is_refused(local: Place, column: str, says: str) -> None:
    replace(local.maker, words=0 if column == "answer" else 20).fill(3)
    finished = call(*local.command("--partition-by", column, "--max-partitions", "5"))
    assert (finished.code, says in finished.stderr) == (2, True), finished.stderr
    assert not (Path(local.target) / "versions").exists()


# What is left out, and what is refused.


def test_publish_unfinished_job_is_refused_unless_asked_for(place: Place) -> None:
    maker = place.maker.claim()
    maker.add(0, 0)
    finished = call(*place.command())
    assert (finished.code, "--unfinished" in finished.stderr) == (2, True)
    done = place.publish("--unfinished")
    assert (done["num_rows"], done["finished"]) == (8, False)


def test_publish_stale_parts_are_left_out_unless_asked_for(local: Place) -> None:
    maker = local.maker.claim()
    stale = maker.add(7, 0)
    maker.add(0, 0)
    maker.finish(1, 8, [stale])
    assert local.publish()["num_rows"] == 8
    assert set(local.read(local.files()).column("shard").to_pylist()) == {"in/00000.parquet"}
    assert local.publish("--with-stale")["num_rows"] == 16


def test_publish_parts_that_the_manifest_does_not_count_are_refused(local: Place) -> None:
    local.maker.fill(3).add(0, 5)
    finished = call(*local.command())
    assert (finished.code, "32 rows in 4 parts" in finished.stderr) == (1, True), finished.stderr


def test_publish_parts_with_the_same_samples_are_refused(local: Place) -> None:
    maker = local.maker.claim()
    maker.add(0, 0)
    replace(maker, rows_per_part=5).add(0, 1)
    finished = call(*local.command("--unfinished"))
    assert (finished.code, "the same samples of in/00000.parquet" in finished.stderr) == (1, True), finished.stderr


def test_publish_wrong_calls_are_told(local: Place) -> None:
    maker = local.maker.claim()
    for command, says in (
        (local.command("--unfinished"), "holds no parts"),
        (["publish", local.url, "--to", local.target], "holds no job"),
        (local.command("--target-size", "huge"), "--target-size"),
        (["publish", maker.url, "--to", f"{maker.url}/data/x", "--unfinished"], "among the parts"),
        (["publish", maker.url, "--to", f"{local.target}[1]", "--unfinished"], "holds one of"),
        (["published", local.target], "nothing published"),
    ):
        finished = call(*command)
        assert (finished.code, says in finished.stderr) == (2, True), finished.stderr


@pytest.mark.parametrize(
    ("text", "size"), [("256MB", 256_000_000), ("1GiB", 1 << 30), ("1.5k", 1500), ("77", 77), (" 2 mb ", 2_000_000)]
)
def test_parse_size_takes_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "MB", "-1MB", "1TB2", "1 2", "nan"])
def test_parse_size_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(SpecError, match="--target-size"):
        parse_size(text)


# Changes meanwhile.


def test_publish_part_replaced_meanwhile_is_not_mixed_in(place: Place) -> None:
    place.maker.fill(20)
    before = place.publish("--target-size", "20KB", "--partition-by", "kind")

    def on_start(unit: str, total: int) -> Any:
        if unit == "row":
            url = place.parts()[-1]
            table = place.read_one(url)
            sink = io.BytesIO()
            pq.write_table(table.slice(1), sink)
            place.store.put(url, sink.getvalue())
        return lambda count: None

    with pytest.raises(JobError, match="replaced or removed"):
        publish(place.maker.url, place.target, place.storage, PublishOptions(target_size=20_000), on_start)
    assert json_of(call("published", place.target, "--json", *place.options))["version"] == before["version"]


def test_publish_job_reopened_meanwhile_is_told(local: Place) -> None:
    maker = local.maker.fill(5)

    def on_start(unit: str, total: int) -> Any:
        if unit == "row":
            maker.finish(5, 41)
        return lambda count: None

    with pytest.raises(JobError, match="changed while it was published"):
        publish(maker.url, local.target, local.storage, PublishOptions(), on_start)
    assert not (Path(local.target) / "_latest.json").exists()


# Kills, doubles, readers.


def test_publish_killed_several_times_shows_readers_all_or_nothing(place: Place) -> None:
    maker = place.maker.fill(60)
    old = place.publish("--target-size", "50MB")["version"]
    maker.add(90, 0)
    maker.finish(61, 488)
    command = place.command("--target-size", "8KB", "--json")
    rng = random.Random(5)
    reader = PollingReader(place.target, place.storage)
    left = 0
    with reader.running():
        for _ in range(3):
            wanted = left + rng.randint(1, 6)
            with started_r4b(*command) as process:
                wait_for(lambda wanted=wanted: place.num_files(old) >= wanted)  # type: ignore[misc]
                kill_tree(process.pid)
            assert place.num_files(old) >= left
            left = place.num_files(old)
            assert reader.seen in ([], [old])
        done = json_of(r4b(*command))
        polls = reader.num_polls
        wait_for(lambda: reader.num_polls > polls + 10)
    assert reader.problems == []
    assert reader.seen == [old, done["version"]]
    assert 0 < left < done["num_files"]
    assert done["files_written"] == done["num_files"] - left
    assert_same_rows(place.read(place.files()), place.read(place.parts()))


def test_publish_two_at_once_of_one_version_and_of_different_ones(place: Place) -> None:
    place.maker.fill(40)
    same = place.command("--target-size", "10KB", "--json")
    other = place.command("--target-size", "30KB", "--json")
    with started_r4b(*same) as first, started_r4b(*same) as second, started_r4b(*other) as third:
        outcomes = []
        for process in (first, second, third):
            stdout, stderr = process.communicate(timeout=120)
            outcomes.append(json_of(Finished(process.returncode, stdout, stderr)))
    assert outcomes[0]["version"] == outcomes[1]["version"] != outcomes[2]["version"]
    parts = place.read(place.parts())
    for outcome in outcomes[1:]:
        folder = f"{place.target}/versions/{outcome['version']}"
        manifest = json.loads(place.store.read(f"{folder}/_manifest.json"))
        assert_same_rows(place.read([join_url(folder, file["path"]) for file in manifest["files"]]), parts)
    assert_same_rows(place.read(place.files()), parts)


def test_publish_interrupted_stops_cleanly_and_goes_on(local: Place) -> None:
    local.maker.fill(120)
    command = local.command("--target-size", "1KB", "--json")
    with started_r4b(*command) as process:
        wait_for(lambda: local.num_files() >= 3)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "goes on from there" in stderr
    assert "Traceback" not in stderr
    assert "Exception ignored" not in stderr
    left = local.num_files()
    done = json_of(r4b(*command))
    assert done["files_written"] == done["num_files"] - left
    assert done["num_rows"] == 960


def test_publish_memory_does_not_grow_with_the_parts(local: Place) -> None:
    peaks = []
    for num_parts in (30, 300):
        place = Place(f"{local.url}/{num_parts}", local.storage)
        place.maker.fill(num_parts)
        finished, peak = run_measured(*place.command("--target-size", "20KB"))
        assert finished.code == 0, finished.stderr
        peaks.append(peak)
    assert peaks[0] > 20
    assert peaks[1] - peaks[0] < 30, peaks


# Older versions.


def test_publish_keep_removes_older_versions_and_nothing_else(place: Place) -> None:
    place.maker.fill(20)
    sizes = ("10KB", "20KB", "30KB")
    versions = [place.publish("--target-size", size)["version"] for size in sizes]
    unfinished = f"{place.target}/versions/{'0' * 32}/00000.parquet"
    place.store.put(unfinished, b"of another publisher")
    done = place.publish("--target-size", "40KB", "--keep", "2")
    assert sorted(done["removed"]) == sorted(versions[:2])
    left = {info.url.split("/versions/")[1].split("/")[0] for info in place.store.list(f"{place.target}/versions/")}
    assert left == {versions[2], done["version"], "0" * 32}
    assert_same_rows(place.read(place.files()), place.read(place.parts()))
    back = place.publish("--target-size", "30KB", "--keep", "1")
    assert (back["version"], back["files_written"], back["moved"], back["removed"]) == (versions[2], 0, True, [])
    assert_same_rows(place.read(place.files()), place.read(place.parts()))


def test_published_version_that_was_removed_is_told(local: Place) -> None:
    local.maker.fill(2)
    version = local.publish()["version"]
    (Path(local.target) / "versions" / version / "_manifest.json").unlink()
    finished = call("published", local.target)
    assert (finished.code, "Publish again" in finished.stderr) == (1, True)
    assert local.publish()["files_written"] == 0
    assert len(local.files()) == 1


def test_publish_that_another_overtakes_and_removes_leaves_readers_a_version(
    local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.maker.fill(4)
    local.publish("--target-size", "10KB")
    complete = Target.complete
    newer: list[str] = []

    def overtaken(target: Target, version: Version) -> Version:
        completed = complete(target, version)
        if not newer:
            newer.append("")
            newer[0] = local.publish("--target-size", "20KB", "--keep", "1")["version"]
        return completed

    monkeypatch.setattr(Target, "complete", overtaken)
    with pytest.raises(JobError, match="--keep removed version"):
        publish(local.maker.url, local.target, local.storage, PublishOptions(target_size=30_000))
    assert Target(local.target, local.storage).latest().version == newer[0]
    assert_same_rows(local.read(local.files()), local.read(local.parts()))


def test_publish_keep_leaves_versions_of_other_software_and_those_that_go_meanwhile(
    local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.maker.fill(2)
    first, second = [local.publish("--target-size", size)["version"] for size in ("10KB", "20KB")]
    foreign = Path(local.target, "versions", "0" * 32, "_manifest.json")
    foreign.parent.mkdir()
    foreign.write_text("{}")
    read = LocalStore.read

    def vanish(store: LocalStore, url: str, version: str | None = None) -> bytes:
        if url.endswith(f"{first}/_manifest.json"):
            raise ShardChangedError(f"{url} is gone.")
        return read(store, url, version)

    monkeypatch.setattr(LocalStore, "read", vanish)
    assert local.publish("--target-size", "30KB", "--keep", "1")["removed"] == [second]
    assert foreign.exists()


def test_published_while_readers_are_moved_on_gives_the_new_version(local: Place) -> None:
    local.maker.fill(2)
    place = Target(local.target, local.storage)
    versions = [local.publish("--target-size", size, "--keep", "1")["version"] for size in ("10KB", "20KB")]
    pointer = Path(local.target, "_latest.json").read_text()
    store = place.store

    class Late(LocalStore):
        """Gives the pointer of a moment ago, once."""

        asked = 0

        def read(self, url: str, version: str | None = None) -> bytes:
            if url.endswith("_latest.json"):
                self.asked += 1
                return (pointer if self.asked > 1 else pointer.replace(versions[1], versions[0])).encode()
            return store.read(url, version)

    place.store = Late()
    assert place.latest().version == versions[1]


def test_publish_file_that_was_removed_is_written_again(local: Place) -> None:
    local.maker.fill(20)
    local.publish("--target-size", "20KB")
    Path(local.files()[2]).unlink()
    assert local.publish("--target-size", "20KB")["files_written"] == 1
    assert_same_rows(local.read(local.files()), local.read(local.parts()))


def test_publish_part_that_vanished_is_told(local: Place) -> None:
    maker = local.maker.fill(5)

    def on_start(unit: str, total: int) -> Any:
        if unit == "row":
            drop_parts(maker.output, [maker.chunk(0, 4).chunk_id])
        return lambda count: None

    with pytest.raises(JobError, match=maker.chunk(0, 4).chunk_id):
        publish(maker.url, local.target, local.storage, PublishOptions(), on_start)
    assert part_url(maker.url, maker.chunk(0, 4).chunk_id) not in local.parts()


# Files into stores, in one step.


class TornFile(io.BytesIO):
    """A file that cannot be read beyond 20 MiB."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 20 << 20:
            raise OSError("torn")
        return super().read(size)


@pytest.fixture(params=[10, 40 << 20], ids=["small", "many pieces"])
def content(request: pytest.FixtureRequest) -> Iterator[BinaryIO]:
    with io.BytesIO(random.Random(1).randbytes(request.param)) as file:
        file.seek(5)
        yield file


def test_put_file_if_absent_takes_the_name_once(place: Place, content: io.BytesIO) -> None:
    url = f"{place.url}/file"
    assert place.store.put_file_if_absent(url, content) is True
    assert place.store.put_file_if_absent(url, io.BytesIO(b"other")) is False
    assert place.store.put_file_if_absent(url, io.BytesIO(b"other" * (5 << 20))) is False
    assert place.store.read(url) == content.getvalue()


def test_put_file_if_absent_that_fails_leaves_nothing(place: Place) -> None:
    url = f"{place.url}/file"
    with pytest.raises((OSError, JobError)):
        place.store.put_file_if_absent(url, TornFile(b"x" * (40 << 20)))
    assert [info.url for info in place.store.list(place.url + "/")] == []
    if place.url.startswith("s3://"):
        client = getattr(place.store, "client")  # noqa: B009
        assert client.list_multipart_uploads(Bucket="tests").get("Uploads", []) == []
