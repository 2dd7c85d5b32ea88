"""Ray's job server, spoken to over connections that break: find, submit, follow and stop.

Not covered: what a job is (`submit.py`), and what its log looks like on a terminal (`log_view.py`).
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

from jobs.log_view import LogView
from jobs.terminal import say
from pipeline.errors import JobError, R4BError, SpecError

REQUEST_TIMEOUT_S = 60
SILENCE_S = 60.0
"""Of a log, before the job is asked after: a connection that died without a word is as silent as a job that waits."""
MAX_SILENCES = 30
"""In a row, before such a connection is made anew. Ray's head keeps each that was left until the log's next line."""
STOP_WAIT_S = 30
STOP_ENV = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
"""Ray asks a job to stop as Ctrl-C does, and kills it if it takes longer."""
LOST = (requests.RequestException, ConnectionError, TimeoutError)
CHATTY = ("ray.dashboard", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private")
"""Loggers of Ray's client that tell of each step; some have a level of their own."""


@dataclass(frozen=True)
class Running:
    """A job that has not ended, or one that was just submitted."""

    job_id: str
    metadata: dict[str, str]


@dataclass(frozen=True)
class Found:
    """What a cluster knows of the jobs that wrote to one output."""

    running: Running | None
    generations: int
    """The highest number that one of their ids ends with."""


@dataclass(frozen=True)
class Ended:
    """How a job ended: Ray's status, its process' exit code if it had one, and the result that its log holds."""

    status: str
    exit_code: int | None
    message: str | None
    result: dict[str, Any] | None


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's own waits forever for an answer."""

    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        return super()._do_request(*args, **{"timeout": REQUEST_TIMEOUT_S, **kwargs})


