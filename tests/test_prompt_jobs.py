"""Prompts kept in shards beside the images: each row of the output is a pair that matches, and what does not is told.

Covers both shapes, resume, selections and refusals, through `run_batch` on the simulated engine and through
`read_chunks`. Not covered: what a row of a prompt shard may hold (`test_prompt_shards`).
"""

import asyncio
import gzip
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.batch import finish, run_batch
from pipeline.commits import Output, claim_output, commit_chunk
from pipeline.engine import EngineRequest
from pipeline.engine.simulated import SimulatedEngine
from pipeline.errors import JobError, SpecError
from pipeline.plan import complete_plan, make_plan
from pipeline.readers import is_drawn
from pipeline.records import ChunkReport, FailedShard, GeneratedChunk, Generation, Manifest, Tally, Task, read_part
from pipeline.spec import JobSpec, SampleSpec, SamplingSpec, fingerprint_parts
from tests.builders import image_table, make_generation, make_job, numbered_png, write_shard
from tests.layouts import tar_bytes
from tests.reading import numbers_of, read_all, tasks_of, try_all
from tests.s3_server import S3Server

Row = dict[str, Any]
Key = tuple[str, str]
ENGINE = {"kind": "simulated", "num_gpus": 0, "simulation": {"thinking_tokens": 30, "answer_tokens": 5}}
SAMPLES = 7
SHARDS = {f"{shard:05d}": [f"s{shard:02d}-{n}" for n in range(SAMPLES)] for shard in range(20)}
"""Sample ids by the names of their shards."""
ALL_IDS = [sample_id for ids in SHARDS.values() for sample_id in ids]
MIXED_ENDINGS = (".jsonl", ".parquet", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".pq")


@pytest.fixture(autouse=True)
def store_before_ray(s3: S3Server) -> S3Server:
    """Ray's workers have the environment of the moment when Ray started, and S3's credentials are in it."""
    return s3


def number_for(sample_id: str) -> int:
    """The number that the sample's image shows."""
    return int(sample_id[1:3]) * SAMPLES + int(sample_id[4:])


def shard_bytes(ids: Sequence[str]) -> bytes:
    """A tar of these samples, with a column `n`."""
    files = [(f"{one}.png", numbered_png(number_for(one))) for one in ids]
    facts = [(f"{one}.json", json.dumps({"n": number_for(one)}).encode()) for one in ids]
    return tar_bytes([member for pair in zip(files, facts, strict=True) for member in pair])


def write_input(folder: Path, kind: str, shards: Mapping[str, Sequence[str]] = SHARDS) -> Path:
    """Shards of these samples as tars or as Parquet."""
    for name, ids in shards.items():
        path = folder / f"{name}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "tar":
            path.write_bytes(shard_bytes(ids))
        else:
            numbers = [number_for(one) for one in ids]
            images = pa.array(map(numbered_png, numbers), pa.binary())
            write_shard(path, pa.table({"id": list(ids), "image": images, "n": numbers}))
    return folder


def prompt_bytes(rows: Sequence[Row | str], ending: str) -> bytes:
    """A prompt shard; a string is a line as it is."""
    if ending in (".parquet", ".pq"):
        names = ("sample_id", "prompt_id", "text", "messages", "thinking_mode", "sampling")
        flat = [
            {key: json.dumps(one) if isinstance(one, list | dict) else one for key, one in row.items()}
            for row in rows
            if isinstance(row, dict)
        ]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({name: pa.array([row.get(name) for row in flat], pa.string()) for name in names}), sink)
        return bytes(sink.getvalue())
    data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    if ending.endswith(".gz"):
        return gzip.compress(data)
    return pa.compress(data, codec="zstd", asbytes=True) if ending.endswith(".zst") else data


