"""The Ray Serve deployment: each replica holds a VLLMEngine and mounts vLLM's own OpenAI app over it.

The same engine as in batch, so the same request gives the same answer. A replica answers HTTP, and a DeploymentHandle
(`generate`), through which batch jobs send their rows. A replica whose engine has died ends itself, after it has told
those who wait; Serve starts another.
Not covered: routing and counting of replicas, which is Serve's; what one request may hold (`pipeline.engine`).
"""

import asyncio
import contextlib
import logging
import os
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.admission import BatchRows
from deployments.settings import ServeSettings, parse_settings
from pipeline.engine.served import Deployed, describe_engine, engine_identity
from pipeline.errors import EngineDiedError, JobError, R4BError
from pipeline.records import Generation

NAME = "r4b"
HEADROOM = 32
"""Requests that a replica takes above its chat requests: health, metrics and models are answered when chat is full."""
ENGINE_CHECK_S = 0.5
FAREWELL_S, MAX_FAREWELL_S = 1.0, 5.0
"""For the answers that say so to reach those who waited for an engine that died."""

logger = logging.getLogger("ray.serve")


@serve.deployment(name="R4B")
@serve.ingress()
class R4B:
    """One replica."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = parse_settings(settings, "the deployment's settings")
        self.engine: Any = None
        self.gate: Any = None
        self.batch_rows = BatchRows(self.settings)
        self.deployed = describe_engine(self.settings.engine, self.settings.limits.max_prompt_tokens)
        self.identity = engine_identity(self.deployed.made_with)
        self.watching: asyncio.Task[None] | None = None

    async def __serve_build_asgi_app__(self) -> Any:
        from deployments.replica import open_replica

        replica = await open_replica(self.settings, self.batch_rows)
        self.engine, self.gate = replica.engine, replica.app
        self.watching = asyncio.create_task(self.watch_engine())
        return replica.app

    async def describe(self) -> Deployed:
        """What a batch job must know of the engine that will answer it."""
        return self.deployed

    async def generate(self, request: Any, identity: str | None = None) -> Generation | R4BError:
        """A row of a batch job that was begun with the engine of this `identity`.

        Our errors are values: Serve would log each with its traceback, and count a busy replica's as failures.
        """
        try:
            if identity not in (None, self.identity):
                raise JobError("The deployment changed: it runs another engine than the job was begun with.")
            async with self.batch_rows.admit():
                generation: Generation = await self.engine.generate(request)
            return generation
        except R4BError as error:
            return error
        except Exception as error:  # as a text: the job's process may lack vLLM, and could not read vLLM's errors
            logger.exception("A row of a batch job failed.")
            return JobError(f"A row failed in the deployment: {type(error).__name__}: {error}")

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self.engine is not None:
            await self.engine.check_health()

    async def watch_engine(self) -> None:
        """End the process soon after the engine's: an engine that died never recovers in its process."""
        while True:
            await asyncio.sleep(ENGINE_CHECK_S)
            try:
                await self.engine.check_health()
            except EngineDiedError as error:
                logger.error("%s This replica ends; Serve starts another.", error)
                self.gate.close()
                await asyncio.sleep(FAREWELL_S)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(MAX_FAREWELL_S):
                        while not self.gate.is_idle:
                            await asyncio.sleep(0.05)
                os._exit(1)

    def __del__(self) -> None:
        if self.watching is not None:
            self.watching.cancel()
        if self.engine is not None:
            self.engine.shutdown()


def build(settings: dict[str, Any]) -> Application:
    """The application for `serve deploy` (`import_path: deployments.app:build`) and `r4b serve`; raises SpecError."""
    checked = parse_settings(settings, "args")
    deployment: Any = R4B
    return deployment.options(**serve_options(checked)).bind(settings)


def serve_options(settings: ServeSettings) -> dict[str, Any]:
    """Serve's options for these settings; a Serve config file may override each under `deployments:`."""
    scaling = settings.scaling
    if scaling.min_replicas == scaling.max_replicas:
        size: dict[str, Any] = {"num_replicas": scaling.max_replicas}
    else:
        size = {
            "autoscaling_config": {
                "min_replicas": scaling.min_replicas,
                "max_replicas": scaling.max_replicas,
                "initial_replicas": max(1, scaling.min_replicas),
                "target_ongoing_requests": settings.target_ongoing_requests,
                "upscale_delay_s": scaling.upscale_delay_s,
                "downscale_delay_s": scaling.downscale_delay_s,
            }
        }
    return {
        **size,
        # rows of batch jobs come beside: they must not take the places of people's requests
        "max_ongoing_requests": settings.max_ongoing_requests + settings.engine.max_num_seqs + HEADROOM,
        "max_queued_requests": settings.max_ongoing_requests,
        "backpressure_config": {"status_code": 503, "retry_after_s": scaling.retry_after_s},
        "graceful_shutdown_timeout_s": scaling.graceful_shutdown_timeout_s,
        "health_check_period_s": 2,
        "health_check_timeout_s": 30,
        "ray_actor_options": settings.actor_resources,
    }
