"""The commit protocol: a part appears once, whole, with the agreed schema, and only a retry replaces error rows.

Runs on a disk and on a real S3 store. Also covers who owns an output (`_job.json`) and what `--force-new` removes.
Not covered: the flow that calls it (`pipeline.batch`).
"""

import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commits import (
    Output,
    claim_output,
    commit_chunk,
    committed_chunks,
    count_errors,
    drop_parts,
    finish_output,
    is_finished,
    read_job_file,
    read_report,
    read_reports,
    read_retry,
    reopen_output,
)
from pipeline.errors import JobError, SampleError, SpecError
from pipeline.plan import part_url
from pipeline.records import OUTPUT_SCHEMA, Chunk, ChunkReport, Generation, Retry, read_part
from pipeline.spec import fingerprint_parts, parse_spec
from pipeline.storage import LocalStore, Store, open_store
from tests.builders import ENGINE_READY_AT, Result, make_generated, make_generation, make_job

KEPT = pa.schema([])
CHUNK = Chunk("s3://bucket/in/a.parquet", "etag-1", 0, 4)
OTHER_CHUNK = replace(CHUNK, start=4, stop=8)
BROKEN = SampleError("image_corrupt", "The image cannot be decoded: broken.")
MISSING = SampleError("image_missing", "x.png is gone.")


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    """The output of a job, on each kind of store; nothing is there yet."""
    if request.param == "local":
        return output_at(str(tmp_path / "out"))
    server = request.getfixturevalue("s3")
    return output_at(f"{server.fresh_prefix('commits')}/out", storage={"endpoint_url": server.endpoint_url})


@pytest.fixture
def local(tmp_path: Path) -> Output:
    """The output of a job on a disk."""
    return output_at(str(tmp_path / "out"))


def output_at(url: str, **sections: Any) -> Output:
    job = make_job("/nowhere/in", url, **sections)
    return Output(job, fingerprint_parts(job, "model-identity", "parquet", KEPT))


def store_of(output: Output) -> Store:
    return open_store(output.url, output.job.storage)


def url_of(output: Output, chunk: Chunk = CHUNK) -> str:
    return part_url(output.url, chunk.chunk_id)


def state_of(output: Output) -> dict[str, tuple[str, bytes]]:
    """Version (which on a disk has the time of change) and bytes of every file of the output."""
    store = store_of(output)
    return {info.url: (info.version, store.read(info.url)) for info in store.list(output.url + "/")}


def part_of(output: Output, chunk: Chunk = CHUNK) -> pa.Table:
    with store_of(output).open(url_of(output, chunk)) as file:
        return read_part(file)


def answers_of(output: Output, chunk: Chunk = CHUNK) -> dict[str, Any]:
    """Answer, or error_type, by sample_id."""
    rows = part_of(output, chunk).to_pylist()
    return {row["sample_id"]: row["answer"] or row["error_type"] for row in rows}


def answer(text: str) -> Generation:
    return make_generation(answer=text)


def test_commit_chunk_first_writer_wins_and_the_second_changes_nothing(output: Output) -> None:
    first = commit_chunk(make_generated(CHUNK, {"x": answer("first"), "y": BROKEN}), output)
    before = state_of(output)
    assert list(before) == [url_of(output)]
    second = commit_chunk(make_generated(CHUNK, {"x": answer("second"), "y": answer("second")}), output)
    assert state_of(output) == before
    assert (first.num_rows, first.num_errors) == (second.num_rows, second.num_errors) == (2, 1)
    assert answers_of(output) == {"x": "first", "y": "image_corrupt"}


def test_commit_chunk_racing_writers_leave_one_whole_part(output: Output) -> None:
    def commit(n: int) -> None:
        commit_chunk(make_generated(CHUNK, {key: answer(f"writer {n}") for key in "xyz"}), output)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(commit, range(8)))
    assert list(state_of(output)) == [url_of(output)]  # no temporary file is left either
    assert len(set(answers_of(output).values())) == 1