def write_prompts(path: Path, rows: Sequence[Row | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(prompt_bytes(rows, path.name[path.name.index(".") :]))
    return path


def draw_prompts(ids: Sequence[str], seed: int) -> list[Row]:
    """1 to 5 prompts for each sample, of all kinds, in no order."""
    rng = random.Random(seed)
    rows = [_draw_prompt(rng, one, f"p{number}") for one in ids for number in range(rng.randint(1, 5))]
    rng.shuffle(rows)
    return rows


def _draw_prompt(rng: random.Random, sample_id: str, prompt_id: str) -> Row:
    words = " ".join(rng.choice(("what", "is", "shown", "where", "über", "日本")) for _ in range(rng.randint(1, 20)))
    few_shot = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": words},
    ]
    placed = [{"role": "user", "content": [{"type": "text", "text": words}, {"type": "image"}]}]
    asked = rng.choice(({"text": words}, {"messages": few_shot}, {"messages": placed}))
    row: Row = {"sample_id": sample_id, "prompt_id": prompt_id, **asked}
    if mode := rng.choice((None, "auto", "long", "short")):
        row["thinking_mode"] = mode
    if rng.random() < 0.5:
        row["sampling"] = {"max_tokens": rng.randint(1, 20), "seed": rng.randint(0, 9)}
    return row


def messages_of(row: Row) -> list[Any]:
    return row["messages"] if "messages" in row else [{"role": "user", "content": row["text"]}]


def in_order(ids: Sequence[str], rows: Sequence[Row]) -> list[Row]:
    """The prompts that match, as the output has them: sample by sample, each sample's in the shard's order."""
    return [row for sample_id in ids for row in rows if row["sample_id"] == sample_id]


def key_of(row: Mapping[str, Any]) -> Key:
    return row["sample_id"], row["prompt_id"]


def shape_job(folder: Path, prompts_url: Path | str, **sections: Any) -> JobSpec:
    """A job over `folder/in` into `folder/out`, with prompts of that place."""
    prompts = {"url": str(prompts_url), **sections.pop("prompts", {})}
    output = {"keep_columns": ["n"], **sections.pop("output", {})}
    return make_job(folder / "in", folder / "out", prompts=prompts, engine=ENGINE, output=output, **sections)


def write_dataset(folder: Path, kind: str, shape: str, endings: Sequence[str]) -> tuple[JobSpec, dict[str, list[Row]]]:
    """All shards, their prompts, and a job over them."""
    write_input(folder / "in", kind)
    drawn = {name: draw_prompts(ids, seed) for seed, (name, ids) in enumerate(SHARDS.items())}
    if shape == "aligned":
        for number, (name, rows) in enumerate(drawn.items()):
            write_prompts(folder / "prompts" / f"{name}{endings[number % len(endings)]}", rows)
        return shape_job(folder, folder / "prompts", prompts={"thinking_mode": "short"}), drawn
    rows = [row for some in drawn.values() for row in some]
    random.Random(0).shuffle(rows)
    table = write_prompts(folder / f"all{endings[0]}", rows)
    drawn = {name: [row for row in rows if row["sample_id"] in ids] for name, ids in SHARDS.items()}
    return shape_job(folder, table, prompts={"thinking_mode": "short"}), drawn


def run(job: JobSpec, **options: Any) -> tuple[Manifest, list[ChunkReport]]:
    reports: list[ChunkReport] = []
    manifest = run_batch(job, on_commit=reports.append, **options)
    return manifest, reports


def run_without_ray(job: JobSpec) -> Manifest:
    """The same job with all of its stages but Ray and the engine."""
    plan = make_plan(job)
    output = Output(job, fingerprint_parts(job, "", plan.format, plan.schema, plan.prompt_table))
    claim_output(output)
    for chunk in read_all(job, plan):
        results = tuple(task.error or make_generation() for task in chunk.tasks)
        commit_chunk(GeneratedChunk(chunk.work, chunk.tasks, results, chunk.kept, chunk.counts, 0.0), output)
    return finish(output, complete_plan(job, plan), [], Tally(Manifest("test", output.fingerprint_hash, "sim")))


def part_versions(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "out" / "data").iterdir()}


