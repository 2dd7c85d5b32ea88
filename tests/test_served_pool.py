"""Jobs through a deployment (`engine.pool: serve`), on real Ray Serve.

The replicas are of the deployment's own class, with a simulated engine and faults on order.

Not covered: vLLM, and people beside a job over HTTP.
"""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from starlette.applications import Starlette

from deployments.app import R4B
from pipeline.batch import run_batch
from pipeline.engine import EngineRequest, open_engine
from pipeline.engine.served import (
    MAX_LOSSES,
    PRIORITY,
    check_deployment,
    describe_engine,
    engine_identity,
)
from pipeline.engine.simulated import SimulatedEngine
from pipeline.errors import BusyError, EngineDiedError, JobError, R4BError, SpecError
from pipeline.records import ChunkReport, Generation, Manifest
from pipeline.spec import EngineSpec, SimulationSpec, parse_spec
from tests import test_engine_contract as contract
from tests.engines import SIMULATED_SPEC, RunningEngine, question, running_engine, scene_image
from tests.running import (
    keys_of,
    kill_tree,
    read_output,
    simulated_spec,
    started_r4b,
    write_scene_shards,
    write_spec,
)
from tests.test_kill_and_resume import parts_of, wait_for_parts

pytestmark = pytest.mark.long

PLACES = 32
"""Of a replica's engine; rows get 28 of them."""
SIMULATION: dict[str, Any] = {"thinking_tokens": 30, "answer_tokens": 5, "seconds_per_token": 0.002}
"""As in the jobs of `simulated_spec`, but for time."""


class OddError(Exception):
    """Cannot be pickled: its argument is no argument of its own."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Faulty(R4B.func_or_class):  # type: ignore[misc, name-defined]
    """The deployment's replica with a simulated engine, and faults that are ordered by `order`."""

    async def __init__(self, engine: EngineSpec) -> None:  # type: ignore[misc]  # Serve awaits it
        self.simulated = engine
        self.orders: list[str] = []
        self.requests: list[EngineRequest] = []
        await super().__init__({"engine": {"max_num_seqs": PLACES}, "scaling": {"batch_rows_beside_requests": 2}})

    async def __serve_build_asgi_app__(self) -> Any:
        self.engine = SimulatedEngine(self.simulated)
        self.deployed = describe_engine(self.simulated, None)
        self.identity = engine_identity(self.deployed.made_with)
        return Starlette()

    async def order(self, *faults: str) -> int:
        """Faults for the next rows, one each; gives this process's id."""
        self.orders.extend(faults)
        return os.getpid()

    async def look(self) -> list[EngineRequest]:
        """What has come so far, without pictures."""
        return self.requests

    async def hold_people(self, come: bool) -> None:
        """People come, or leave."""
        (self.batch_rows.enter if come else self.batch_rows.leave)()

    async def generate(self, request: Any, identity: str | None = None) -> Generation | R4BError:
        self.requests.append(EngineRequest(request.messages, (), priority=request.priority))
        match self.orders.pop(0) if self.orders else "":
            case "busy":
                return BusyError("As ordered.")
            case "raise busy":
                raise BusyError("As ordered.")
            case "engine died":
                return EngineDiedError("As ordered.")
            case "raise engine died":
                raise EngineDiedError("As ordered.")
            case "leave":
                raise asyncio.CancelledError
            case "exit":
                os._exit(1)
            case "odd":
                raise OddError(1, 2)
            case "hold":
                await asyncio.Event().wait()
        answer: Generation | R4BError = await super().generate(request, identity)
        return answer

    async def check_health(self) -> None:
        """Always well."""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    """Ray with Serve and no proxy; gives its address."""
    ray.shutdown()  # what earlier tests left: its workers may lack what these need
    context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    try:
        yield str(context.address_info["gcs_address"])
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(app: str, options: dict[str, Any] | None = None, **simulation: Any) -> Any:
    """Start or change an application; gives its handle."""
    engine = EngineSpec(kind="simulated", model="sim", simulation=SimulationSpec(**{**SIMULATION, **simulation}))
    deployment: Any = serve.deployment(name="R4B")(Faulty).options(**{**OPTIONS, **(options or {})})
    return serve.run(deployment.bind(engine), name=app, route_prefix=None)