def test_commit_chunk_report_tells_the_parts_numbers(output: Output) -> None:
    results: dict[str, Result] = {
        "a": make_generation(prompt_tokens=10, completion_tokens=3),
        "b": make_generation(mode_chosen="thinking", reasoning="Hm.", prompt_tokens=20, completion_tokens=5),
        "c": MISSING,
        "d": BROKEN,
    }
    report = commit_chunk(make_generated(CHUNK, results), output)
    assert (report.chunk_id, report.shard) == (CHUNK.chunk_id, CHUNK.shard)
    assert (report.num_rows, report.num_errors, report.num_thinking) == (4, 2, 1)
    assert (report.prompt_tokens, report.completion_tokens) == (30, 8)
    assert report.first_error == "x.png is gone."
    assert report.engine_ready_at == ENGINE_READY_AT
    assert read_report(output, CHUNK.chunk_id) == replace(report, first_error=None, engine_ready_at=None)


def test_commit_chunk_part_has_the_output_schema_and_the_kept_columns(output: Output) -> None:
    kept = pa.table(
        {
            "label": pa.array(["u", None]).dictionary_encode(),
            "tags": pa.array([["a"], None], pa.list_(pa.string())),
            "when": pa.array([5, None], pa.timestamp("us", "UTC")),
            "price": pa.array([None, None], pa.decimal128(9, 2)),
        }
    ).replace_schema_metadata({"pandas": "{}", "huggingface": "{}"})
    commit_chunk(make_generated(CHUNK, {"x": answer("yes"), "y": BROKEN}, kept), output)
    part = part_of(output)
    assert part.schema.names == [*OUTPUT_SCHEMA.names, "label", "tags", "when", "price"]
    for field in [*OUTPUT_SCHEMA, *kept.schema]:
        assert part.schema.field(field.name).type == field.type
        assert part.schema.field(field.name).nullable == field.nullable
    assert part.select(kept.column_names).to_pydict() == kept.to_pydict()


def test_commit_chunk_all_rows_failed_has_the_same_schema(local: Output) -> None:
    commit_chunk(make_generated(CHUNK, {"x": BROKEN}), local)
    commit_chunk(make_generated(OTHER_CHUNK, {"x": answer("yes")}), local)
    assert part_of(local).schema.remove_metadata() == part_of(local, OTHER_CHUNK).schema.remove_metadata()
    assert part_of(local).schema.remove_metadata() == OUTPUT_SCHEMA


def test_commit_chunk_rows_hold_what_the_engine_said(local: Output) -> None:
    generation = make_generation(
        mode_chosen="thinking",
        reasoning="Let me look.",
        answer=None,
        finish_reason="length",
        thinking_truncated=True,
        prompt_tokens=100,
        image_tokens=81,
        completion_tokens=64,
        reasoning_tokens=63,
        answer_tokens=0,
        latency_s=1.25,
    )
    commit_chunk(make_generated(CHUNK, {"x": generation, "y": BROKEN}), local)
    good, bad = part_of(local).to_pylist()
    who = {"prompt_id": "p", "shard": CHUNK.shard, "mode_requested": "auto"}
    assert good == {"sample_id": "x", **who, **vars(generation), "error_type": None, "error_message": None}
    error = {"error_type": "image_corrupt", "error_message": "The image cannot be decoded: broken."}
    assert bad == {**dict.fromkeys(OUTPUT_SCHEMA.names), "sample_id": "y", **who, **error}


