"""The narrowing of suspects: how many engines a guilty row costs, and that no other row is found guilty."""

import random

import pytest

from pipeline.errors import SampleError
from pipeline.suspects import DEATHS_OF_A_SUSPECT, MAX_DEATHS_OF_A_ROW, MAX_KEPT, Result, Suspects, split
from tests.builders import make_generation

CHUNK = "chunk"


def run_chunk(suspects: Suspects, num_rows: int, guilty: set[int]) -> tuple[dict[int, Result], int]:
    """Answer a chunk as an actor would, with an engine that dies of `guilty`; gives results and deaths."""
    deaths = 0
    while True:
        trial = suspects.trial(CHUNK, range(num_rows))
        if trial is None:
            if not guilty:
                return dict.fromkeys(range(num_rows), make_generation()), deaths
            suspects.charge(CHUNK, None)
            deaths += 1
            continue
        results = dict(trial.results)
        for rows in trial.groups:
            if guilty & set(rows):
                suspects.charge(CHUNK, rows)
                deaths += 1
                break
            answered: dict[int, Result] = dict.fromkeys(rows, make_generation())
            suspects.keep(CHUNK, answered)
            results |= answered
        else:
            return results, deaths


@pytest.mark.parametrize("num_rows", [1, 2, 16, 17, 64, 256, 1000])
@pytest.mark.parametrize("num_guilty", [1, 2, 5])
def test_guilty_rows_alone_become_errors_within_the_bound(num_rows: int, num_guilty: int) -> None:
    rng = random.Random(num_rows * 10 + num_guilty)
    guilty = set(rng.sample(range(num_rows), min(num_guilty, num_rows)))
    suspects = Suspects()
    results, deaths = run_chunk(suspects, num_rows, guilty)
    assert {row for row, result in results.items() if isinstance(result, SampleError)} == guilty
    assert set(results) == set(range(num_rows))
    assert deaths <= DEATHS_OF_A_SUSPECT + 1 + (MAX_DEATHS_OF_A_ROW - DEATHS_OF_A_SUSPECT - 1) * len(guilty)
    suspects.done(CHUNK)
    again, more_deaths = run_chunk(suspects, num_rows, guilty)
    assert more_deaths == 0, "an answer that was lost on its way costs no engine again"
    assert again == results


def test_only_the_latest_suspects_are_kept() -> None:
    suspects = Suspects()
    for number in range(MAX_KEPT + 5):
        suspects.charge(str(number), None)
        suspects.charge(str(number), None)
        suspects.done(str(number))
    kept = [number for number in range(MAX_KEPT + 5) if suspects.trial(str(number), range(4)) is not None]
    assert kept == list(range(5, MAX_KEPT + 5))


def test_a_chunk_of_one_death_is_no_suspect() -> None:
    suspects = Suspects()
    suspects.charge(CHUNK, None)
    assert suspects.trial(CHUNK, range(4)) is None


def test_a_single_row_that_dies_once_by_chance_is_answered() -> None:
    suspects = Suspects()
    for _ in range(DEATHS_OF_A_SUSPECT):
        suspects.charge(CHUNK, None)
    assert suspects.trial(CHUNK, range(3)) is not None
    suspects.charge(CHUNK, (0, 1, 2))
    suspects.charge(CHUNK, (1,))
    trial = suspects.trial(CHUNK, range(3))
    assert trial is not None
    assert trial.groups == ((0,), (2,), (1,)), "the others first"
    assert trial.results == {}


def test_a_row_that_had_an_error_when_it_was_read_before_is_tried_too() -> None:
    suspects = Suspects()
    for _ in range(DEATHS_OF_A_SUSPECT):
        suspects.charge(CHUNK, None)
    suspects.trial(CHUNK, [0, 2])
    trial = suspects.trial(CHUNK, [0, 1, 2])
    assert trial is not None
    assert trial.groups == ((0, 2), (1,))
    empty = suspects.trial("other", [])
    assert empty is None


def test_a_row_that_was_answered_is_the_control() -> None:
    suspects = Suspects()
    for _ in range(DEATHS_OF_A_SUSPECT):
        suspects.charge(CHUNK, None)
    first = suspects.trial(CHUNK, range(40))
    assert first is not None
    assert first.control is None
    suspects.charge(CHUNK, tuple(range(40)))
    suspects.keep(CHUNK, {16: make_generation()})
    second = suspects.trial(CHUNK, range(40))
    assert second is not None
    assert second.control == 16


@pytest.mark.parametrize("num_rows", [2, 16, 17, 256, 1000])
def test_split_keeps_every_row_once_in_order(num_rows: int) -> None:
    rows = tuple(range(5, 5 + num_rows))
    groups = split(rows)
    assert [row for group in groups for row in group] == list(rows)
    assert all(0 < len(group) < num_rows for group in groups)