def rows_in_order(folder: Path, wanted: Sequence[Key]) -> list[Row]:
    """All rows of the parts, which are put in the wanted order by their first rows."""
    places = {key: place for place, key in enumerate(wanted)}
    parts = sorted((part for part in read_parts(folder) if part), key=lambda part: places[key_of(part[0])])
    return [row for part in parts for row in part]


def read_parts(folder: Path) -> Iterator[list[Row]]:
    for path in (folder / "out" / "data").iterdir():
        with path.open("rb") as file:
            yield read_part(file).to_pylist()


def generate_all(job: JobSpec, requests: Sequence[EngineRequest]) -> list[Generation]:
    """What the simulated engine says, which depends on every word, number and pixel of a request."""
    engine = SimulatedEngine(job.engine)

    async def gather() -> list[Generation]:
        return list(await asyncio.gather(*map(engine.generate, requests)))

    return asyncio.run(gather())


def request_for(row: Row, task: Task) -> EngineRequest:
    """The row as the engine should get it; without a place for it, the image comes first in the last message."""
    *before, last = messages_of(row)
    if isinstance(last["content"], str):
        last = {**last, "content": [{"type": "image"}, {"type": "text", "text": last["content"]}]}
    sampling = SamplingSpec(**row.get("sampling", {}))
    return EngineRequest([*before, last], task.images, row.get("thinking_mode", "short"), sampling)


@pytest.mark.parametrize(
    ("kind", "shape", "ending"),
    [
        ("tar", "aligned", ".jsonl"),
        ("tar", "aligned", ".parquet"),
        ("tar", "aligned", ".jsonl.gz"),
        ("tar", "table", ".jsonl.zst"),
        ("parquet", "aligned", ".jsonl.zst"),
        ("parquet", "table", ".jsonl"),
        ("parquet", "table", ".parquet"),
        ("parquet", "table", ".ndjson.gz"),
    ],
)
def test_read_chunks_every_prompt_of_a_sample_is_a_task_in_order(
    tmp_path: Path, kind: str, shape: str, ending: str
) -> None:
    job, drawn = write_dataset(tmp_path, kind, shape, [ending])
    tasks: dict[str, list[Task]] = {}
    for chunk in read_all(job):
        tasks.setdefault(Path(chunk.work.chunk.shard).stem, []).extend(chunk.tasks)
    assert set(tasks) == set(SHARDS)
    for name, ids in SHARDS.items():
        wanted = in_order(ids, drawn[name])
        assert len(wanted) == len(drawn[name])
        found = [
            (task.sample_id, task.prompt_id, task.mode_requested, list(task.messages), dict(task.sampling))
            for task in tasks[name]
        ]
        assert found == [
            (*key_of(row), row.get("thinking_mode", "short"), messages_of(row), row.get("sampling", {}))
            for row in wanted
        ]
        assert numbers_of(tasks[name]) == [number_for(row["sample_id"]) for row in wanted]


def test_read_chunks_prompts_and_shards_in_a_bucket_are_joined(tmp_path: Path, s3: S3Server) -> None:
    prefix = s3.fresh_prefix("prompts")
    drawn = {name: draw_prompts(ids, 5) for name, ids in list(SHARDS.items())[:3]}
    for name, rows in drawn.items():
        s3.put(f"{prefix}/in/deep/{name}.tar", shard_bytes(SHARDS[name]))
        s3.put(f"{prefix}/prompts/deep/{name}.jsonl.gz", prompt_bytes(rows, ".jsonl.gz"))
    s3.put(f"{prefix}/prompts-old/deep/00000.jsonl", prompt_bytes([], ".jsonl"))
    storage = {"endpoint_url": s3.endpoint_url}
    job = make_job(f"{prefix}/in/", tmp_path / "out", prompts={"url": f"{prefix}/prompts"}, storage=storage)
    wanted = [key_of(row) for name, rows in drawn.items() for row in in_order(SHARDS[name], rows)]
    assert [(task.sample_id, task.prompt_id) for task in tasks_of(job)] == wanted