def test_commit_chunk_footer_tells_what_made_the_part(local: Output) -> None:
    output = output_at(local.url, engine={"kind": "simulated", "model": "some/model", "revision": "v2"})
    commit_chunk(make_generated(CHUNK, {"x": answer("yes"), "y": BROKEN}), output)
    footer = {key.decode(): value.decode() for key, value in pq.read_metadata(url_of(output)).metadata.items()}
    footer.pop("ARROW:schema")
    assert footer == {
        "r4b.model": "some/model",
        "r4b.revision": "v2",
        "r4b.fingerprint": output.fingerprint_hash,
        "r4b.start": "0",
        "r4b.stop": "4",
        "r4b.num_samples": "2",
        "r4b.num_left_out": "0",
        "r4b.num_without_prompt": "0",
        "r4b.chunk_id": CHUNK.chunk_id,
        "r4b.shard": CHUNK.shard,
        "r4b.software_version": package_version("r4b"),
        "r4b.num_errors": "1",
        "r4b.num_thinking": "0",
        "r4b.prompt_tokens": "20",
        "r4b.completion_tokens": "6",
    }


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("日本語 😀 é e\u0301 \u202e", "日本語 😀 é e\u0301 \u202e"),
        ("line\nline\r\n\ttab\0nul", "line\nline\r\n\ttab\0nul"),
        ("", ""),
        ("lone \ud83d surrogate", "lone ? surrogate"),
        ("\udce9", "?"),
    ],
)
def test_commit_chunk_odd_text_is_stored_or_made_valid(local: Output, text: str, stored: str) -> None:
    results: dict[str, Result] = {
        f"id {text}": make_generation(answer=text, reasoning=text),
        "bad": SampleError("prompt_failed", text),
    }
    commit_chunk(make_generated(CHUNK, results), local)
    good, bad = part_of(local).to_pylist()
    assert (good["sample_id"], good["answer"], good["reasoning"]) == (f"id {stored}", stored, stored)
    assert bad["error_message"] == stored


def test_commit_chunk_shard_whose_name_is_not_utf8_is_committed(local: Output) -> None:
    chunk = replace(CHUNK, shard="/data/" + os.fsdecode(b"caf\xe9.parquet"))
    commit_chunk(make_generated(chunk, {"x": answer("yes")}), local)
    assert part_of(local, chunk).column("shard").to_pylist() == ["/data/caf?.parquet"]
    assert read_report(local, chunk.chunk_id).num_rows == 1


def test_parts_are_one_table_to_duckdb_at_any_moment(local: Output) -> None:
    commit_chunk(make_generated(CHUNK, {"x": answer("one"), "y": BROKEN}), local)
    commit_chunk(make_generated(OTHER_CHUNK, {"z": answer("two")}), local)
    (Path(local.url) / "data" / ".tmp-unfinished").write_bytes(b"PAR1 half a part")
    rows = duckdb.sql(f"select sample_id, answer from '{local.url}/data/*.parquet' order by 1").fetchall()
    assert rows == [("x", "one"), ("y", None), ("z", "two")]


# Retries.


def retry_rows(output: Output, results: Sequence[tuple[str, Result]], kept: pa.Table | None = None) -> None:
    """Redo the error rows of the part as `r4b run --retry-errors` does."""
    commit_chunk(make_generated(CHUNK, results, kept, read_retry(output, CHUNK.chunk_id)), output)


def test_read_retry_names_the_error_rows_and_the_version(output: Output) -> None:
    commit_chunk(make_generated(CHUNK, {"a": answer("yes"), "b": BROKEN, "c": MISSING}), output)
    retry = read_retry(output, CHUNK.chunk_id)
    assert retry.rows == {1, 2}
    assert retry.part_version == state_of(output)[url_of(output)][0]


def test_commit_chunk_retry_replaces_only_error_rows_and_keeps_the_order(output: Output) -> None:
    kept = pa.table({"label": pa.array(["la", "lb", "lc", "ld"]).dictionary_encode()})
    results: dict[str, Result] = {"a": answer("A"), "b": BROKEN, "c": answer("C"), "d": MISSING}
    commit_chunk(make_generated(CHUNK, results, kept), output)
    before = part_of(output)
    redone: list[tuple[str, Result]] = [("b", answer("B, later")), ("d", BROKEN)]
    retry_rows(output, redone, kept.take([1, 3]))
    part = part_of(output)
    assert answers_of(output) == {"a": "A", "b": "B, later", "c": "C", "d": "image_corrupt"}
    assert part.column("sample_id").to_pylist() == list("abcd")
    assert part.column("label").to_pylist() == ["la", "lb", "lc", "ld"]
    assert part.schema.remove_metadata() == before.schema.remove_metadata()
    assert part.take([0, 2]).to_pylist() == before.take([0, 2]).to_pylist()
    report = read_report(output, CHUNK.chunk_id)
    assert (report.num_rows, report.num_errors, report.prompt_tokens) == (4, 1, 60)
    retry_rows(output, [("d", answer("D, at last"))], kept.take([3]))
    assert answers_of(output) == {"a": "A", "b": "B, later", "c": "C", "d": "D, at last"}
    assert read_retry(output, CHUNK.chunk_id).rows == frozenset()


