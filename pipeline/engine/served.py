"""A running deployment as an engine: a job's rows go to it by its Serve handle, and come back as from an engine here.

A row goes again until it is answered: replicas are full, die and are replaced, and waiting is no failure while the
application is there. Asking twice does no harm, for answers depend on the request alone. Each row says what its job
was begun with, and a deployment that became another one meanwhile answers none of them.
Not covered: which rows a replica takes beside people's requests (`deployments.admission`); joining the cluster.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ray import serve
from ray.exceptions import ActorDiedError, RayError, RayTaskError, UnserializableException
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from pipeline.engine.contract import EngineRequest
from pipeline.engine.models import identify_model
from pipeline.engine.window import NotNowError, Window
from pipeline.errors import BusyError, EngineDiedError, JobError, R4BError, SpecError
from pipeline.records import Generation
from pipeline.spec import EngineSpec, engine_parts, fingerprint_of

PRIORITY = 10
"""Of rows in vLLM's queue. People's requests have 0, and the lower number goes first."""
MAX_LOSSES = 10
"""Of one row together with the replica that had it; then it may be what kills the replicas, and people need those."""
WATCH_S = 2.0
DESCRIBE_S = 600.0
"""An application that is scaled to zero loads its model first."""


@dataclass(frozen=True)
class Deployed:
    """What a deployment tells of its engine: the model as its settings name it, and its part of a job's fingerprint."""

    model: str
    made_with: Mapping[str, str]


def describe_engine(engine: EngineSpec, max_prompt_tokens: int | None) -> Deployed:
    """For a replica. Its own limit on prompts gives other error rows than a job alone would have."""
    made_with = engine_parts(engine, identify_model(engine))
    if max_prompt_tokens is not None:
        made_with["engine.max_prompt_tokens"] = str(max_prompt_tokens)
    return Deployed(engine.model, made_with)


def engine_identity(made_with: Mapping[str, str]) -> str:
    """The engine's part of a fingerprint in one word, which each row carries and its replica compares."""
    return fingerprint_of({name: part for name, part in made_with.items() if name.partition(".")[0] == "engine"})


def check_deployment(spec: EngineSpec, model_identity: str) -> dict[str, str]:
    """The deployment's part of the job's fingerprint; raises SpecError unless it runs, with the model of the spec."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    deployed = asyncio.run(_describe(Application(spec.app)))
    ours, theirs = engine_parts(spec, model_identity), dict(deployed.made_with)
    if ours["engine.model"] != theirs["engine.model"]:
        raise SpecError(
            f"engine.model: the job asks for {spec.model} ({ours['engine.model']}), the application {spec.app} runs "
            f"{deployed.model} ({theirs['engine.model']}). Name the same model in both."
        )
    if ours["engine.revision"] != theirs["engine.revision"]:
        raise SpecError(
            f"engine.revision: the job asks for {ours['engine.revision']}, the application {spec.app} runs "
            f"{theirs['engine.revision']} of {deployed.model}. Name the same revision in both."
        )
    return theirs


async def _describe(app: "Application") -> Deployed:
    try:
        status, message = await asyncio.to_thread(app.find_status)
        if status not in ("RUNNING", "UNHEALTHY"):  # unhealthy: a replica is being replaced, others may answer
            raise SpecError(f"engine.app: the application {app.name} {message}.")
        await app.connect()
        async with asyncio.timeout(DESCRIBE_S):
            deployed: Any = await Window(1).send(partial(app.call, "describe"))
    except TimeoutError as error:
        raise SpecError(f"engine.app: the application {app.name} said nothing in {DESCRIBE_S:.0f} s.") from error
    except JobError as error:
        raise SpecError(f"engine.app: {error}") from error
    if not isinstance(deployed, Deployed):
        raise SpecError(f"engine.app: the application {app.name} is another one than R-4B's.")
    return deployed


class LostError(NotNowError):
    """The replica died, or left, with a row that it had taken."""


class Application:
    """A Serve application of this cluster, by its name: whether it is there, and calls to its replicas."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._handle: Any = None

    async def connect(self) -> None:
        """Before the first call; raises JobError if there is no such application."""
        try:
            self._handle = await asyncio.to_thread(serve.get_app_handle, self.name)
        except (RayError, RayServeException) as error:
            raise JobError(f"The application {self.name} is not there: {_one_line(error)}") from error

    def find_status(self) -> tuple[str, str]:
        """Serve's word for it, or ABSENT, and the rest of a sentence. Blocks."""
        try:
            applications = serve.status().applications
        except ActorDiedError:  # Serve's controller comes back after a crash; this is for good
            return "ABSENT", "is gone: Serve was shut down"
        if self.name not in applications:
            others = ", ".join(applications) or "none"
            return "ABSENT", f"does not run on this Ray cluster; applications there: {others}"
        application = applications[self.name]
        messages = [application.message, *(one.message for one in application.deployments.values())]
        told = " ".join(next(filter(None, messages), "").split())[-500:]
        return str(application.status.value), f"is {application.status.value}" + (f": {told}" if told else "")

    async def find_end(self) -> str | None:
        """Why nothing more can come of it, or None. A failed look says nothing: the next one may succeed."""
        try:
            status, message = await asyncio.to_thread(self.find_status)
        except (RayError, RayServeException):
            return None
        return message if status in ("ABSENT", "DELETING", "DEPLOY_FAILED") else None

    async def call(self, method: str, *args: Any) -> Any:
        """A method of some replica; raises NotNowError where the same call may be answered later, or our own error."""
        # By Ray, not Serve's gRPC: large images then lie in Ray's shared memory, and a death is told as one.
        call = self._handle.options(method_name=method, _by_reference=True)
        try:
            answer = await call.remote(*args)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            raise LostError("A replica left with the row.") from None
        except Exception as error:
            raise self._understand(error) from error
        if isinstance(answer, R4BError):
            raise self._understand(answer)
        return answer

    def _understand(self, error: Exception) -> R4BError:
        cause = error.cause if isinstance(error, RayTaskError) else error  # what the replica's own code raised
        told = _one_line(cause)
        if isinstance(cause, BusyError | BackPressureError | DeploymentUnavailableError):
            return NotNowError(told)
        if isinstance(cause, R4BError) and not isinstance(cause, EngineDiedError):
            return cause
        if isinstance(cause, EngineDiedError | RayError) and not isinstance(cause, UnserializableException):
            return LostError(told)
        words = f"{type(cause).__name__}: {cause}".strip().splitlines()[-1]  # after a traceback, if there is one
        return JobError(f"The application {self.name} failed: {words}")