def test_read_chunks_table_joins_loose_images_by_their_paths(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "in" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "deep" / f"{number}.png").write_bytes(numbered_png(number))
    rows = [{"sample_id": f"deep/{n}.png", "prompt_id": f"p{p}", "text": "x"} for p in range(2) for n in (2, 0)]
    job = make_job(tmp_path / "in", tmp_path / "out", prompts={"url": str(write_prompts(tmp_path / "a.jsonl", rows))})
    chunks = read_all(job)
    tasks = [task for chunk in chunks for task in chunk.tasks]
    assert numbers_of(tasks) == [0, 0, 2, 2]
    assert [task.prompt_id for task in tasks] == ["p0", "p1", "p0", "p1"]
    assert sum(chunk.counts.num_without_prompt for chunk in chunks) == 1


def test_read_chunks_bad_prompt_or_image_harms_its_own_rows_alone(tmp_path: Path) -> None:
    images = [numbered_png(0), b"no image", numbered_png(2), numbered_png(3)]
    write_shard(tmp_path / "in" / "a.parquet", image_table(4, n=range(4)).set_column(1, "image", [images]))
    rows: list[Row] = [{"sample_id": f"row-{n}", "prompt_id": f"p{p}", "text": "x"} for n in range(3) for p in range(3)]
    rows[0] = {"sample_id": "row-0", "prompt_id": "p0", "messages": [{"role": "painter", "content": "x"}]}
    rows[4] = {"sample_id": "row-1", "prompt_id": "p1", "text": ""}
    rows[7] = {"sample_id": "row-2", "prompt_id": "no id", "text": "x"}
    rows[8] = {"sample_id": "row-2", "prompt_id": "p0", "text": "again"}
    job = shape_job(tmp_path, write_prompts(tmp_path / "prompts" / "a.jsonl", rows), prompts={"shape": "aligned"})
    (chunk,) = read_all(job)
    bad, broken = "prompt_invalid", "image_unrecognized"
    assert [task.prompt_id for task in chunk.tasks] == ["p0", "p1", "p2", "p0", "p1", "p2", "p0", "no_id#7", "p0#8"]
    assert numbers_of(chunk.tasks) == [bad, 0, 0, broken, bad, broken, 2, bad, bad]
    assert chunk.kept.column("n").to_pylist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (chunk.counts.num_samples, chunk.counts.num_without_prompt) == (4, 1)
    first = chunk.tasks[0]
    assert first.error is not None
    assert "painter" in first.error.message
    assert first.messages == ()


def test_read_chunks_prompt_shard_that_changed_since_the_plan_fails_its_shard_alone(tmp_path: Path) -> None:
    job, _ = write_dataset(tmp_path, "parquet", "aligned", [".jsonl"])
    plan = make_plan(job)
    write_prompts(tmp_path / "prompts" / "00003.jsonl", [{"sample_id": "s03-0", "prompt_id": "p", "text": "new"}])
    made = try_all(job, plan)
    (failed,) = {one for one in made if isinstance(one, FailedShard)}  # each pass over the shard says the same
    assert failed.shard.endswith("in/00003.parquet")
    assert "prompts/00003.jsonl" in failed.message
    read = {one.work.chunk.shard for one in made if not isinstance(one, FailedShard)}
    assert len(read) == 19


