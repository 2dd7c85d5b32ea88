"""What the watch makes of what it is told, without Ray: who is blamed, who is killed, when a job has had enough."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from types import SimpleNamespace

import pytest
from ray.exceptions import RayError

from pipeline.deaths import MAX_DEATHS_IN_A_ROW, MAX_UNSTARTED
from pipeline.lives import Life
from pipeline.sharing import MAX_SILENCES, Pool, Sharing, has_room
from pipeline.spec import LimitsSpec
from pipeline.suspects import DEATHS_OF_A_SUSPECT
from pipeline.watch import Watch

ROWS = [0, 1, 2]


class Cluster:
    """Nodes that are gone, and processes that were killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gone: set[str] = set()
        self.killed: list[Life] = []
        self.ended: set[Life] = set()
        self.kills_fail = 0
        self.draining: frozenset[str] | None = frozenset()
        monkeypatch.setattr("pipeline.watch.find_draining", self.find_draining)
        monkeypatch.setattr("pipeline.watch.is_node_alive", lambda node_id: node_id not in self.gone)
        monkeypatch.setattr("pipeline.watch.kill_there", self.kill)

    def find_draining(self) -> frozenset[str]:
        if self.draining is None:
            raise TimeoutError("the cluster does not answer")
        return self.draining

    async def kill(self, life: Life) -> bool:
        if life.node_id in self.gone:
            raise RayError("it cannot be reached")
        if self.kills_fail:
            self.kills_fail -= 1
            raise RayError("the task was lost")
        self.killed.append(life)
        return life not in self.ended


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def life(number: int, owner: str = "actor", node: str = "node") -> Life:
    return Life(owner, node, number, float(number))


async def start(watch: Watch, one: Life) -> str | None:
    await watch.place(one)
    reason = await watch.enter(one)
    await watch.ready(one)
    return reason


class ReadyShares:
    """The cluster's shares, which say the same to everybody."""

    def __init__(self) -> None:
        self.yields = False
        self.reports: list[tuple[object, ...]] = []
        self.owed = True
        self.report = SimpleNamespace(remote=self._report)
        self.owes = SimpleNamespace(remote=self._owes)

    async def _report(self, *report: object) -> bool:
        self.reports.append(report)
        return self.yields

    async def _owes(self, job: str) -> bool:
        return self.owed

    async def next(self) -> tuple[object, ...]:
        """The first report that is begun from now on."""
        seen = len(self.reports)
        while len(self.reports) < seen + 2:  # the next one may be under way
            await asyncio.sleep(0.01)
        return self.reports[-1]


def run(play: Callable[[Watch], Awaitable[None]], **limits: float) -> None:
    async def main() -> None:
        watch = Watch(LimitsSpec.model_validate(limits))
        await watch.open()
        await play(watch)

    asyncio.run(main())


def test_chunks_of_two_deaths_get_a_trial(cluster: Cluster) -> None:
    async def play(watch: Watch) -> None:
        for number in range(DEATHS_OF_A_SUSPECT):
            await start(watch, life(number))
            assert await watch.begin(life(number), "a", "a", ROWS) is None
            await watch.died(life(number), "it died")
            await watch.try_rows(life(number), "b", "b", (0,))  # a late word of a life that is over
        await start(watch, life(9))
        assert await watch.begin(life(9), "a", "a", ROWS) is not None
        assert await watch.begin(life(9), "b", "b", ROWS) is None
        assert (await watch.count())[:2] == (DEATHS_OF_A_SUSPECT, 0)

    run(play)


def test_an_engine_that_left_before_its_node_went_was_not_lost(cluster: Cluster) -> None:
    async def play(watch: Watch) -> None:
        for number, node in enumerate(("left", "lost", "last")):
            await start(watch, life(number, node=node))
            if node == "left":
                await watch.depart(life(number, node=node))
            cluster.gone.add(node)
        assert (await watch.count())[:2] == (0, 1)

    run(play)


def test_what_went_with_its_node_is_blamed_for_nothing(cluster: Cluster) -> None:
    async def play(watch: Watch) -> None:
        for number in range(5):
            assert await start(watch, life(number, node=f"node-{number}")) is None
            assert await watch.begin(life(number, node=f"node-{number}"), "a", "a", ROWS) is None
            cluster.gone.add(f"node-{number}")
        await start(watch, life(9, node="last"))
        assert (await watch.count())[:2] == (0, 5)

    run(play, max_engine_restarts=0)


