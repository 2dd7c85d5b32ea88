"""Who lets an engine go for whom, by the clock of the test."""

import pytest

from pipeline.shares import FORGOTTEN_S, GIVE_WAY_S, REPORT_S, Shares

PATIENCE_S = 60.0


class Cluster:
    """Jobs by name, each with its GPUs; they report in turn."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.shares = Shares(lambda: self.now)

    def report(self, name: str, gpus: float, wants: bool = True, size: float = 1, patience: float | None = 60) -> bool:
        return self.shares.report(name, gpus, size, wants, patience)

    def wait_until_a_yields(self, b_gpus: float) -> int:
        """How many reports it takes."""
        for number in range(100):
            self.report("b", b_gpus)
            if self.report("a", 8):
                return number
            self.now += REPORT_S
        pytest.fail("a lets nothing go")

    def play(self, gpus: dict[str, float], rounds: int, least: int) -> list[dict[str, float]]:
        """Rounds of reports; what one lets go, the job that waits with fewest gets."""
        history = []
        for _ in range(rounds):
            self.now += REPORT_S
            for name in list(gpus):
                if self.report(name, gpus[name], gpus[name] < least):
                    gpus[name] -= 1
                    gpus[min(gpus, key=gpus.__getitem__)] += 1
            history.append(dict(gpus))
        return history


def test_a_job_alone_keeps_everything() -> None:
    cluster = Cluster()
    for _ in range(20):
        cluster.now += REPORT_S
        assert not cluster.report("a", 8)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ({"a": 4, "b": 0}, {"a": 2, "b": 2}),
        ({"a": 5, "b": 0}, {"a": 3, "b": 2}),
        ({"a": 6, "b": 0, "c": 0}, {"a": 2, "b": 2, "c": 2}),
        ({"a": 1, "b": 0}, {"a": 1, "b": 0}),
    ],
)
def test_jobs_end_with_equal_shares_and_stay_there(start: dict[str, float], end: dict[str, float]) -> None:
    history = Cluster().play(dict(start), 100, least=8)
    assert history[4] == start  # nobody has waited long enough
    assert history[-1] == end
    assert history[-1] == history[-20]


def test_nothing_goes_to_a_job_that_wants_no_more() -> None:
    cluster = Cluster()
    for _ in range(20):
        cluster.now += REPORT_S
        assert not cluster.report("b", 1, wants=False)
        assert not cluster.report("a", 7)


def test_nothing_goes_to_a_job_whose_engines_are_larger_or_that_has_ended() -> None:
    cluster = Cluster()
    for _ in range(20):
        cluster.now += REPORT_S
        cluster.report("b", 0, size=4)
        assert not cluster.report("a", 8)
    cluster.report("c", 0)
    cluster.now += PATIENCE_S + FORGOTTEN_S
    assert not cluster.report("a", 8)


def test_who_never_yields_does_not() -> None:
    cluster = Cluster()
    for _ in range(20):
        cluster.now += REPORT_S
        cluster.report("b", 0)
        assert not cluster.report("a", 8, patience=None)


def test_one_engine_goes_at_a_time_and_the_next_when_it_was_taken_and_more_is_wanted() -> None:
    cluster = Cluster()
    assert cluster.wait_until_a_yields(b_gpus=0) == 6
    for _ in range(30):  # it finishes what it has begun
        cluster.now += REPORT_S
        cluster.report("b", 0)
        assert not cluster.report("a", 7)
    assert cluster.shares.owes("a")
    assert not cluster.shares.owes("b")
    cluster.report("b", 1)
    assert not cluster.shares.owes("a")
    assert cluster.wait_until_a_yields(b_gpus=1) < 10


def test_a_gpu_is_kept_free_for_a_minute_from_its_departure_and_then_no_more_until_something_changes() -> None:
    cluster = Cluster()
    cluster.wait_until_a_yields(b_gpus=0)
    for _ in range(20):
        cluster.now += REPORT_S
        cluster.report("b", 0)
        cluster.report("a", 7)
    left = cluster.now
    while cluster.shares.owes("a") and cluster.now < left + 2 * GIVE_WAY_S:
        cluster.now += REPORT_S
        cluster.report("b", 0)
        cluster.report("a", 7)
    assert cluster.now == left + GIVE_WAY_S
    for _ in range(30):
        cluster.now += REPORT_S
        cluster.report("b", 0)
        assert not cluster.report("a", 8)
    cluster.report("b", 0, wants=False)
    assert cluster.wait_until_a_yields(b_gpus=0) == 6


def test_the_job_with_most_yields_whoever_reports_first() -> None:
    cluster = Cluster()
    for _ in range(10):
        cluster.now += REPORT_S
        cluster.report("c", 0)
        assert not cluster.report("b", 4, wants=False)
        if cluster.report("a", 8, wants=False):
            break
    else:
        pytest.fail("nobody let an engine go")


def test_shares_of_gpus_are_compared_without_their_rounding() -> None:
    cluster = Cluster()
    for _ in range(10):
        cluster.now += REPORT_S
        cluster.report("b", 0.3, size=0.3)
        if cluster.report("a", 3 * 0.3, size=0.3):
            break
    else:
        pytest.fail("nobody let an engine go")