# shards, prompt shards, which of them each shard takes
NAMES: list[tuple[str, list[str], list[str], list[str | None]]] = [
    ("the same tree", ["a/0", "a/1", "b/0"], ["a/0.jsonl", "a/1.pq", "b/0.ndjson.gz"], [*"012"]),
    ("flat prompts", ["a/0", "b/1"], ["0.jsonl", "1.jsonl"], [*"01"]),
    ("flat shards", ["0", "1"], ["a/0.jsonl", "b/1.jsonl"], [*"01"]),
    ("deeper shards", ["x/a/0", "x/b/0"], ["a/0.jsonl", "b/0.jsonl"], [*"01"]),
    ("deeper prompts", ["a/0", "b/0"], ["x/a/0.jsonl", "x/b/0.jsonl"], [*"01"]),
    ("another folder's is not taken", ["a/0", "b/0"], ["a/0.jsonl"], ["0", None]),
    ("of two that fit none is taken", ["0", "c"], ["a/0.jsonl", "b/0.jsonl", "c.jsonl"], [None, "2"]),
    ("the nearest name is taken", ["a/0"], ["0.jsonl", "a/0.jsonl"], ["1"]),
    ("dots in names", ["0.v2", "0.v3"], ["0.v3.jsonl.zst", "0.v2.jsonl.gzip"], [*"10"]),
    ("hidden files are none", ["0", "1"], [".0.jsonl", "_0.jsonl", "1.jsonl"], [None, "2"]),
    ("other files are none", ["0", "1"], ["0.txt", "0.json", "1.NDJSON"], [None, "2"]),
    ("no part of a name", ["10", "0"], ["0.jsonl"], [None, "0"]),
]


@pytest.mark.parametrize(("shards", "prompts", "taken"), [case[1:] for case in NAMES], ids=[case[0] for case in NAMES])
@pytest.mark.parametrize("slash", ["", "/"])
def test_make_plan_aligned_prompt_shards_are_found_by_their_names(
    tmp_path: Path, shards: list[str], prompts: list[str], taken: list[str | None], slash: str
) -> None:
    write_input(tmp_path / "in", "parquet", {name: ["s00-0"] for name in shards})
    for name in prompts:
        write_prompts(tmp_path / "prompts" / name, [])
    plan = make_plan(shape_job(tmp_path, f"{tmp_path / 'prompts'}{slash}"))
    found = {chunk.shard: chunk.prompts and chunk.prompts[0] for chunk in plan.chunks}
    wanted = {
        str(tmp_path / "in" / f"{name}.parquet"): number and str(tmp_path / "prompts" / prompts[int(number)])
        for name, number in zip(shards, taken, strict=True)
    }
    assert found == wanted
    readable = {name for name in prompts if name[0] not in "._" and not name.endswith(("txt", "json"))}
    assert {url for url, _ in plan.prompt_shards} == {str(tmp_path / "prompts" / name) for name in readable}


# kind of the input, prompt shards, prompts.url below the folder, more of the spec, what the refusal says
REFUSED: list[tuple[str, str, list[str], str, Row, str]] = [
    ("loose images", "png", ["a/0.jsonl"], "a", {"shape": "aligned"}, "prompts.shape: loose images have no shards"),
    ("loose images, shape not said", "png", ["a/0.jsonl"], "a", {}, "prompts.shape: loose images have no shards"),
    ("table of several", "tar", ["a/0.jsonl", "a/1.jsonl"], "a", {"shape": "table"}, "table takes one file, and .* 2"),
    ("nothing there", "tar", [], "a", {}, "prompts.url: no prompt shards .* at .*/a"),
    ("nothing of the kind", "tar", ["a/0.txt"], "a", {}, "prompts.url: no prompt shards"),
    ("two of one name", "tar", ["a/0.jsonl", "a/0.parquet"], "a", {}, r"0\.jsonl and .*0\.parquet are both for 0"),
    ("two of one packed name", "tar", ["a/b/0.jsonl", "a/b/0.jsonl.gz"], "a", {}, "are both for b/0; keep one"),
    ("one for two shards", "tar", ["a/0.jsonl"], "a", {}, r"0\.jsonl belongs to .*in/x/0\.tar and to .*in/y/0\.tar"),
    ("a place not read", "tar", [], "https://a", {}, "https://a: https:// is not read here"),
    ("none fits", "tar", ["a/all.jsonl"], "a", {}, r"no prompt shard, such as .*all\.jsonl, has the name of a shard"),
]