def test_commit_chunk_retry_against_a_changed_part_changes_nothing(output: Output) -> None:
    commit_chunk(make_generated(CHUNK, {"a": BROKEN, "b": answer("B")}), output)
    stale = Retry("0" * 32, frozenset({0}))
    before = state_of(output)
    report = commit_chunk(make_generated(CHUNK, {"a": answer("A")}, retry=stale), output)
    assert state_of(output) == before
    assert (report.num_rows, report.num_errors) == (2, 1)


def test_commit_chunk_retry_repeated_by_ray_reports_what_the_first_wrote(output: Output) -> None:
    """Compute is at-least-once: a task may write its part, and be run again because its worker then died."""
    commit_chunk(make_generated(CHUNK, {"a": BROKEN, "b": answer("B")}), output)
    again = make_generated(CHUNK, {"a": answer("A, and longer")}, retry=read_retry(output, CHUNK.chunk_id))
    first = commit_chunk(again, output)
    before = state_of(output)
    second = commit_chunk(again, output)
    assert state_of(output) == before
    assert answers_of(output) == {"a": "A, and longer", "b": "B"}
    assert (first.num_rows, first.num_errors) == (second.num_rows, second.num_errors) == (2, 0)


def test_commit_chunk_retry_where_an_id_stands_twice_gives_each_row_its_own_answer(local: Output) -> None:
    """Nothing says that ids are unique."""
    rows: list[tuple[str, Result]] = [("same", BROKEN), ("same", answer("1")), ("same", MISSING)]
    commit_chunk(make_generated(CHUNK, rows), local)
    retry_rows(local, [("same", answer("0")), ("same", answer("2"))])
    assert part_of(local).column("answer").to_pylist() == ["0", "1", "2"]


def test_commit_chunk_retry_racing_writers_have_one_winner(output: Output) -> None:
    commit_chunk(make_generated(CHUNK, {"a": BROKEN, "b": BROKEN}), output)
    retry = read_retry(output, CHUNK.chunk_id)
    gate = threading.Barrier(6)

    def commit(n: int) -> ChunkReport:
        mine = make_generation(answer="x" * (n + 1), completion_tokens=100 + n)
        chunk = make_generated(CHUNK, {"a": mine, "b": mine}, retry=retry)
        gate.wait(timeout=30)
        return commit_chunk(chunk, output)

    with ThreadPoolExecutor(6) as pool:
        reports = list(pool.map(commit, range(6)))
    (winner,) = set(part_of(output).column("completion_tokens").to_pylist())
    assert [report.completion_tokens for report in reports] == [2 * winner] * 6
    assert [report.num_errors for report in reports] == [0] * 6


# The list of parts.


def test_committed_chunks_are_the_parts_and_nothing_else(local: Output) -> None:
    assert committed_chunks(local) == frozenset()
    commit_chunk(make_generated(CHUNK, {"x": answer("yes")}), local)
    commit_chunk(make_generated(OTHER_CHUNK, {"x": answer("yes")}), local)
    data = Path(local.url) / "data"
    for name in (".tmp-abc", ".tmp-abc.parquet", "notes.txt", f"{CHUNK.chunk_id}.parquet.bak", "train-00000.parquet"):
        (data / name).write_bytes(b"not a part")
    assert committed_chunks(local) == {CHUNK.chunk_id, OTHER_CHUNK.chunk_id}


