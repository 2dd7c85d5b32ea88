"""What Ray's job server does rarely: a client with a script stands in for it. The real one is in `test_submit.py`."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from ray.job_submission import JobStatus

import jobs.ray_jobs
from jobs.ray_jobs import Cluster, Ended, Running
from jobs.shipping import Shipment
from jobs.submit import Call, Identity, attach, connect, ship, show_result
from pipeline.errors import JobError, SpecError

LOG = "one line\n"


class Script:
    """A job server by what it answers; the last answer of each list is repeated."""

    def __init__(self, *infos: Any, stops: tuple[bool, ...] = (True,), log: str | Exception = LOG) -> None:
        self.infos, self.stops, self.log = list(infos), list(stops), log
        self.asked_to_stop = 0
        self.sent: Callable[..., Any] = lambda **_: None

    def list_jobs(self) -> list[Any]:
        return []

    def get_job_info(self, job_id: str) -> Any:
        return self.infos.pop(0) if len(self.infos) > 1 else self.infos[0]

    def stop_job(self, job_id: str) -> bool:
        self.asked_to_stop += 1
        return self.stops.pop(0) if len(self.stops) > 1 else self.stops[0]

    def submit_job(self, **said: Any) -> None:
        self.sent(**said)

    def get_job_logs(self, job_id: str) -> str:
        if isinstance(self.log, Exception):
            raise self.log
        return self.log

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield self.get_job_logs(job_id)


def info(status: JobStatus, start_time: int = 1, message: str = "", exit_code: int | None = None) -> Any:
    return SimpleNamespace(
        status=status, start_time=start_time, message=message, driver_exit_code=exit_code, metadata={}
    )


@pytest.fixture
def cluster_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], Cluster]:
    monkeypatch.setattr("jobs.ray_jobs.time.sleep", lambda _: None)

    def make(script: Script) -> Cluster:
        monkeypatch.setattr(jobs.ray_jobs, "_Client", lambda _: script)
        return Cluster("http://head:8265", 0)

    return make


def test_stop_asks_until_there_is_a_process_and_then_waits(cluster_of: Callable[[Script], Cluster]) -> None:
    pending, running = info(JobStatus.PENDING), info(JobStatus.RUNNING)
    script = Script(pending, pending, running, running, info(JobStatus.STOPPED), stops=(False, False, True))
    assert cluster_of(script).stop("job") == "STOPPED"
    assert script.asked_to_stop == 3


def test_stop_does_not_wait_for_ever(cluster_of: Callable[[Script], Cluster], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.ray_jobs, "STOP_WAIT_S", 0)
    with pytest.raises(JobError, match="it is RUNNING"):
        cluster_of(Script(info(JobStatus.RUNNING))).stop("job")


def test_another_job_under_the_same_id_is_not_followed(cluster_of: Callable[[Script], Cluster]) -> None:
    script = Script(info(JobStatus.RUNNING), info(JobStatus.RUNNING), info(JobStatus.SUCCEEDED, start_time=2))
    with pytest.raises(JobError, match="does not know the job any more"):
        cluster_of(script).follow("job")


def test_job_that_waits_says_so_once_for_each_reason(
    cluster_of: Callable[[Script], Cluster], capsys: pytest.CaptureFixture[str]
) -> None:
    no_cpu, no_node = (info(JobStatus.PENDING, message=text) for text in ("no CPU is free", "no node is there"))
    end = info(JobStatus.SUCCEEDED, exit_code=0)
    ended = cluster_of(Script(no_cpu, no_cpu, no_cpu, no_node, end)).follow("job")
    told = capsys.readouterr().err
    assert [told.count(text) for text in ("no CPU is free", "no node is there", LOG)] == [1, 1, 1]
    assert (ended.status, ended.exit_code, ended.result) == ("SUCCEEDED", 0, None)


class SilentScript(Script):
    """One whose log says nothing for so long, then a line; the job has ended then, or when its infos say so."""

    def __init__(self, silence_s: float, *infos: Any) -> None:
        super().__init__(*infos, log="")
        self.silence_s, self.spoke = silence_s, False
        self.num_tails = self.num_left = 0

    def get_job_info(self, job_id: str) -> Any:
        return info(JobStatus.SUCCEEDED, exit_code=0) if self.spoke else super().get_job_info(job_id)

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.num_tails += 1
        try:
            await asyncio.sleep(self.silence_s)
        except asyncio.CancelledError:
            self.num_left += 1
            raise
        self.spoke = True
        yield LOG


def test_silent_log_is_followed_over_few_connections(
    cluster_of: Callable[[Script], Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.ray_jobs, "SILENCE_S", 0.01)
    running = [info(JobStatus.RUNNING)] * 80
    script = SilentScript(30.0, *running, info(JobStatus.SUCCEEDED, exit_code=0))
    assert cluster_of(script).follow("job").status == "SUCCEEDED"
    assert script.num_tails == script.num_left == 7, "after 1, 2, 4, 8, 16 and 30 silences, and as the job ends"


def test_log_that_was_silent_goes_on_in_its_connection(
    cluster_of: Callable[[Script], Cluster], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs.ray_jobs, "SILENCE_S", 0.2)
    script = SilentScript(0.5, info(JobStatus.RUNNING))
    assert cluster_of(script).follow("job").status == "SUCCEEDED"
    assert capsys.readouterr().err.count(LOG) == 1
    assert (script.num_tails, script.num_left) == (3, 2), "it is left after one silence, and after two"


def test_stop_has_its_time_from_when_the_cluster_heard_of_it(
    cluster_of: Callable[[Script], Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("jobs.ray_jobs.time.monotonic", lambda: clock[0])
    script = Script(*[info(JobStatus.RUNNING)] * 3, info(JobStatus.STOPPED))
    stop = script.stop_job

    def stop_late(job_id: str) -> bool:
        clock[0] += 70.0
        return stop(job_id)

    monkeypatch.setattr(script, "stop_job", stop_late)
    assert cluster_of(script).stop("job") == "STOPPED"
    assert script.asked_to_stop == 1


CALL = Call("job.yaml", ("job.name=a b",), "http://head:8265", ("--force-new", "--retry-errors"), installed=True)


def test_who_comes_back_to_a_job_does_not_start_it_over() -> None:
    again = "r4b submit job.yaml --set 'job.name=a b' --address http://head:8265 --retry-errors --installed"
    assert CALL.again() == again
    assert CALL.again("--stop") == f"{again} --stop"


@pytest.mark.parametrize(
    "ended", [Ended("STOPPED", None, None, None), Ended("FAILED", 1, None, None), Ended("FAILED", 2, None, None)]
)
def test_job_that_did_not_end_well_says_how_to_go_on(ended: Ended, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((JobError, SystemExit)) as caught:
        show_result("job", ended, CALL, as_json=False)
    assert f"{capsys.readouterr().err} {caught.value}".count(CALL.again()) == 1


def test_job_that_runs_is_followed_by_whoever_would_start_it_over(
    cluster_of: Callable[[Script], Cluster], capsys: pytest.CaptureFixture[str]
) -> None:
    identity = Identity("name", "output", "spec")
    cluster = cluster_of(Script(info(JobStatus.RUNNING)))
    assert attach(cluster, Running("job", identity.metadata), identity, CALL) == "job"
    assert "not started over for --force-new" in capsys.readouterr().err
    with pytest.raises(SpecError, match="another spec"):
        attach(cluster, Running("job", identity.metadata | {"r4b_spec": "other"}), identity, CALL)


def test_done_job_whose_log_is_gone_is_done(cluster_of: Callable[[Script], Cluster]) -> None:
    script = Script(info(JobStatus.SUCCEEDED, exit_code=0), log=RuntimeError("status code 404: no such node"))
    ended = cluster_of(script).follow("job")
    assert (ended.status, ended.exit_code, ended.result) == ("SUCCEEDED", 0, None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"this machine is in the way.* No space left"),
        (requests.ConnectionError("refused"), "has not answered for 0 s"),
        (RuntimeError("Request failed with status code 503: busy"), "has not answered for 0 s"),
        (RuntimeError("Request failed with status code 400: bad"), r"http://head:8265 answers: .*bad"),
    ],
)
def test_error_names_who_is_in_the_way(cluster_of: Callable[[Script], Cluster], error: Exception, message: str) -> None:
    def fail(**_: Any) -> None:
        raise error

    script = Script(info(JobStatus.PENDING))
    script.sent = fail
    with pytest.raises(JobError, match=message):
        cluster_of(script).submit("job", "true", "folder", {})


def test_project_that_cannot_be_packed_here(
    cluster_of: Callable[[Script], Cluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    identity = Identity("name", "output", "spec")
    with pytest.raises(JobError, match=r"could not be packed on this machine: .*gone"):
        ship(cluster_of(Script(info(JobStatus.PENDING))), "job", identity, Shipment({}))


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "", "http://user:secret@head:8265"])
def test_address_is_a_dashboard_without_a_password(address: str) -> None:
    with pytest.raises(SpecError, match="--address") as caught:
        connect(address, 0)
    assert "secret" not in str(caught.value)