@pytest.mark.parametrize(
    ("kind", "files", "url", "more", "says"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_make_plan_prompts_that_cannot_be_joined_are_refused(
    tmp_path: Path, kind: str, files: list[str], url: str, more: Row, says: str
) -> None:
    if kind == "png":
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "0.png").write_bytes(numbered_png(0))
    else:
        write_input(tmp_path / "in", kind, {"x/0": ["s00-0"], "y/0": ["s01-0"]})
    for name in files:
        write_prompts(tmp_path / name, [])
    place = url if "//" in url else str(tmp_path / url)
    output: Row = {} if kind == "tar" else {"keep_columns": []}
    with pytest.raises(SpecError, match=says):
        make_plan(shape_job(tmp_path, place, prompts=more, output=output))


def test_run_aligned_shards_gives_each_pair_once_and_redoes_only_a_changed_shard(tmp_path: Path) -> None:
    job, drawn = write_dataset(tmp_path, "tar", "aligned", MIXED_ENDINGS)
    wanted = [row for name, ids in SHARDS.items() for row in in_order(ids, drawn[name])]
    manifest, _ = run(job)
    check_rows(tmp_path, job, wanted)
    assert (manifest.num_rows, manifest.num_errors, manifest.num_samples) == (len(wanted), 0, len(ALL_IDS))
    assert (manifest.num_without_prompt, manifest.prompts_without_sample, manifest.prompts_unreadable) == (0, 0, 0)

    before = part_versions(tmp_path)
    assert run(job) == (manifest, [])

    drawn["00006"] = draw_prompts(SHARDS["00006"], 77)
    write_prompts(tmp_path / "prompts" / "00006.jsonl", drawn["00006"])
    with pytest.raises(SpecError, match="shards that changed"):
        run(job)
    assert part_versions(tmp_path) == before
    _, reports = run(job, drop_stale=True)
    assert {(Path(report.shard).stem, report.start) for report in reports} == {("00006", 0), ("00006", 4)}
    after = part_versions(tmp_path)
    assert len(before.keys() - after.keys()) == len(after.keys() - before.keys()) == 2
    assert all(after[name] == before[name] for name in after.keys() & before.keys())
    check_rows(tmp_path, job, [row for name, ids in SHARDS.items() for row in in_order(ids, drawn[name])])


def check_rows(folder: Path, job: JobSpec, wanted: Sequence[Row]) -> None:
    """The output has these rows and no other, in this order, as the engine answers them."""
    rows = rows_in_order(folder, [key_of(row) for row in wanted])
    assert [key_of(row) for row in rows] == [key_of(row) for row in wanted]
    tasks = {task.sample_id: task for task in tasks_of(job)}
    answers = generate_all(job, [request_for(row, tasks[row["sample_id"]]) for row in wanted])
    for row, asked, answer in zip(rows, wanted, answers, strict=True):
        assert row["n"] == number_for(row["sample_id"])
        assert row["mode_requested"] == asked.get("thinking_mode", "short")
        assert {name: row[name] for name in vars(answer) if name != "latency_s"} == {
            name: value for name, value in vars(answer).items() if name != "latency_s"
        }
        most = asked.get("sampling", {}).get("max_tokens", 100)
        assert row["completion_tokens"] == most or (row["completion_tokens"] < most and row["finish_reason"] == "stop")


def write_unmatched(folder: Path, shape: str) -> list[Row]:
    """20 shards with 10 samples without prompt and prompts without sample; gives the prompts that match.

    Prompts without sample: 3 of unknown samples and 2 unreadable rows; aligned, also 4 of a prompt shard without a
    shard and 1 that names a sample of another shard.
    """
    write_input(folder / "in", "parquet")
    matching = draw_prompts([one for one in ALL_IDS if one not in ("s03-1", "s03-2", "s19-6") and one[:3] != "s07"], 9)
    shards: dict[str, list[Row | str]] = {name: [] for name in SHARDS if name != "00007"}
    for row in matching:
        shards[f"000{row['sample_id'][1:3]}"].append(row)
    shards["00005"][3:3] = [{"sample_id": one, "prompt_id": p, "text": "x"} for one, p in GHOSTS]
    shards["00004"].insert(0, {"sample_id": None, "prompt_id": "p", "text": "x"})
    if shape == "aligned":
        shards["00002"].append({"sample_id": "s09-0", "prompt_id": "lost", "text": "x"})
        shards["99999"] = [{"sample_id": f"s00-{n}", "prompt_id": "late", "text": "x"} for n in range(4)]
        shards["99999"].append("no JSON")
        for name, rows in shards.items():
            write_prompts(folder / "prompts" / f"{name}.jsonl", rows)
    else:
        rows = [row for some in shards.values() for row in some]
        write_prompts(folder / "prompts" / "all.parquet", [*rows, {"prompt_id": "q", "text": "x"}])
    return in_order(ALL_IDS, matching)


GHOSTS = (("ghost", "p0"), ("ghost", "p1"), ("s05-7", "p0"))


def test_run_aligned_differences_are_counted_and_named_in_the_manifest(tmp_path: Path) -> None:
    wanted = write_unmatched(tmp_path, "aligned")
    manifest, reports = run(shape_job(tmp_path, tmp_path / "prompts"))
    rows = rows_in_order(tmp_path, [key_of(row) for row in wanted])
    assert [key_of(row) for row in rows] == [key_of(row) for row in wanted]
    assert (manifest.num_samples, manifest.num_without_prompt, manifest.num_errors) == (140, 10, 0)
    assert (manifest.prompts_without_sample, manifest.prompts_unreadable) == (8, 2)
    assert sum(report.num_rows == 0 for report in reports) == 2  # of the shard without prompts
    lost = [("s09-0", "lost", "00002"), *((*ghost, "00005") for ghost in GHOSTS)]
    lost += [(f"s00-{n}", "late", "99999") for n in range(4)]
    named = [f"{one}, {prompt_id} in {tmp_path}/prompts/{name}.jsonl" for one, prompt_id, name in lost]
    assert [one for one in manifest.examples_without_sample if one in named] == named
    others = [one for one in manifest.examples_without_sample if one not in named]
    assert [one.partition(": ")[0] for one in others] == ["00004.jsonl", "99999.jsonl"]
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["prompts_without_sample"] == 8
    assert run(shape_job(tmp_path, tmp_path / "prompts")) == (manifest, [])


def test_run_table_differences_are_counted_and_a_changed_table_is_refused(tmp_path: Path) -> None:
    wanted = write_unmatched(tmp_path, "table")
    table = tmp_path / "prompts" / "all.parquet"
    manifest, _ = run(shape_job(tmp_path, table))
    check_rows(
        tmp_path,
        shape_job(tmp_path, table, prompts={"thinking_mode": "auto"}),
        [{"thinking_mode": "auto", **row} for row in wanted],
    )
    assert (manifest.num_samples, manifest.num_without_prompt, manifest.num_errors) == (140, 10, 0)
    assert (manifest.prompts_without_sample, manifest.prompts_unreadable) == (3, 2)
    assert set(manifest.examples_without_sample) >= {f"{one}, {p} in {table}" for one, p in GHOSTS}
    assert run(shape_job(tmp_path, table)) == (manifest, [])

    before = part_versions(tmp_path)
    write_prompts(table, wanted)
    with pytest.raises(SpecError, match=r"prompts\.url: was .*all\.parquet") as refusal:
        run(shape_job(tmp_path, table), drop_stale=True)
    assert "sampling" not in str(refusal.value)
    assert part_versions(tmp_path) == before


def test_run_differences_that_are_errors_fail_the_job_after_every_row_is_committed(tmp_path: Path) -> None:
    wanted = write_unmatched(tmp_path, "aligned")
    job = shape_job(tmp_path, tmp_path / "prompts", prompts={"unmatched": "error"}, limits={"max_error_rate": 0.1})
    with pytest.raises(
        JobError, match=r"(?s)10 prompts of .* belong to no sample.*ghost, p1 in .*00005\.jsonl"
    ) as told:
        run(job)
    assert not isinstance(told.value, SpecError)
    rows = [row for part in read_parts(tmp_path) for row in part]
    missing = ["s03-1", "s03-2", *SHARDS["00007"], "s19-6"]
    bad = [row for row in rows if row["error_type"] is not None]
    assert sorted(key_of(row) for row in bad) == [(one, "") for one in missing]
    assert {row["error_type"] for row in bad} == {"prompt_missing"}
    assert [row["n"] for row in sorted(bad, key=key_of)] == [number_for(one) for one in missing]
    good = [key_of(row) for row in rows if row["error_type"] is None]
    assert sorted(good) == sorted(key_of(row) for row in wanted)
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    before = part_versions(tmp_path)
    with pytest.raises(JobError, match="10 prompts of"):
        run(job)
    assert part_versions(tmp_path) == before


@pytest.mark.parametrize("selection", [{"limit": 5}, {"sample": {"fraction": 0.5}}, {"where": [["n", "<", 9]]}])
def test_finish_selection_of_samples_cannot_tell_prompts_without_one(tmp_path: Path, selection: Row) -> None:
    ids = ALL_IDS[: 2 * SAMPLES]
    write_input(tmp_path / "in", "parquet", {name: SHARDS[name] for name in ("00000", "00001")})
    rows = draw_prompts([one for one in ids if one != "s00-3"], 3)
    table = write_prompts(tmp_path / "prompts.jsonl", [*rows, {"sample_id": "ghost", "prompt_id": "p", "text": "x"}])
    manifest = run_without_ray(shape_job(tmp_path, table, input=selection, prompts={"unmatched": "report"}))
    chosen = {
        "limit": ids[:5],
        "sample": [one for one in ids if is_drawn(one, SampleSpec(fraction=0.5))],
        "where": [one for one in ids if number_for(one) < 9],
    }[next(iter(selection))]
    assert 0 < len(chosen) < len(ids)
    assert sorted(map(key_of, [row for part in read_parts(tmp_path) for row in part])) == sorted(
        map(key_of, in_order(chosen, rows))
    )
    assert manifest.prompts_without_sample is None
    assert manifest.num_without_prompt == ("s00-3" in chosen)
    assert manifest.num_samples - manifest.num_left_out == len(chosen)


def test_finish_prompt_shard_of_no_shard_that_cannot_be_read_fails_the_finished_job(tmp_path: Path) -> None:
    write_input(tmp_path / "in", "tar", {"0": ["s00-0"]})
    write_prompts(tmp_path / "prompts" / "0.jsonl", [{"sample_id": "s00-0", "prompt_id": "p", "text": "x"}])
    (tmp_path / "prompts" / "1.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(JobError, match=r"committed.*prompts/1\.jsonl\.gz cannot be read"):
        run_without_ray(shape_job(tmp_path, tmp_path / "prompts"))
    assert [key_of(row) for (row,) in read_parts(tmp_path)] == [("s00-0", "p")]
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    (tmp_path / "prompts" / "1.jsonl.gz").unlink()
    assert run_without_ray(shape_job(tmp_path, tmp_path / "prompts")).num_rows == 1


def test_finish_prompts_of_a_shard_without_samples_are_counted(tmp_path: Path) -> None:
    write_input(tmp_path / "in", "parquet", {"0": ["s00-0"], "1": []})
    for name in "01":
        row = {"sample_id": f"s0{name}-0", "prompt_id": "p", "text": "x"}
        write_prompts(tmp_path / "prompts" / f"{name}.jsonl", [row])
    manifest = run_without_ray(shape_job(tmp_path, tmp_path / "prompts"))
    assert (manifest.num_rows, manifest.prompts_without_sample) == (1, 1)
