"""`BatchRows`: how many rows of jobs a replica takes, by what people ask of it. The clock is the test's own."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from deployments.admission import DOUBLING_S, BatchRows
from deployments.settings import ScalingSettings, ServeSettings
from pipeline.errors import BusyError
from pipeline.spec import EngineSpec


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def rows_of(max_num_seqs: int, beside: int, clock: Clock | None = None) -> BatchRows:
    scaling = ScalingSettings(batch_rows_beside_requests=beside)
    settings = ServeSettings(engine=EngineSpec(max_num_seqs=max_num_seqs), scaling=scaling)
    return BatchRows(settings, clock or Clock())


@pytest.mark.parametrize(
    ("max_num_seqs", "beside", "quiet", "busy"),
    [(256, 8, 224, 8), (64, 8, 56, 8), (8, 2, 7, 2), (8, 8, 7, 7), (4, 1, 3, 1), (2, 8, 1, 1), (1, 8, 1, 1)],
)
def test_limit_leaves_people_a_reserve_and_rows_at_least_one(
    max_num_seqs: int, beside: int, quiet: int, busy: int
) -> None:
    rows = rows_of(max_num_seqs, beside)
    assert rows.limit == quiet
    rows.enter()
    assert rows.limit == busy


def test_limit_is_low_until_the_last_of_several_requests_is_over_and_then_grows_with_the_quiet() -> None:
    clock = Clock()
    rows = rows_of(256, 8, clock)
    rows.enter()
    rows.enter()
    rows.leave()
    clock.now += 1000
    assert rows.limit == 8
    rows.leave()
    grown = []
    for _ in range(7):
        grown.append(rows.limit)
        clock.now += DOUBLING_S
    assert grown == [8, 16, 32, 64, 128, 224, 224]
    clock.now += 1e9
    assert rows.limit == 224
    rows.enter()
    assert rows.limit == 8


def test_admit_counts_rows_and_refuses_at_once_until_one_ends() -> None:
    rows = rows_of(8, 2)
    rows.enter()

    async def fill() -> None:
        async with AsyncExitStack() as places:
            await places.enter_async_context(rows.admit())
            async with rows.admit():
                with pytest.raises(BusyError):
                    await places.enter_async_context(rows.admit())
                assert rows.rows == 2
            await places.enter_async_context(rows.admit())
            assert rows.rows == 2

    asyncio.run(fill())
    assert rows.rows == 0


def test_admit_row_that_fails_or_is_given_up_leaves_its_place() -> None:
    rows = rows_of(8, 2)

    async def hold(error: BaseException) -> None:
        async with rows.admit():
            raise error

    for error in (ValueError("a row"), asyncio.CancelledError()):
        with pytest.raises(type(error)):
            asyncio.run(hold(error))
        assert rows.rows == 0


def test_admit_rows_that_run_when_people_come_stay_and_no_other_is_taken() -> None:
    rows = rows_of(8, 2)

    async def run() -> None:
        async with AsyncExitStack() as places:
            for _ in range(5):
                await places.enter_async_context(rows.admit())
            rows.enter()
            assert rows.rows == 5
            with pytest.raises(BusyError):
                await places.enter_async_context(rows.admit())
            rows.leave()

    asyncio.run(run())
