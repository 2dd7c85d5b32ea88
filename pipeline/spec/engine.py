"""`engine`: the model, and the engines that run it."""

from typing import Annotated, Any, Literal

import pydantic
import pydantic_core
from pydantic import Field

from pipeline.spec.base import NonEmpty, Section

DECIDED_BY_DEPLOYMENT = ("num_gpus", "tensor_parallel_size", "max_model_len", "args", "simulation")
DEFAULT_APP = "r4b"


class Replicas(Section):
    """How many actors, each with an engine or sending to a deployment: from `min`, growing to `max`."""

    min: Annotated[int, Field(ge=1)] = 1
    max: Annotated[int, Field(ge=1)] = 1

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> "Replicas":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is larger than max ({self.max})")
        return self


class SimulationSpec(Section):
    """The simulated engine's lengths and times (`engine.kind: simulated`), for tests of scale and faults."""

    thinking_share: Annotated[float, Field(ge=0, le=1)] = 0.45
    thinking_tokens: Annotated[int, Field(ge=1)] = 200
    answer_tokens: Annotated[int, Field(ge=1)] = 24
    seconds_per_token: Annotated[float, Field(ge=0)] = 0.0
    max_model_len: Annotated[int, Field(ge=1)] = 32768
    kills_engine: NonEmpty | None = None
    """A text: a prompt that holds it kills the engine. The next two likewise."""
    kills_process: NonEmpty | None = None
    hangs_engine: NonEmpty | None = None


class EngineSpec(Section):
    """The model and the engines that run it."""

    kind: Literal["vllm", "simulated"] = "vllm"
    pool: Literal["actors", "serve"] = "actors"
    """`actors` holds engines of the job's own; `serve` sends its rows to a running deployment."""
    app: NonEmpty = DEFAULT_APP
    """With `pool: serve`, the Serve application."""
    model: NonEmpty = "YannQi/R-4B"
    revision: str | None = None
    replicas: Replicas = Replicas()
    num_gpus: Annotated[float, Field(ge=0)] = 1
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    max_num_seqs: Annotated[int, Field(ge=1)] = 256
    args: dict[str, Any] = {}
    simulation: SimulationSpec = SimulationSpec()

    @pydantic.field_validator("args")
    @classmethod
    def _not_twice(cls, args: dict[str, Any]) -> dict[str, Any]:
        if "hf_token" in args:
            raise pydantic_core.PydanticCustomError("secret", "must not hold a token; set HF_TOKEN in the environment")
        taken = sorted(set(args) & {"model", "revision", "tensor_parallel_size", "max_model_len", "max_num_seqs"})
        if taken:
            raise ValueError(f"{', '.join(taken)}: say it as engine.{taken[0]}, not in engine.args")
        return args

    @pydantic.model_validator(mode="after")
    def _fits_its_pool(self) -> "EngineSpec":
        if self.pool == "actors" and self.app != DEFAULT_APP:
            raise ValueError(f"app ({self.app}) names a deployment: set pool: serve, or leave it out")
        decided = [name for name in DECIDED_BY_DEPLOYMENT if name in self.model_fields_set]
        if self.pool == "serve" and decided:
            raise ValueError(f"{', '.join(decided)}: with pool: serve the deployment decides; leave it out")
        return self

    @property
    def gpus_per_actor(self) -> float:
        """What an actor of the pool reserves: all GPUs of its engine, for vLLM's workers are its children."""
        return 0 if self.pool == "serve" else self.num_gpus * self.tensor_parallel_size
