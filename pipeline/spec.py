"""The job spec: every key of the YAML file, its type, its default and its limits.

Frozen pydantic models; unknown keys are errors. Reading the file and `--set` belong to `jobs/`.
Not covered: whether the input, the output and the model exist.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

import jinja2
import pydantic
import pydantic_core
from pydantic import Field, StringConstraints

from pipeline.errors import SpecError
from pipeline.prompts import THINKING_MODES, column_names
from pipeline.records import OUTPUT_SCHEMA

NonEmpty = Annotated[str, StringConstraints(min_length=1)]


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class Columns(_Model):
    """Names of the input's columns. `id: null` numbers the samples `<shard>#<index>`."""

    id: NonEmpty | None = "id"
    image: NonEmpty = "image"


class InputSpec(_Model):
    """Where the samples come from."""

    url: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
    format: Literal["parquet", "images"] = "parquet"
    columns: Columns = Columns()
    limit: Annotated[int, Field(ge=1)] | None = None

    @property
    def urls(self) -> list[str]:
        return [self.url] if isinstance(self.url, str) else list(self.url)


class PromptSpec(_Model):
    """One thing to ask of every sample; `template`, `system` and `thinking_mode` are Jinja2 over its columns."""

    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,100}$")] = "prompt"
    template: NonEmpty
    system: str | None = None
    thinking_mode: NonEmpty = "auto"

    @pydantic.field_validator("template", "system")
    @classmethod
    def _must_parse(cls, source: str | None) -> str | None:
        _parse(source or "")
        return source

    @pydantic.field_validator("thinking_mode")
    @classmethod
    def _must_be_mode_or_template(cls, source: str) -> str:
        if not _parse(source) and source not in THINKING_MODES:
            raise ValueError('must be auto, long, short or a template such as "{{ mode }}"')
        return source

    @property
    def columns(self) -> frozenset[str]:
        return _parse(self.template) | _parse(self.system or "") | _parse(self.thinking_mode)


def _parse(source: str) -> frozenset[str]:
    try:
        return column_names(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"is not a valid Jinja2 template: {error.message} (line {error.lineno})") from error


class SamplingSpec(_Model):
    """Sampling parameters, named and meant as in vLLM."""

    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    max_tokens: Annotated[int, Field(ge=1)] = 1024
    seed: int | None = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    stop: list[NonEmpty] = []


class Replicas(_Model):
    """How many engines: the pool starts with `min` and grows to `max`."""

    min: Annotated[int, Field(ge=1)] = 1
    max: Annotated[int, Field(ge=1)] = 1

    @pydantic.model_validator(mode="after")
    def _ordered(self) -> "Replicas":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is larger than max ({self.max})")
        return self


class SimulationSpec(_Model):
    """The simulated engine's lengths and times (`engine.kind: simulated`), for tests of scale and faults."""

    thinking_share: Annotated[float, Field(ge=0, le=1)] = 0.45
    thinking_tokens: Annotated[int, Field(ge=1)] = 200
    answer_tokens: Annotated[int, Field(ge=1)] = 24
    seconds_per_token: Annotated[float, Field(ge=0)] = 0.0
    max_model_len: Annotated[int, Field(ge=1)] = 32768


class EngineSpec(_Model):
    """The model and the engines that run it."""

    kind: Literal["vllm", "simulated"] = "vllm"
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