def test_an_actor_that_left_or_that_the_pool_let_go_is_no_death(cluster: Cluster) -> None:
    async def play(watch: Watch) -> None:
        await start(watch, life(1))
        await watch.begin(life(1), "a", "a", ROWS)
        await watch.depart(life(1))
        await start(watch, life(2))
        assert await start(watch, life(3)) is None
        assert (await watch.count())[:2] == (0, 0)

    run(play, max_engine_restarts=0)


def test_too_many_deaths_are_told_with_what_was_in_the_engines(cluster: Cluster) -> None:
    async def play(watch: Watch) -> None:
        for number in range(3):
            await start(watch, life(number, owner=f"actor-{number}"))
            await watch.begin(life(number, owner=f"actor-{number}"), f"c{number}", f"shard {number}", ROWS)
            await watch.died(life(number, owner=f"actor-{number}"), "it was killed")
        reason = await watch.enter(life(9))
        assert reason is not None
        assert "3 engines died, more than limits.max_engine_restarts = 2 allows" in reason
        assert "it was killed; in it: shard 2" in reason

    run(play, max_engine_restarts=2)


@pytest.mark.parametrize("answers", [True, False])
def test_deaths_in_a_row_end_the_job_unless_something_is_answered_between(cluster: Cluster, answers: bool) -> None:
    async def play(watch: Watch) -> None:
        for number in range(MAX_DEATHS_IN_A_ROW):
            assert await start(watch, life(number)) is None
            await watch.begin(life(number), f"chunk-{number}", "a", ROWS)
            if answers:
                await watch.end(life(number), f"chunk-{number}")
                await watch.begin(life(number), f"other-{number}", "a", ROWS)
            await watch.died(life(number), "it died")
        assert (await watch.enter(life(99)) is None) is answers

    run(play)


def test_silent_processes_are_killed_and_others_not(cluster: Cluster) -> None:
    async def play(watch: Watch) -> None:
        silent, loud, reader, gone = life(1, "silent"), life(2, "loud"), life(3, "reader"), life(4, "gone", "away")
        for engine in (silent, loud, gone):
            await start(watch, engine)
        await watch.begin(silent, "a", "a", ROWS)
        await watch.beat(reader)
        cluster.gone.add("away")
        for _ in range(15):
            await watch.beat(loud)
            await asyncio.sleep(0.1)
        assert set(cluster.killed) == {silent, reader}
        assert (await watch.count())[:2] == (1, 1)

    run(play, stall_timeout_s=1)


