"""What the cluster benchmarks judge by: an output that is not right must be found so, whichever way it is wrong."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from benchmarks.chaos import draw
from benchmarks.chaos_faults import find_faults
from benchmarks.cluster_output import WRONG, WatchedOutput
from pipeline.commits import Output, claim_output, commit_chunk, finish_output
from pipeline.errors import SampleError
from pipeline.records import Chunk, Manifest
from pipeline.suspects import Result
from tests.builders import make_generated, make_generation, make_job
from tests.s3_server import S3Server

ROWS_OF_A_PART = 4


@dataclass
class Written:
    """An output of two parts, which is watched."""

    output: Output
    watched: WatchedOutput

    def part(self, number: int) -> str:
        return sorted(self.watched.list_parts())[number]

    def get(self, number: int) -> bytes:
        return self.watched.store.get(self.part(number))

    def put(self, number: int, data: bytes) -> None:
        self.watched.store.put(self.part(number), data)

    def drop(self, url: str) -> None:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        self.watched.store.client().delete_object(Bucket=bucket, Key=key)

    def add(self, start: int, result: Result) -> None:
        chunk = Chunk("in/a.parquet", "v1", start, start + ROWS_OF_A_PART)
        rows = [(f"row-{number}", result) for number in range(chunk.start, chunk.stop)]
        commit_chunk(make_generated(chunk, rows), self.output)

    def mark(self, num_parts: int, num_rows: int) -> None:
        finish_output(self.output, Manifest("job", "f", "sim", num_parts, num_rows).to_json())


@pytest.fixture
def written(s3: S3Server) -> Written:
    url = s3.fresh_prefix("watched")
    output = Output(make_job("/in", url, storage={"endpoint_url": s3.endpoint_url}), {})
    claim_output(output)
    made = Written(output, WatchedOutput(s3, url, 2))
    for start in (0, ROWS_OF_A_PART):
        made.add(start, make_generation())
    assert made.watched.look() == 2
    return made


def lose(written: Written) -> None:
    written.drop(written.part(0))


def overwrite(written: Written) -> None:
    other = written.watched.store.get(written.part(1))
    written.put(0, other)


def cut(written: Written) -> None:
    written.put(0, written.get(0)[:-100])


def mend_what_was_cut(written: Written) -> None:
    whole = written.get(0)
    written.put(0, whole[:-100])
    written.watched.look()
    written.put(0, whole)


def add_errors(written: Written) -> None:
    written.add(2 * ROWS_OF_A_PART, SampleError("image_missing", "none"))


def add_too_much(written: Written) -> None:
    written.add(ROWS_OF_A_PART - 1, make_generation())


def mark_early(written: Written) -> None:
    part, data = written.part(1), written.get(1)
    written.drop(part)
    written.mark(2, 2 * ROWS_OF_A_PART)
    written.watched.look()
    written.watched.store.put(part, data)


def mark_wrong(written: Written) -> None:
    written.mark(2, 2 * ROWS_OF_A_PART + 1)


def do_nothing(written: Written) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (do_nothing, {}),
        (lose, {"lost": 4, "vanished": 1, "wrong_marks": 1}),
        (overwrite, {"lost": 4, "twice": 4, "overwritten": 1}),
        (cut, {"lost": 4, "half_written": 2, "overwritten": 1}),
        (mend_what_was_cut, {"half_written": 1, "overwritten": 2}),
        (add_errors, {"twice": 4, "errors": 4, "wrong_marks": 1}),
        (add_too_much, {"twice": 4, "wrong_marks": 1}),
        (mark_early, {"wrong_marks": 1}),
        (mark_wrong, {"wrong_marks": 1}),
    ],
)
def test_judge_finds_what_is_wrong(written: Written, spoil: Callable[[Written], None], found: dict[str, int]) -> None:
    written.mark(2, 2 * ROWS_OF_A_PART)
    spoil(written)
    judged = written.watched.judge(2 * ROWS_OF_A_PART)
    assert {name: judged[name] for name in WRONG if judged[name]} == found


def test_judge_of_no_manifest_is_wrong(written: Written) -> None:
    assert written.watched.judge(2 * ROWS_OF_A_PART)["wrong_marks"] == 1


def test_draw_gives_a_seed_the_same_faults_and_ten_seeds_every_kind() -> None:
    for engine in ("simulated", "vllm"):
        faults = find_faults(engine)
        runs = [draw(seed, faults, 30) for seed in range(1, 11)]
        assert runs == [draw(seed, faults, 30) for seed in range(1, 11)]
        assert {one.fault for run in runs for one in run} == set(faults)
    assert {"kill_engine", "stop_engine"} == set(find_faults("vllm")) - set(find_faults("simulated"))