class Cluster:
    """A cluster by the address of its dashboard."""

    def __init__(self, address: str, patience_s: float) -> None:
        self.address = address
        self.patience_s = patience_s
        self.told = False
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            os.environ.pop(name, None)  # Ray would take them rather than the address that it is given
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            self.client = _Client(address)
            self.client.list_jobs()
        except Exception as error:
            raise self._refused(error) or SpecError(
                f"--address: no Ray dashboard answers at {address} ({_short(error)}). It is the head's dashboard, "
                "such as http://head:8265; a head started with --include-dashboard=false has none."
            ) from error

    def find(self, output: str) -> Found:
        """The jobs whose metadata name this output."""
        jobs = [job for job in self._ask(self.client.list_jobs) if (job.metadata or {}).get("r4b_output") == output]
        jobs = [job for job in jobs if job.submission_id]
        numbers = [int(tail) for job in jobs if (tail := job.submission_id.rpartition("-")[2]).isdecimal()]
        alive = max((job for job in jobs if not job.status.is_terminal()), key=_started, default=None)
        running = None if alive is None else Running(alive.submission_id, alive.metadata)
        return Found(running, max(numbers, default=0))

    def submit(self, job_id: str, entrypoint: str, working_dir: str, metadata: dict[str, str]) -> Running:
        """Submit once, however often the connection breaks; what the cluster knows under this id afterwards.

        The command reserves nothing, so that it runs on the head, which may have no CPUs for work.
        """

        def send() -> None:
            try:
                self.client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job_id,
                    runtime_env={"working_dir": working_dir, "env_vars": STOP_ENV},
                    metadata=metadata,
                    entrypoint_num_cpus=0,
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise

        self._ask(send)
        return Running(job_id, self._ask(lambda: self.client.get_job_info(job_id)).metadata or {})

    def stop(self, job_id: str) -> str:
        """Stop a job and wait for its end; its status then."""
        deadline, is_stopping = time.monotonic() + 2 * STOP_WAIT_S, False
        while not (status := self._ask(lambda: self.client.get_job_info(job_id)).status).is_terminal():
            # Ray stops nothing that has no process yet, which is so for a moment, and says so.
            if not is_stopping and self._ask(lambda: self.client.stop_job(job_id)):
                deadline, is_stopping = time.monotonic() + 2 * STOP_WAIT_S, True  # its answer may have taken long
            if time.monotonic() > deadline:
                raise JobError(f"{job_id} has not ended within {2 * STOP_WAIT_S} s; it is {status.value}.")
            time.sleep(0.5)
        return str(status.value)

    def follow(self, job_id: str) -> Ended:
        """Show a job's log on stderr until it ends. A broken connection is made again, where the log was left.

        Raises JobError if the job is gone, or another has its id by now, both of which a new head makes of it.
        """
        view = LogView()
        pause_s, silences, waits_for = 1, 1, None
        started = self._ask(lambda: self.client.get_job_info(job_id)).start_time
        try:
            while True:
                shown = view.position
                in_order = self._tail(job_id, view, silences)
                info = self._ask(lambda: self.client.get_job_info(job_id))
                if info.start_time != started:
                    raise self._unknown()
                if info.status == JobStatus.PENDING and info.message != waits_for:
                    waits_for = info.message
                    say(f"{job_id} waits to be started: {waits_for}")
                ended = info.status.is_terminal()
                if ended or not in_order:
                    self._catch_up(job_id, view)
                if ended:
                    break
                is_new = view.position > shown
                pause_s = 1 if is_new else min(2 * pause_s, 10)
                silences = 1 if is_new else min(2 * silences, MAX_SILENCES)
                time.sleep(pause_s)
        finally:
            view.close()
        return Ended(str(info.status.value), info.driver_exit_code, info.message, view.result)

    def _tail(self, job_id: str, view: LogView, silences: int) -> bool:
        """Show the log as it grows; false if the connection broke, cannot be had, or was silent so often in a row."""

        async def tail() -> bool:
            position = 0
            async with aclosing(self.client.tail_job_logs(job_id)) as texts:
                while True:
                    try:
                        text = await self._next(texts, job_id, silences)
                    except StopAsyncIteration:
                        return True
                    except Exception:  # whatever is wrong with this connection, the next request tells
                        return False
                    view.take(position, text)
                    position += len(text)

        return asyncio.run(tail())

    async def _next(self, texts: AsyncGenerator[str], job_id: str, silences: int) -> str:
        """What comes next of a log; raises TimeoutError if that is nothing."""
        coming = asyncio.ensure_future(anext(texts))
        try:
            for _ in range(silences):
                await asyncio.wait({coming}, timeout=SILENCE_S)
                if coming.done():
                    return coming.result()
                if (await asyncio.to_thread(self.client.get_job_info, job_id)).status.is_terminal():
                    break
        finally:
            coming.cancel()
            await asyncio.wait({coming})
        raise TimeoutError

    def _catch_up(self, job_id: str, view: LogView) -> None:
        """Show what the whole log holds beyond what was shown; a node that is gone has taken its log along."""
        with suppress(OSError, RuntimeError):
            view.take(0, _a_few_times(self.client.get_job_logs, job_id))

    def _ask(self, call: Callable[[], Any]) -> Any:
        """A request, repeated while the head does not answer; raises JobError when patience is at its end."""
        self.told = False
        retrying = Retrying(
            retry=retry_if_exception(_is_lost),
            wait=wait_random_exponential(multiplier=0.5, max=10),
            stop=stop_after_delay(self.patience_s),
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            return retrying(call)
        except Exception as error:
            raise self._refused(error) or self._lost(error) from error

    def _tell(self, state: RetryCallState) -> None:
        if not self.told:
            say(f"r4b: {self.address} does not answer; trying again for up to {self.patience_s:g} s.")
        self.told = True

    def _refused(self, error: Exception) -> R4BError | None:
        if not isinstance(error, AuthenticationError):
            return None
        what = "refuses the token that was found here" if "Invalid" in str(error) else "asks for a token"
        return SpecError(
            f"--address: the cluster at {self.address} {what}. Set RAY_AUTH_MODE=token, and put the cluster's own "
            "token into RAY_AUTH_TOKEN or ~/.ray/auth_token; `ray get-auth-token` on the head shows it."
        )

    def _lost(self, error: Exception) -> JobError:
        if "status code 404" in str(error):
            return self._unknown()
        if _is_lost(error):
            return JobError(
                f"the cluster at {self.address} has not answered for {self.patience_s:g} s ({_short(error)}). "
                "If the job still runs there, the same command follows it again."
            )
        if isinstance(error, OSError):  # such as a full disk, where Ray packs what it sends
            return JobError(f"this machine is in the way, not the cluster: {error}")
        return JobError(f"the cluster at {self.address} answers: {_short(error)}")

    def _unknown(self) -> JobError:
        return JobError(
            f"the cluster at {self.address} does not know the job any more: its head was started anew. "
            "Committed chunks are kept; the same command submits the job again and goes on from there."
        )


def _is_lost(error: BaseException) -> bool:
    """Whether asking again may help."""
    return isinstance(error, LOST) or "status code 5" in str(error)


_a_few_times = Retrying(
    retry=retry_if_exception(_is_lost),
    wait=wait_random_exponential(0.5, max=5),
    stop=stop_after_attempt(4),
    reraise=True,
)


def _started(job: Any) -> int:
    return job.start_time or 0


def _short(error: Exception) -> str:
    """One line; the last of a traceback, which is how Ray's server tells of its errors."""
    lines = [line for line in str(error).splitlines() if line.strip(" .")]
    return lines[-1].strip()[:300] if lines else type(error).__name__