class OutputSpec(_Model):
    """Where the parts go."""

    url: NonEmpty
    chunk_rows: Annotated[int, Field(ge=1, le=100_000)] = 256
    keep_columns: list[NonEmpty] = []

    @pydantic.field_validator("keep_columns")
    @classmethod
    def _must_not_clash(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("names a column twice")
        clash = sorted(set(names) & set(OUTPUT_SCHEMA.names))
        if clash:
            raise ValueError(f"{', '.join(clash)}: the output has a column of this name already")
        return names


class LimitsSpec(_Model):
    """What is too much."""

    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_image_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    max_image_bytes: Annotated[int, Field(ge=1)] = 33_554_432
    fetch_timeout_s: Annotated[float, Field(gt=0)] = 30.0


class StorageSpec(_Model):
    """The S3 endpoint. Credentials come from boto3's usual places, never from the spec."""

    endpoint_url: str | None = None
    region: str | None = None

    @pydantic.field_validator("endpoint_url")
    @classmethod
    def _no_secret(cls, url: str | None) -> str | None:
        if url is not None and "@" in url:
            raise pydantic_core.PydanticCustomError(
                "secret", "must not hold a user or a password; boto3 finds those itself"
            )
        return url


class JobSpec(_Model):
    """A whole job."""

    name: NonEmpty = "job"
    input: InputSpec
    prompts: Annotated[list[PromptSpec], Field(min_length=1)]
    sampling: SamplingSpec = SamplingSpec()
    engine: EngineSpec = EngineSpec()
    output: OutputSpec
    limits: LimitsSpec = LimitsSpec()
    storage: StorageSpec = StorageSpec()

    @pydantic.field_validator("prompts")
    @classmethod
    def _ids_differ(cls, prompts: list[PromptSpec]) -> list[PromptSpec]:
        ids = [prompt.id for prompt in prompts]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"two prompts have the id {twice[0]!r}; give each its own")
        return prompts


def parse_spec(data: Any, source: str) -> JobSpec:
    """Check a spec read from YAML; raises SpecError with one line for each wrong key."""
    if not isinstance(data, dict):
        raise SpecError(f"{source}: a job spec is a YAML mapping with the keys {', '.join(JobSpec.model_fields)}.")
    try:
        return JobSpec.model_validate(data)
    except pydantic.ValidationError as error:
        lines = [f"  {_describe(problem)}" for problem in error.errors(include_url=False)]
        raise SpecError("\n".join([f"{source}: the job spec is wrong.", *dict.fromkeys(lines)])) from error


def _describe(problem: Any) -> str:
    """One line: the key, what is wrong, the value. A value is shown only where it is the key's own scalar."""
    parts = [str(part) for part in problem["loc"] if not _is_union_label(part)]
    key = ".".join(parts) or "the spec"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_allowed_keys(parts[:-1])}"
    if problem["type"] == "missing":
        return f"{key}: this key is required"
    message = problem["msg"].removeprefix("Value error, ")
    value = None if problem["type"] == "secret" else problem["input"]
    shown = (
        f" (it is {value!r})" if isinstance(value, str | int | float | bool | None) and len(str(value)) < 200 else ""
    )
    return f"{key}: {message[:1].lower() + message[1:]}{shown}"


def _is_union_label(part: Any) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("constrained-str", "str"))


def _allowed_keys(path: list[str]) -> str:
    model: Any = JobSpec
    for part in path:
        annotation = PromptSpec if part == "prompts" else getattr(model.model_fields.get(part), "annotation", model)
        model = annotation if hasattr(annotation, "model_fields") else model
    return f"allowed here: {', '.join(model.model_fields)}"


def fingerprint_parts(job: JobSpec, model_identity: str) -> dict[str, str]:
    """What decides an answer, each under its own name, so that a refusal can say what changed."""
    engine = job.engine.model_dump(include={"kind", "max_model_len", "args", "simulation"}, mode="json")
    return {
        "engine.model": model_identity,
        "engine.revision": str(job.engine.revision),
        "engine": _dump(engine),
        "prompts": _dump([prompt.model_dump(mode="json") for prompt in job.prompts]),
        "sampling": _dump(job.sampling.model_dump(mode="json")),
        "input.format": job.input.format,
        "input.columns": _dump(job.input.columns.model_dump(mode="json")),
        "output.chunk_rows": str(job.output.chunk_rows),
        "output.keep_columns": _dump(job.output.keep_columns),
        "limits": _dump(job.limits.model_dump(include={"max_image_pixels", "max_image_bytes"}, mode="json")),
    }


def fingerprint_of(parts: dict[str, str]) -> str:
    return hashlib.sha256(_dump(parts).encode()).hexdigest()[:32]


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