OPTIONS: dict[str, Any] = {
    "max_ongoing_requests": 200,
    "graceful_shutdown_timeout_s": 1,
    "health_check_period_s": 1,
    "ray_actor_options": {"num_cpus": 0.1},
}


@contextmanager
def deployed(app: str, options: dict[str, Any] | None = None, **simulation: Any) -> Iterator[Any]:
    try:
        yield deploy(app, options, **simulation)
    finally:
        serve.delete(app)


def serve_spec(app: str, **more: Any) -> EngineSpec:
    return EngineSpec(kind="simulated", model="sim", pool="serve", app=app, **more)


# An engine.


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    """A handle to the application `engines`; it is as `SIMULATED_SPEC` says."""
    with deployed("engines", thinking_tokens=30, answer_tokens=24, seconds_per_token=0.0, max_model_len=4096) as handle:
        yield handle


@pytest.fixture
def engine(app: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningEngine]:
    monkeypatch.setattr("pipeline.engine.window.MAX_PAUSE_S", 0.2)
    with running_engine(serve_spec("engines")) as served:
        yield served


test_contract_forced_mode = contract.test_generate_forced_mode_is_kept
test_contract_many_at_once = contract.test_generate_many_at_once_equals_one_by_one
test_contract_cut_thought = contract.test_generate_cut_thought_has_no_answer
test_contract_cut_answer = contract.test_generate_cut_answer_is_kept_with_length
test_contract_image_tokens = contract.test_generate_image_tokens_grow_with_images
test_contract_bad_request = contract.test_generate_bad_request_raises_and_harms_no_other


def ask_simulated(*requests: EngineRequest) -> list[dict[str, Any]]:
    with running_engine(SIMULATED_SPEC) as simulated:
        return [contract.without_latency(generation) for generation in simulated.generate(*requests)]


def tries_of(app: Any, text: str) -> list[EngineRequest]:
    """All that came to this replica with these words."""
    return [request for request in app.look.remote().result() if text in str(request.messages)]


@pytest.mark.parametrize(
    "faults",
    [
        ["busy"] * 3,
        ["raise busy"],
        ["engine died", "busy", "engine died"],
        ["raise engine died"],
        ["leave"],
        ["busy"] * (MAX_LOSSES + 1),
    ],
    ids=lambda faults: f"{len(faults)} {faults[0]}",
)
def test_generate_row_that_meets_a_fault_is_sent_again_until_it_is_answered(
    app: Any, engine: RunningEngine, faults: list[str]
) -> None:
    request = question(f"How many after {faults}?", scene_image(1))
    app.order.remote(*faults).result()
    (generation,) = engine.generate(request)
    assert [contract.without_latency(generation)] == ask_simulated(request)
    tries = tries_of(app, f"How many after {faults}?")
    assert [one.priority for one in tries] == [PRIORITY] * (len(faults) + 1)


def test_generate_rows_of_a_replica_that_dies_are_answered_by_the_next(app: Any, engine: RunningEngine) -> None:
    requests = [question(f"Question {n}", scene_image(n)) for n in range(20)]
    before = app.order.remote(*[""] * 5, "exit").result()
    generations = engine.generate(*requests)
    assert [contract.without_latency(generation) for generation in generations] == ask_simulated(*requests)
    assert app.order.remote().result() != before


def test_generate_row_that_is_lost_again_and_again_fails_the_job(app: Any, engine: RunningEngine) -> None:
    app.order.remote(*["engine died"] * (MAX_LOSSES + 5)).result()
    with pytest.raises(JobError, match=f"{MAX_LOSSES} replicas died or left with one and the same row"):
        engine.generate(question("Poison?"))
    assert len(tries_of(app, "Poison?")) == MAX_LOSSES
    engine.generate(*(question("Any?") for _ in range(5)))


def test_generate_failure_that_cannot_travel_fails_the_job_once_with_its_words(app: Any, engine: RunningEngine) -> None:
    app.order.remote("odd").result()
    with pytest.raises(JobError, match=r"The application engines failed: .*OddError: 1 and 2"):
        engine.generate(question("Odd?"))
    nonsense: Any = None
    with pytest.raises(JobError, match="A row failed in the deployment: AttributeError"):
        engine.generate(EngineRequest([{"role": "user", "content": "Sampling?"}], sampling=nonsense))
    assert (len(tries_of(app, "Odd?")), len(tries_of(app, "Sampling?"))) == (1, 1)