def test_committed_chunks_on_s3_and_disk_follow_commits_and_drops(output: Output) -> None:
    for chunk in (CHUNK, OTHER_CHUNK):
        commit_chunk(make_generated(chunk, {"x": answer("yes")}), output)
    assert committed_chunks(output) == {CHUNK.chunk_id, OTHER_CHUNK.chunk_id}
    drop_parts(output, [CHUNK.chunk_id, "never there"])
    assert committed_chunks(output) == {OTHER_CHUNK.chunk_id}


def test_read_reports_keep_the_order_asked_for(output: Output) -> None:
    for chunk, key in ((CHUNK, "x"), (OTHER_CHUNK, "yz")):
        commit_chunk(make_generated(chunk, {name: answer("yes") for name in key}), output)
    reports = list(read_reports(output, [OTHER_CHUNK.chunk_id, CHUNK.chunk_id]))
    assert [report.num_rows for report in reports] == [2, 1]


def test_read_report_of_a_foreign_parquet_file_says_so(local: Output) -> None:
    path = Path(url_of(local))
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(JobError, match=r"was not written by this software: its footer lacks 'r4b\."):
        read_report(local, CHUNK.chunk_id)


def test_read_report_of_a_part_made_with_other_settings_says_so(local: Output) -> None:
    """Such as a driver of the job that --force-new replaced, still at work."""
    other = Output(local.job, local.fingerprint | {"prompts": "another"})
    commit_chunk(make_generated(CHUNK, {"x": answer("yes")}), other)
    with pytest.raises(JobError, match="made with other settings"):
        read_report(local, CHUNK.chunk_id)
    with pytest.raises(JobError, match="made with other settings"):
        commit_chunk(make_generated(CHUNK, {"x": answer("no")}), local)


