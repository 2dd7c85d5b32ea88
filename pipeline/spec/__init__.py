"""The job spec: every key of the YAML file, its type, its default and its limits, a module for each section.

Frozen pydantic models; unknown keys are errors. Reading the file and `--set` belong to `jobs/`.
Not covered: whether the input, the output and the model exist.
"""

from pipeline.spec.engine import EngineSpec, Replicas, SimulationSpec
from pipeline.spec.input import Columns, InputFormat, InputSpec, SampleSpec
from pipeline.spec.job import JobSpec, engine_parts, fingerprint_of, fingerprint_parts, parse_spec
from pipeline.spec.places import HttpSpec, LimitsSpec, OutputSpec, StorageSpec
from pipeline.spec.prompts import MessageSpec, PromptShardsSpec, PromptSpec, SamplingSpec, check_sampling

__all__ = [
    "Columns",
    "EngineSpec",
    "HttpSpec",
    "InputFormat",
    "InputSpec",
    "JobSpec",
    "LimitsSpec",
    "MessageSpec",
    "OutputSpec",
    "PromptShardsSpec",
    "PromptSpec",
    "Replicas",
    "SampleSpec",
    "SamplingSpec",
    "SimulationSpec",
    "StorageSpec",
    "check_sampling",
    "engine_parts",
    "fingerprint_of",
    "fingerprint_parts",
    "parse_spec",
]