def test_generate_for_a_job_that_began_with_another_engine_fails(app: Any) -> None:
    async def ask(made_with: dict[str, str]) -> Generation:
        engine = await open_engine(serve_spec("engines"), made_with)
        try:
            return await engine.generate(question("Who is it?"))
        finally:
            engine.shutdown()

    made_with = check_deployment(serve_spec("engines"), "sim")
    assert asyncio.run(ask({**made_with, "prompts": "any"})).finish_reason == "stop"
    with pytest.raises(JobError, match="runs another engine than the job was begun with"):
        asyncio.run(ask({**made_with, "engine": "other"}))


def test_generate_beside_people_asks_little_more_than_is_answered() -> None:
    with deployed("beside", seconds_per_token=0.001) as app, running_engine(serve_spec("beside")) as engine:
        app.hold_people.remote(True).result()
        requests = [question(f"Question {n}") for n in range(100)]
        assert len(engine.generate(*requests)) == 100
        assert 100 < len(tries_of(app, "Question")) < 2 * 100


def test_generate_more_than_the_handle_queues_are_all_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engine.window.MAX_PAUSE_S", 0.2)
    with deployed("narrow", {"max_ongoing_requests": 1, "max_queued_requests": 1}) as app:
        with running_engine(serve_spec("narrow")) as engine:
            assert len(engine.generate(*(question(f"Question {n}") for n in range(6)))) == 6
        assert len(tries_of(app, "Question")) == 6


def test_generate_after_the_application_is_gone_always_raises() -> None:
    with deployed("brief", seconds_per_token=10.0), running_engine(serve_spec("brief")) as engine:

        async def ask_and_delete() -> list[Any]:
            rows = [asyncio.ensure_future(engine.engine.generate(question(f"Long {n}"))) for n in range(40)]
            await asyncio.sleep(0.5)
            await asyncio.to_thread(serve.delete, "brief")
            return await asyncio.gather(*rows, return_exceptions=True)

        for error in engine.run(ask_and_delete()):
            assert isinstance(error, JobError)
            assert "The application brief" in str(error)
        with pytest.raises(JobError, match="The application brief"):
            engine.generate(question("And now?"))


# Before the start.


class Late:
    """An application of somebody else, whose replica comes when there is the file."""

    def __init__(self, file: Path) -> None:
        while not file.exists():
            time.sleep(0.1)


def test_check_deployment_refuses_what_is_not_there_not_ready_or_not_ours(app: Any, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"engine.app: the application other does not run .* there: engines"):
        check_deployment(serve_spec("other"), "sim")
    late: Any = serve.deployment(Late)
    target = serve.RunTarget(late.options(**OPTIONS).bind(tmp_path / "come"), "other", None)
    serve.run_many([target], wait_for_applications_running=False)
    try:
        with pytest.raises(SpecError, match=r"engine.app: the application other is DEPLOYING"):
            check_deployment(serve_spec("other"), "sim")
        (tmp_path / "come").touch()
        while serve.status().applications["other"].status != "RUNNING":
            time.sleep(0.1)
        with pytest.raises(SpecError, match=r"engine.app: .*application other.*describe"):
            check_deployment(serve_spec("other"), "sim")
    finally:
        serve.delete("other")


