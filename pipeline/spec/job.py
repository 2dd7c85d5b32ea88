"""A whole spec, read and checked, and the fingerprint of what decides its answers."""

import hashlib
import json
from typing import Annotated, Any

import pyarrow as pa
import pydantic
from pydantic import Field

from pipeline.errors import SpecError
from pipeline.spec.base import NonEmpty, Section
from pipeline.spec.engine import EngineSpec
from pipeline.spec.input import InputSpec
from pipeline.spec.places import HttpSpec, LimitsSpec, OutputSpec, StorageSpec
from pipeline.spec.prompts import MessageSpec, PromptShardsSpec, PromptSpec, SamplingSpec


class JobSpec(Section):
    """A whole job."""

    name: NonEmpty = "job"
    input: InputSpec
    prompts: Annotated[
        Annotated[list[PromptSpec], Field(min_length=1), pydantic.Tag("[list]")]
        | Annotated[PromptShardsSpec, pydantic.Tag("[shards]")],
        pydantic.Discriminator(lambda value: "[shards]" if isinstance(value, dict | PromptShardsSpec) else "[list]"),
    ]
    sampling: SamplingSpec = SamplingSpec()
    engine: EngineSpec = EngineSpec()
    output: OutputSpec
    limits: LimitsSpec = LimitsSpec()
    http: HttpSpec = HttpSpec()
    storage: StorageSpec = StorageSpec()

    @pydantic.field_validator("prompts")
    @classmethod
    def _ids_differ(cls, prompts: list[PromptSpec] | PromptShardsSpec) -> list[PromptSpec] | PromptShardsSpec:
        if isinstance(prompts, PromptShardsSpec):
            return prompts
        ids = [prompt.id for prompt in prompts]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"two prompts have the id {twice[0]!r}; give each its own")
        return prompts

    @property
    def spec_prompts(self) -> list[PromptSpec]:
        """The prompts that the spec itself holds; none where they are kept in shards."""
        return [] if isinstance(self.prompts, PromptShardsSpec) else self.prompts

    @property
    def prompt_shards(self) -> PromptShardsSpec | None:
        return self.prompts if isinstance(self.prompts, PromptShardsSpec) else None


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
    for index, part in enumerate(path):
        annotation = getattr(model.model_fields.get(part), "annotation", model)
        if part == "prompts":
            annotation = PromptShardsSpec if index == len(path) - 1 else PromptSpec
        elif part == "messages":
            annotation = MessageSpec
        model = annotation if hasattr(annotation, "model_fields") else model
    return f"allowed here: {', '.join(model.model_fields)}"


def fingerprint_parts(
    job: JobSpec,
    model_identity: str,
    input_format: str,
    schema: pa.Schema,
    prompt_table: tuple[str, str] | None = None,
) -> dict[str, str]:
    """What decides an answer, each under its own name, so that a refusal can say what changed.

    `input_format` is the one that was found, `schema` the types of the columns that are kept or filtered by.
    """
    kept = {name: str(schema.field(name).type) for name in job.output.keep_columns}
    parts = {
        **engine_parts(job.engine, model_identity),
        "prompts": _dump(job.model_dump(include={"prompts"}, mode="json", exclude_defaults=True)["prompts"]),
        "sampling": _dump(job.sampling.model_dump(mode="json")),
        "input.format": input_format,
        "input.columns": _dump(job.input.columns.model_dump(mode="json")),
        "input.sample": _dump(job.input.model_dump(include={"sample"}, mode="json")["sample"]),
        "input.where": _dump(job.input.model_dump(include={"where"}, mode="json")["where"]),
        "output.chunk_rows": str(job.output.chunk_rows),
        "output.keep_columns": _dump(kept),
        "limits": _dump(job.limits.model_dump(include=IMAGE_LIMITS, mode="json")),
    }
    return parts if prompt_table is None else {**parts, "prompts.url": " ".join(prompt_table)}


def engine_parts(engine: EngineSpec, model_identity: str) -> dict[str, str]:
    """What of an engine decides an answer; a deployment tells the same of its own (`engine.pool: serve`)."""
    deciding = engine.model_dump(include={"kind", "max_model_len", "args", "simulation"}, mode="json")
    for name in DEADLY:
        del deciding["simulation"][name]
    return {"engine.model": model_identity, "engine.revision": str(engine.revision), "engine": _dump(deciding)}


DEADLY = ("kills_engine", "kills_process", "hangs_engine")
"""What the simulated engine does not survive: it decides which rows are answered, and no answer."""
IMAGE_LIMITS = {"max_image_pixels", "max_image_bytes", "max_image_frames", "image_formats"}


def fingerprint_of(parts: dict[str, str]) -> str:
    return hashlib.sha256(_dump(parts).encode()).hexdigest()[:32]


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