def test_the_engine_that_came_last_leaves_when_another_job_waits(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares, free = ReadyShares(), [0.0]
    monkeypatch.setattr("pipeline.sharing.find_shares", lambda: shares)
    monkeypatch.setattr("pipeline.watch.REPORT_S", 0.05)
    monkeypatch.setattr("pipeline.watch.has_room", lambda gpus, draining: free[0] >= gpus)
    monkeypatch.setattr("pipeline.watch.ray.get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: "job"))
    first, last, reader = life(1, "first"), life(2, "last"), life(3, "reader")

    async def play() -> None:
        watch = Watch(LimitsSpec(), Pool(gpus_per_engine=2, min_engines=2))
        await watch.open()
        shares.owed = False
        await watch.beat(reader)
        assert await shares.next() == ("job", 0, 2, True, 120.0)
        await start(watch, first)
        assert await shares.next() == ("job", 2, 2, True, 120.0)
        free[0] = 2.0
        assert await shares.next() == ("job", 2, 2, False, 120.0)  # Ray gives it those
        free[0] = 0.0
        shares.owed = False
        await watch.place(last)
        assert await shares.next() == ("job", 4, 2, False, 120.0)
        await start(watch, last)
        assert not any([await watch.beat(one) for one in (first, last, reader)])
        shares.yields = True
        while not await watch.beat(last):
            await asyncio.sleep(0.01)
        shares.yields = False
        assert not any([await watch.beat(one) for one in (first, reader)])
        assert await shares.next() == ("job", 2, 2, True, 120.0)  # what leaves is no longer this job's
        await watch.depart(last)
        shares.owed = True
        again, later = life(4, "last"), life(5, "last")
        await watch.place(again)  # before the other job took what was let go
        await watch.enter(again)
        assert await watch.beat(again)
        await watch.depart(again)
        shares.owed = False
        await watch.place(later)
        await watch.enter(later)
        assert not await watch.beat(later)
        assert (await watch.count())[:2] == (0, 0)

    asyncio.run(play())


def test_engines_leave_a_node_that_drains_within_the_grace(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.watch.LOOK_S", 0.02)
    going, staying = life(1, "going", "old"), life(2, "staying", "new")

    async def play(watch: Watch) -> None:
        for one in (going, staying):
            await start(watch, one)
        await asyncio.sleep(0.1)
        assert [await watch.beat(one) for one in (going, staying)] == [None, None]
        cluster.draining = frozenset({"old"})
        await asyncio.sleep(0.1)
        assert [await watch.beat(one) for one in (going, staying)] == [7, None]
        cluster.draining = None
        await asyncio.sleep(0.1)
        cluster.draining = frozenset({"new"})
        await asyncio.sleep(0.1)
        assert [await watch.beat(one) for one in (going, staying)] == [None, 7]

    run(play, preemption_grace_s=7)


def test_passes_that_end_their_processes_are_counted(cluster: Cluster) -> None:
    async def play(watch: Watch) -> None:
        assert await watch.read(life(1), "a") == 0
        assert await watch.read(life(1), "b") == 0
        assert await watch.read(life(2), "a") == 1
        assert await watch.read(life(2), "a") == 1, "it is the same process"
        await watch.has_read(life(1), "a")  # a late word
        assert await watch.read(life(3, node="gone"), "a") == 2
        cluster.gone.add("gone")
        assert await watch.read(life(4), "a") == 2, "its node is gone"
        await watch.has_read(life(4), "a")
        assert await watch.read(life(5), "a") == 2, "it had come to its end"
        assert await watch.read(life(5), "b") == 1

    run(play)


def test_shares_that_say_nothing_hold_up_no_engine_and_are_ended(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silence(*said: object) -> bool:
        await asyncio.sleep(60)
        return True

    silent, ready = ReadyShares(), ReadyShares()
    silent.report.remote = silent.owes.remote = silence
    of_cluster, ended = [silent, ready], []

    def end(shares: ReadyShares) -> None:
        ended.append(shares)
        of_cluster.remove(shares)

    monkeypatch.setattr("pipeline.sharing.find_shares", lambda: of_cluster[0])
    monkeypatch.setattr("pipeline.sharing.ray.kill", end)
    monkeypatch.setattr("pipeline.watch.REPORT_S", 0.05)
    monkeypatch.setattr("pipeline.sharing.ANSWER_S", 0.05)
    monkeypatch.setattr("pipeline.watch.has_room", lambda gpus, draining: False)
    monkeypatch.setattr("pipeline.watch.ray.get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: "job"))

    async def play() -> None:
        watch = Watch(LimitsSpec(), Pool(gpus_per_engine=1, min_engines=1))
        await watch.open()
        async with asyncio.timeout(5):
            await watch.place(life(1))
            assert not await watch.beat(life(1))
            await ready.next()
        assert ended == [silent]

    asyncio.run(play())


def test_engines_that_ask_shares_in_vain_end_none(monkeypatch: pytest.MonkeyPatch) -> None:
    shares, answers = ReadyShares(), [True]

    async def silence(*said: object) -> bool:
        if answers[0]:
            return True
        await asyncio.sleep(60)
        return True

    def end(shares: object) -> None:
        raise AssertionError("they were ended")

    shares.owes.remote = silence
    monkeypatch.setattr("pipeline.sharing.find_shares", lambda: shares)
    monkeypatch.setattr("pipeline.sharing.ray.kill", end)
    monkeypatch.setattr("pipeline.sharing.ANSWER_S", 0.05)

    async def play() -> None:
        sharing = Sharing("job")
        assert not await sharing.owes(), "nothing was reported"
        await sharing.report(1, 1, False, None)
        assert await sharing.owes()
        answers[0] = False
        assert not any(await asyncio.gather(*(sharing.owes() for _ in range(2 * MAX_SILENCES))))
        answers[0] = True
        assert await sharing.owes()

    asyncio.run(play())


def test_shares_that_answer_now_and_then_are_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    shares, calls = ReadyShares(), count()

    async def now_and_then(*said: object) -> bool:
        if next(calls) % MAX_SILENCES:
            await asyncio.sleep(60)
        return True

    def end(shares: object) -> None:
        raise AssertionError("they were ended")

    shares.report.remote = now_and_then
    monkeypatch.setattr("pipeline.sharing.find_shares", lambda: shares)
    monkeypatch.setattr("pipeline.sharing.ray.kill", end)
    monkeypatch.setattr("pipeline.sharing.ANSWER_S", 0.01)

    async def play() -> list[bool]:
        sharing = Sharing("job")
        return [await sharing.report(1, 1, False, None) for _ in range(3 * MAX_SILENCES)]

    assert sum(asyncio.run(play())) == 3


@pytest.mark.parametrize(
    ("nodes", "draining", "fits"),
    [
        ({"a": {"GPU": 2.0, "CPU": 0.25}}, set(), True),
        ({"a": {"GPU": 1.0, "CPU": 8.0}, "b": {"GPU": 1.0, "CPU": 8.0}}, set(), False),
        ({"a": {"GPU": 2.0, "CPU": 0.2}, "b": {"CPU": 8.0}}, set(), False),
        ({"a": {"GPU": 2.0, "CPU": 1.0}}, {"a"}, False),
        ({"a": {"GPU": 2.0, "CPU": 1.0}, "b": {"GPU": 2.0, "CPU": 1.0}}, {"a"}, True),
        ({}, set(), False),
    ],
)
def test_room_is_on_one_node_that_stays(
    monkeypatch: pytest.MonkeyPatch, nodes: dict[str, dict[str, float]], draining: set[str], fits: bool
) -> None:
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: nodes)
    assert has_room(2, draining) is fits


def test_engines_that_never_start_end_the_job_unless_one_has_started(cluster: Cluster) -> None:
    async def play(watch: Watch) -> None:
        reasons = []
        for number in range(MAX_UNSTARTED + 1):
            reasons.append(await watch.enter(life(number, f"actor-{number}")))
            await watch.died(life(number, f"actor-{number}"), "it ran out of memory")
        assert reasons[:-1] == [None] * MAX_UNSTARTED
        assert "engines died as they started" in str(reasons[-1])
        assert "it ran out of memory" in str(reasons[-1])
        await start(watch, life(99, "good"))
        assert await watch.enter(life(100, "another")) is None

    run(play)


def test_what_gives_no_sign_holds_no_gpus(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    shares, asked = ReadyShares(), count()
    shares.owed = False

    def has_room_or_fail(gpus: float, draining: frozenset[str]) -> bool:
        if next(asked) == 0:
            raise RuntimeError("the cluster does not answer")
        return False

    monkeypatch.setattr("pipeline.sharing.find_shares", lambda: shares)
    monkeypatch.setattr("pipeline.watch.REPORT_S", 0.05)
    monkeypatch.setattr("pipeline.watch.has_room", has_room_or_fail)
    monkeypatch.setattr("pipeline.watch.ray.get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: "job"))

    async def play() -> None:
        watch = Watch(LimitsSpec(stall_timeout_s=1), Pool(gpus_per_engine=1, min_engines=2))
        await watch.open()
        await start(watch, life(1, "a"))
        await start(watch, life(2, "b"))
        await start(watch, life(3, "b"))  # its process had died without a word
        assert (await shares.next())[1] == 2
        await asyncio.sleep(0.4)
        await watch.beat(life(1, "a"), is_engine=True)
        assert (await shares.next())[1] == 1

    asyncio.run(play())


def test_a_watch_that_is_new_learns_of_engines_by_their_beats(cluster: Cluster) -> None:
    async def play(watch: Watch) -> None:
        await watch.beat(life(1, "a"), is_engine=True)
        await watch.beat(life(2, "reader"))
        assert len(watch._staying()) == 1

    run(play)


def test_an_engine_that_never_starts_is_killed_though_its_process_lives(cluster: Cluster) -> None:
    async def play(watch: Watch) -> None:
        await watch.enter(life(1, "stuck"))
        await start(watch, life(2, "ready"))
        for _ in range(15):
            await watch.beat(life(1, "stuck"))
            await watch.beat(life(2, "ready"))
            await watch.beat(life(3, "reader"))
            await asyncio.sleep(0.1)
        assert cluster.killed == [life(1, "stuck")]
        assert (await watch.count())[:2] == (1, 0)

    run(play, stall_timeout_s=1, start_timeout_s=0.5)


def test_an_actor_that_hangs_while_it_leaves_is_killed_and_no_death(cluster: Cluster) -> None:
    async def play(watch: Watch) -> None:
        await start(watch, life(1))
        await watch.begin(life(1), "a", "a", ROWS)
        await watch.depart(life(1))
        await asyncio.sleep(1.5)
        assert cluster.killed == [life(1)]
        assert (await watch.count())[:2] == (0, 0)

    run(play, stall_timeout_s=1)


def test_a_kill_that_fails_on_a_node_that_lives_is_tried_again(cluster: Cluster) -> None:
    async def play(watch: Watch) -> None:
        cluster.kills_fail = 1
        await watch.beat(life(1))
        await asyncio.sleep(2.5)
        assert cluster.killed == [life(1)]

    run(play, stall_timeout_s=1)
