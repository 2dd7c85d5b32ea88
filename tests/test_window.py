"""`Window`: how many rows are sent at once, as a deployment takes more or fewer. No Ray and no clock.

Time goes in rounds: the rows that were taken are answered at the end of their round.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.engine.window import FIRST_SIZE, NotNowError, Window


class Server:
    """Takes `room` rows in a round."""

    def __init__(self, window: Window, room: int) -> None:
        self.window, self.room = window, room
        self.num_held = self.num_refused = 0
        self._end = asyncio.Event()

    async def answer(self) -> None:
        """One row."""
        if self.num_held >= self.room:
            self.num_refused += 1
            raise NotNowError("full")
        self.num_held += 1
        await self._end.wait()

    async def play_round(self) -> tuple[int, int]:
        """How many rows were held and how many refused."""
        for _ in range(8):  # turns of the event loop, for all that can move to have moved
            await asyncio.sleep(0)
        played = (self.num_held, self.num_refused)
        self.num_held = self.num_refused = 0
        self._end.set()
        self._end = asyncio.Event()
        return played


@contextmanager
def rows_waiting(server: Server, num_rows: int) -> Iterator[list["asyncio.Task[None]"]]:
    rows = [asyncio.create_task(server.window.send(server.answer)) for _ in range(num_rows)]
    try:
        yield rows
    finally:
        for row in rows:
            row.cancel()


async def play(server: Server, num_rounds: int) -> list[tuple[int, int]]:
    return [await server.play_round() for _ in range(num_rounds)]


@pytest.mark.parametrize(("room", "most"), [(1, 256), (8, 256), (100, 256), (1000, 256), (1000, 4)])
def test_window_finds_the_room_and_answers_every_row(room: int, most: int) -> None:
    async def run() -> None:
        window = Window(most)
        server = Server(window, room)
        with rows_waiting(server, 1500) as rows:
            held = []
            while not all(row.done() for row in rows):
                held.append((await server.play_round())[0])
        assert max(held) <= min(room, most)
        steady = held[8:-8]
        assert not steady or sum(steady) / len(steady) >= 0.85 * min(room, most)
        assert (window.num_inside, window.num_waiting) == (0, 0)

    asyncio.run(run())


def test_window_first_sends_few_and_is_at_its_most_after_some_rounds() -> None:
    async def run() -> list[tuple[int, int]]:
        server = Server(Window(256), 1000)
        with rows_waiting(server, 3000):
            return await play(server, 6)

    held = [held for held, _ in asyncio.run(run())]
    assert held[0] == FIRST_SIZE
    assert held[-1] == 256
    assert held == sorted(held)


def test_window_narrows_when_people_come_asks_little_and_widens_when_they_leave() -> None:
    async def run() -> tuple[list[tuple[int, int]], ...]:
        server = Server(Window(256), 1000)
        with rows_waiting(server, 5000):
            await play(server, 8)
            server.room = 8
            at_once, busy = await play(server, 8), await play(server, 30)
            server.room = 1000
            return at_once, busy, await play(server, 10)

    at_once, busy, quiet = asyncio.run(run())
    assert [held for held, _ in at_once + busy] == [8] * 38
    assert sum(refused for _, refused in busy) <= 30 * 3  # thousands wait
    assert quiet[-1] == (256, 0)


def test_window_while_all_is_refused_asks_with_one_row_and_then_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engine.window.MAX_PAUSE_S", 0.0)

    async def run() -> None:
        server = Server(Window(256), 0)
        with rows_waiting(server, 1000) as rows:
            await play(server, 3)
            for _ in range(5):
                await server.play_round()
                assert (server.window.num_inside, server.window.num_waiting) == (1, 999)
            server.room = 1000
            while not all(row.done() for row in rows):
                await server.play_round()

    asyncio.run(run())


def test_window_row_that_fails_otherwise_raises_at_once() -> None:
    calls = 0

    async def fail() -> None:
        nonlocal calls
        calls += 1
        raise ValueError("no")

    window = Window(2)
    with pytest.raises(ValueError, match="no"):
        asyncio.run(window.send(fail))
    assert (calls, window.num_inside, window.size) == (1, 0, 2)


def test_window_rows_given_up_leave_their_places_to_those_that_wait() -> None:
    async def run() -> None:
        window = Window(2)
        server = Server(window, 1000)
        with rows_waiting(server, 5) as rows:
            while window.num_waiting < 3:
                await asyncio.sleep(0)
            for row in (rows[0], rows[2]):  # one that is sent, one that waits
                row.cancel()
            await play(server, 4)
            assert [row.cancelled() for row in rows] == [True, False, True, False, False]
            await asyncio.gather(rows[1], rows[3], rows[4])
        assert (window.num_inside, window.num_waiting) == (0, 0)

    asyncio.run(run())