def test_claim_output_on_a_store_without_conditional_writes_still_compares(
    local: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_output(Output(local.job, local.fingerprint | {"prompts": "another"}))

    def put_whatever_is_there(store: LocalStore, url: str, data: bytes) -> bool:
        store.put(url, data)
        return True

    monkeypatch.setattr(LocalStore, "put_if_absent", put_whatever_is_there)
    with pytest.raises(SpecError, match="prompts: was another"):
        claim_output(local)


def test_read_report_of_a_broken_file_names_it(local: Output) -> None:
    path = Path(url_of(local))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PAR1 cut")
    with pytest.raises(JobError, match=CHUNK.chunk_id):
        read_report(local, CHUNK.chunk_id)


def test_count_errors_adds_up_parts_and_names_damaged_shards(output: Output) -> None:
    commit_chunk(make_generated(CHUNK, {"a": BROKEN, "b": MISSING, "c": answer("yes")}), output)
    damage = SampleError("shard_damaged", "s3://bucket/in/b.tar breaks at byte 5.")
    torn = replace(OTHER_CHUNK, shard="s3://bucket/in/b.tar")
    commit_chunk(make_generated(torn, {"a": BROKEN, "b": damage}), output)
    counts, damaged = count_errors(output, [CHUNK.chunk_id, torn.chunk_id])
    assert counts == {"image_corrupt": 2, "image_missing": 1, "shard_damaged": 1}
    assert damaged == ["s3://bucket/in/b.tar"]


# Who owns an output.


def with_sampling(output: Output, **sampling: Any) -> Output:
    storage = output.job.storage.model_dump()
    other = make_job("/nowhere/in", output.url, sampling=sampling, storage=storage)
    return Output(other, fingerprint_parts(other, "model-identity", "parquet", KEPT))


def test_claim_output_first_writes_the_job_and_the_same_job_may_go_on(output: Output) -> None:
    claim_output(output)
    before = state_of(output)
    found = read_job_file(output.url, output.job.storage)
    assert found["fingerprint"] == output.fingerprint_hash
    assert found["made_with"] == output.fingerprint
    assert parse_spec(found["spec"], "_job.json") == output.job
    assert found["software_version"] == package_version("r4b")
    claim_output(output)
    claim_output(Output(make_renamed(output), output.fingerprint))
    assert state_of(output) == before


def make_renamed(output: Output) -> Any:
    return output.job.model_copy(update={"name": "another name"})


def test_claim_output_of_another_job_is_refused_and_says_what_differs(output: Output) -> None:
    claim_output(output)
    before = state_of(output)
    with pytest.raises(SpecError) as caught:
        claim_output(with_sampling(output, temperature=0.7))
    message = str(caught.value)
    assert message.startswith(f"output.url: {output.url} holds the parts of another job.")
    assert '"temperature": 0.0' in message
    assert '"temperature": 0.7' in message
    assert "--force-new" in message
    assert not any(f"  {name}:" in message for name in set(output.fingerprint) - {"sampling"})
    assert state_of(output) == before


def test_claim_output_force_new_discards_what_the_other_job_wrote(output: Output) -> None:
    claim_output(output)
    commit_chunk(make_generated(CHUNK, {"x": answer("yes")}), output)
    finish_output(output, "{}")
    other = with_sampling(output, temperature=0.7)
    claim_output(other, force_new=True)
    assert list(state_of(output)) == [other.file("_job.json")]
    assert read_job_file(output.url, output.job.storage)["fingerprint"] == other.fingerprint_hash


def test_claim_output_force_new_leaves_files_that_no_job_wrote(local: Output) -> None:
    """`data/` is also where many datasets keep their shards."""
    claim_output(local)
    commit_chunk(make_generated(CHUNK, {"x": answer("yes")}), local)
    foreign = {"data/train-00000-of-00001.parquet": b"somebody's only copy", "notes.txt": b"mine"}
    for name, data in foreign.items():
        (Path(local.url) / name).write_bytes(data)
    claim_output(local, force_new=True)
    left = {url.removeprefix(local.url + "/"): data for url, (_, data) in state_of(local).items()}
    left.pop("_job.json")
    assert left == foreign


def test_claim_output_racing_drivers_of_two_jobs_have_one_owner(output: Output) -> None:
    outputs = [with_sampling(output, seed=n) for n in range(6)]

    def claim(mine: Output) -> bool:
        try:
            claim_output(mine)
        except SpecError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        claimed = list(pool.map(claim, outputs))
    assert sum(claimed) == 1
    owner = outputs[claimed.index(True)]
    assert read_job_file(output.url, output.job.storage)["fingerprint"] == owner.fingerprint_hash


@pytest.mark.parametrize("content", [b"", b"no json", b"[]", b"null", b"{}", b'{"fingerprint": "x"}', b"\xff\xfe"])
def test_claim_output_over_a_foreign_job_file_is_refused(local: Output, content: bytes) -> None:
    store_of(local).put(local.file("_job.json"), content)
    with pytest.raises(SpecError, match="is not a job file of this software"):
        claim_output(local)
    assert store_of(local).read(local.file("_job.json")) == content


def test_read_job_file_where_no_job_is_says_so(output: Output) -> None:
    with pytest.raises(SpecError, match=r"out holds no job: there is no _job\.json"):
        read_job_file(output.url, output.job.storage)


def test_claim_output_that_cannot_be_written_is_a_spec_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SpecError, match=r"^output\.url: .*file/out"):
        claim_output(output_at(str(tmp_path / "file" / "out")))


def test_finish_output_marks_the_job_and_reopen_takes_the_marks_away(output: Output) -> None:
    claim_output(output)
    assert not is_finished(output)
    finish_output(output, json.dumps({"num_rows": 5}))
    assert is_finished(output)
    assert json.loads(store_of(output).read(output.file("_manifest.json"))) == {"num_rows": 5}
    assert store_of(output).read(output.file("_SUCCESS")) == b""
    reopen_output(output)
    assert not is_finished(output)
    assert list(state_of(output)) == [output.file("_job.json")]