@pytest.mark.parametrize(
    ("spec", "identity", "message"),
    [
        (
            serve_spec("engines"),
            "folder sha256:1",
            r"engine.model: the job asks for sim \(folder sha256:1\).* runs sim \(sim\)",
        ),
        (serve_spec("engines", revision="v1"), "sim", "engine.revision: the job asks for v1, .* runs None of sim"),
    ],
)
def test_check_deployment_refuses_another_model_and_names_both(
    app: Any, spec: EngineSpec, identity: str, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        check_deployment(spec, identity)


# Whole jobs.


def served_spec(folder: Path, app: str) -> dict[str, Any]:
    """The job of `simulated_spec`, through a deployment."""
    return simulated_spec(folder) | {
        "engine": {"kind": "simulated", "model": "sim", "pool": "serve", "app": app, "max_num_seqs": 32}
    }


def run(spec: dict[str, Any], **options: Any) -> tuple[Manifest, list[ChunkReport]]:
    reports: list[ChunkReport] = []
    on_commit = options.pop("on_commit", lambda: None)

    def report(chunk: ChunkReport) -> None:
        reports.append(chunk)
        if len(reports) == 1:
            on_commit()

    manifest = run_batch(parse_spec(spec, "test"), on_commit=report, **options)
    return manifest, reports


def check_rows(folder: Path, num_rows: int) -> None:
    keys = keys_of(read_output(folder / "out"))
    assert len(keys) == len(set(keys)) == num_rows
    assert {sample_id for sample_id, _ in keys} == {f"scene-{n:06d}" for n in range(num_rows)}
    assert (folder / "out" / "_SUCCESS").exists()


def add_shard(folder: Path, first: int, num_rows: int = 32) -> None:
    """One more shard; those that are there stay as they are."""
    write_scene_shards(folder / "more", first + num_rows, rows_per_shard=num_rows)
    name = f"scenes-{first:06d}.parquet"
    (folder / "in").mkdir(exist_ok=True)
    (folder / "more" / name).rename(folder / "in" / name)


def test_job_begun_with_engines_of_its_own_goes_on_through_a_deployment_and_back(tmp_path: Path) -> None:
    own = simulated_spec(tmp_path, simulation=SIMULATION)
    add_shard(tmp_path, 0)
    assert len(run(own)[1]) == 2
    add_shard(tmp_path, 32)
    with deployed("r4b"):
        assert len(run(served_spec(tmp_path, "r4b"))[1]) == 2
    check_rows(tmp_path, 64)
    assert run(own)[1] == []
    run(own | {"output": own["output"] | {"url": str(tmp_path / "alone")}})
    rows, alone = (
        read_output(tmp_path / name).drop_columns("latency_s").sort_by("sample_id") for name in ("out", "alone")
    )
    assert rows.equals(alone)


@pytest.mark.slow
def test_job_whose_driver_and_then_whose_replica_is_killed_has_every_row_once(
    tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    write_scene_shards(tmp_path / "in", 600, rows_per_shard=300)
    spec = served_spec(tmp_path, "r4b")
    path, out = write_spec(tmp_path, spec), tmp_path / "out"
    with deployed("r4b", {"num_replicas": 2}, seconds_per_token=0.01) as app:
        with started_r4b("run", path) as process:
            wait_for_parts(out, 2)
            kill_tree(process.pid)
        before = parts_of(out)
        assert 0 < len(before) < 38
        _, reports = run(spec, on_commit=lambda: app.order.remote("exit").result())
        assert len(reports) == 38 - len(before)
    assert {name: parts_of(out)[name] for name in before} == before
    check_rows(tmp_path, 600)


@pytest.mark.slow
def test_job_whose_deployment_is_changed_or_deleted_stops_and_resumes_with_the_same_engine_only(tmp_path: Path) -> None:
    write_scene_shards(tmp_path / "in", 200)
    spec, faults = served_spec(tmp_path, "r4b"), [*[""] * 40, *["hold"] * 500]
    deploy("r4b").order.remote(*faults).result()
    with pytest.raises(JobError, match=r"runs another engine than the job was begun with\.$"):
        run(spec, on_commit=lambda: deploy("r4b", thinking_tokens=31))
    with pytest.raises(SpecError, match=r'(?s)engine: was .*"thinking_tokens": 30.*now .*"thinking_tokens": 31'):
        run(spec)
    deploy("r4b").order.remote(*faults).result()
    with pytest.raises(JobError, match=r"The application r4b (is DELETING|does not run)"):
        run(spec, on_commit=lambda: serve.delete("r4b", _blocking=False))
    before = parts_of(tmp_path / "out")
    assert 2 <= len(before) < 14
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    with deployed("r4b"):
        _, reports = run(spec)
    done = [f"{report.chunk_id}.parquet" for report in reports]
    assert sorted(done) == sorted(set(parts_of(tmp_path / "out")) - set(before))
    assert {name: parts_of(tmp_path / "out")[name] for name in before} == before
    check_rows(tmp_path, 200)
