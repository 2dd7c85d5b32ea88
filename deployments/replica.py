"""What a replica is made of: the engine, vLLM's app over it, and the gate before both.

Imported by replicas only: it needs vLLM, which the machine that deploys may lack.
"""

import logging
import logging.handlers
from dataclasses import dataclass

from starlette.responses import RedirectResponse
from starlette.routing import Mount, Route

from deployments.admission import BatchRows
from deployments.gate import Gate, GateSettings
from deployments.keys import KeyRing
from deployments.metrics import ChoiceMetrics, show_metrics
from deployments.pages import Pages
from deployments.settings import RequestLimits, ServeSettings
from pipeline.engine.chat_limits import ChatLimits
from pipeline.engine.media import MediaSettings
from pipeline.engine.openai_app import (
    SERVED_PATHS,
    OpenAISettings,
    build_openai_app,
    start_online_engine,
)
from pipeline.engine.vllm_engine import VLLMEngine
from pipeline.images import ImageLimits
from pipeline.remote import FetchLimits

LOOPBACK_NAMES = frozenset(("127.0.0.1", "localhost", "[::1]"))
"""Without keys, a page of another site that has its name point here must not be served."""


@dataclass(frozen=True)
class Replica:
    """An engine, and the ASGI app that answers for it."""

    engine: VLLMEngine
    app: Gate


async def open_replica(settings: ServeSettings, batch_rows: BatchRows) -> Replica:
    """Start everything; raises JobError when the engine does not start, SpecError when there are no keys."""
    write_access_log(settings.access_log)
    keys = KeyRing(settings.auth.keys_file) if settings.auth.required else None
    engine = await start_online_engine(settings.engine, ChoiceMetrics().count, settings.limits.max_prompt_tokens)
    app = await build_openai_app(engine, openai_settings(settings, engine))
    app.router.routes.insert(0, Route("/metrics", show_metrics))
    if settings.playground:
        app.router.routes.insert(0, Mount("/playground", Pages()))
        app.router.routes.insert(0, Route("/", lambda _: RedirectResponse("/playground/")))
    return Replica(engine, Gate(app, gate_settings(settings), keys, batch_rows))


def openai_settings(settings: ServeSettings, engine: VLLMEngine) -> OpenAISettings:
    """How vLLM's app is set up."""
    limits = settings.limits
    chat = ChatLimits(
        thinking_mode=settings.thinking_mode,
        max_tokens=limits.max_tokens,
        max_choices=limits.max_choices,
        max_images=limits.max_images,
        max_schema_bytes=limits.max_schema_bytes,
    )
    return OpenAISettings(settings.model_name, chat, media_settings(settings, limits, engine))


def media_settings(settings: ServeSettings, limits: RequestLimits, engine: VLLMEngine) -> MediaSettings:
    """Which images are taken."""
    http = settings.urls.http
    return MediaSettings(
        tiling=engine.tiling,
        allow_urls=settings.urls.allow,
        images=ImageLimits(max_pixels=limits.max_image_pixels, max_bytes=limits.max_image_bytes),
        fetch=FetchLimits(
            timeout_s=settings.urls.fetch_timeout_s,
            max_bytes=limits.max_image_bytes,
            max_redirects=http.max_redirects,
            max_per_host=http.max_per_host,
            max_attempts=http.max_attempts,
            max_retry_after_s=settings.urls.fetch_timeout_s,
            allow_networks=tuple(http.allow_networks),
        ),
        decode_timeout_s=limits.decode_timeout_s,
    )


def gate_settings(settings: ServeSettings) -> GateSettings:
    """What is let through to the app."""
    open_paths = {"/health", *(("/", "/playground") if settings.playground else ())}
    served = {*SERVED_PATHS, "/metrics", "/openapi.json", *open_paths}
    return GateSettings(
        max_body_bytes=settings.limits.max_body_bytes,
        max_concurrent=settings.max_ongoing_requests,
        max_concurrent_per_key=settings.limits.max_concurrent_per_key,
        retry_after_s=settings.scaling.retry_after_s,
        open_paths=frozenset(open_paths),
        served_paths=frozenset(served),
        tells_request_id=False,  # Ray Serve's middleware does
        hosts=frozenset() if settings.auth.required else LOOPBACK_NAMES,
    )


def write_access_log(path: str | None) -> None:
    """Lines of JSON to a file that may be rotated, or to stderr, which Ray keeps with its logs."""
    access = logging.getLogger("r4b.access")
    handler = logging.StreamHandler() if path is None else logging.handlers.WatchedFileHandler(path)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.handlers, access.propagate = [handler], False
    access.setLevel(logging.INFO)