class ServedEngine:
    """The engine contract over an application. Build it with `start`, inside the event loop that will use it."""

    def __init__(self, app: Application, max_num_seqs: int, made_with: Mapping[str, str]) -> None:
        self._app = app
        self._identity = engine_identity(made_with) if made_with else None
        self._window = Window(max_num_seqs)
        self._num_answers = 0
        self._end: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._watching = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, spec: EngineSpec, made_with: Mapping[str, str]) -> "ServedEngine":
        """Find the application; raises JobError if there is none. With `made_with`, no other engine may answer."""
        app = Application(spec.app)
        await app.connect()
        return cls(app, spec.max_num_seqs, made_with)

    async def generate(self, request: EngineRequest) -> Generation:
        """As the contract says; raises JobError once the application is gone, or is another one than it was."""
        row = asyncio.ensure_future(self._persist(replace(request, priority=PRIORITY)))
        try:
            await asyncio.wait({row, self._end}, return_when=asyncio.FIRST_COMPLETED)
            generation = await (row if row.done() else self._end)
        finally:
            row.cancel()
        self._num_answers += 1
        return generation

    async def _persist(self, request: EngineRequest) -> Generation:
        """Send a row until it is answered; raises JobError when replica after replica is lost with it."""
        num_losses = 0

        async def send() -> Generation:
            nonlocal num_losses
            try:
                generation: Generation = await self._app.call("generate", request, self._identity)
            except LostError as error:
                num_losses += 1
                if num_losses == MAX_LOSSES:
                    message = f"{num_losses} replicas died or left with one and the same row; the last: {error}"
                    raise JobError(message) from error
                raise
            return generation

        return await self._window.send(send)

    async def _watch(self) -> None:
        """Of an application that is gone a call may wait for ever; look when nothing has been answered for a while."""
        num_answers = -1
        while True:
            await asyncio.sleep(WATCH_S)
            if num_answers == self._num_answers and (end := await self._app.find_end()):
                self._end.set_exception(JobError(f"The application {self._app.name} {end}. Committed rows stay."))
                self._end.exception()  # which counts as having been looked at, if no row waits
                return
            num_answers = self._num_answers

    async def check(self) -> None:
        """As the contract says; whether the deployment goes on is Serve's to watch."""

    def shutdown(self) -> None:
        """As the contract says; the deployment goes on."""
        self._watching.cancel()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
