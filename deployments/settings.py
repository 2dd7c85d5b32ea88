"""What a deployment is: the engine, how many, who may ask, and how much. The same mapping in a file and in serve.yaml.

Names that are Ray Serve's, vLLM's or the job spec's are spelled as there. Settings hold no secret: keys come from a
file or the environment.
Not covered: reading the file (`jobs.serve`), and Serve's own options that have no counterpart here.
"""

import math
from typing import Annotated, Any

import pydantic
from pydantic import Field

from pipeline.errors import SpecError
from pipeline.records import ThinkingMode
from pipeline.spec import EngineSpec
from pipeline.spec.base import NonEmpty, Section
from pipeline.spec.places import HttpSpec

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0)]


class ScalingSettings(Section):
    """How many replicas, and how many requests each holds."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Count = 1
    target_ongoing_requests: Annotated[float, Field(gt=0)] | None = None
    """Requests in a replica at which another is added; None: three quarters of engine.max_num_seqs."""
    max_ongoing_requests: Count | None = None
    """Chat requests that a replica holds, those that wait in vLLM's queue included; None: twice engine.max_num_seqs."""
    upscale_delay_s: Seconds = 5.0
    downscale_delay_s: Seconds = 120.0
    graceful_shutdown_timeout_s: Seconds = 600.0
    """A replica that leaves answers what it accepted, at most this long."""
    retry_after_s: Count = 2
    batch_rows_beside_requests: Count = 8
    """Rows of batch jobs (engine.pool: serve) that run in a replica while it answers requests."""

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> "ScalingSettings":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is larger than max_replicas ({self.max_replicas})")
        return self


class AuthSettings(Section):
    """Who may ask. Keys are one a line in `keys_file`, and comma-separated in the environment variable R4B_API_KEYS."""

    required: bool = True
    keys_file: NonEmpty | None = None


class RequestLimits(Section):
    """What one request may hold, and one key at once."""

    max_body_bytes: Count = 64 << 20
    max_images: Annotated[int, Field(ge=0)] = 5
    max_image_pixels: Count = 50_000_000
    max_image_bytes: Count = 20 << 20
    decode_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    max_prompt_tokens: Count | None = None
    max_tokens: Count = 16_384
    max_choices: Count = 8
    max_schema_bytes: Count = 65_536
    max_concurrent_per_key: Count | None = None


class UrlSettings(Section):
    """Images by http(s) URL: off, for a server inside a network can reach what its clients cannot."""

    allow: bool = False
    fetch_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    http: HttpSpec = HttpSpec(max_attempts=2)


class ServeSettings(Section):
    """A whole deployment."""

    engine: EngineSpec = EngineSpec()
    model_name: NonEmpty = "r4b"
    thinking_mode: ThinkingMode = "auto"
    scaling: ScalingSettings = ScalingSettings()
    auth: AuthSettings = AuthSettings()
    limits: RequestLimits = RequestLimits()
    urls: UrlSettings = UrlSettings()
    playground: bool = True
    access_log: NonEmpty | None = None
    """A file for lines of JSON; None: the replica's stderr, which Ray keeps with its logs."""

    @pydantic.field_validator("engine")
    @classmethod
    def _online(cls, engine: EngineSpec) -> EngineSpec:
        if engine.kind != "vllm" or engine.pool != "actors":
            raise ValueError("a deployment holds engines: kind vllm, pool actors")
        if "replicas" in engine.model_fields_set:
            raise ValueError("replicas: say it as scaling.min_replicas and scaling.max_replicas")
        return engine

    @property
    def max_ongoing_requests(self) -> int:
        return self.scaling.max_ongoing_requests or 2 * self.engine.max_num_seqs

    @property
    def target_ongoing_requests(self) -> float:
        return self.scaling.target_ongoing_requests or max(1.0, math.floor(0.75 * self.engine.max_num_seqs))

    @property
    def actor_resources(self) -> dict[str, float]:
        """What a replica reserves: all GPUs of its engine, for vLLM's workers are its children."""
        num_gpus = self.engine.num_gpus * self.engine.tensor_parallel_size
        return {"num_gpus": num_gpus, "num_cpus": 1 if num_gpus else 0.5}


def parse_settings(data: Any, source: str) -> ServeSettings:
    """Check settings read from YAML; raises SpecError with one line for each wrong key."""
    if not isinstance(data, dict):
        raise SpecError(f"{source}: settings are a YAML mapping with the keys {', '.join(ServeSettings.model_fields)}.")
    try:
        return ServeSettings.model_validate(data)
    except pydantic.ValidationError as error:
        lines = [f"  {_describe(problem)}" for problem in error.errors(include_url=False, include_input=False)]
        raise SpecError("\n".join([f"{source}: the settings are wrong.", *dict.fromkeys(lines)])) from error


def _describe(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "the settings"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message[:1].lower() + message[1:]}"
