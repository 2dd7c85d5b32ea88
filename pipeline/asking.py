"""What is asked of a sample: the spec's prompts, rendered over its columns, or the rows of a prompt shard.

What is wrong with one prompt is that row's error and no other's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from pipeline.errors import SampleError
from pipeline.formats import Sample
from pipeline.prompt_shards import PromptTable, read_prompt_table
from pipeline.prompts import THINKING_MODES, render_prompt
from pipeline.spec import JobSpec, PromptSpec, StorageSpec, check_sampling

NO_PROMPT = ""
"""The `prompt_id` of a row that stands for a sample for which no prompt is known."""


@dataclass(frozen=True)
class Asked:
    """One prompt of one sample, ready to be a row."""

    prompt_id: str
    mode: str
    messages: tuple[Mapping[str, Any], ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    error: SampleError | None = None


class Asker:
    """Asks the prompts of a job. `shard` is (URL, version) of the prompt shard for these samples, if they have one."""

    def __init__(self, job: JobSpec, shard: tuple[str, str] | None) -> None:
        self._job = job
        self._table = None
        if job.prompt_shards is not None and shard is not None:
            self._table = load_prompt_table(*shard, job.storage)

    def ask(self, sample: Sample, sample_id: str) -> Sequence[Asked]:
        """The sample's prompts in order; none where prompt shards hold none for it."""
        if self._job.prompt_shards is None:
            return [ask_spec_prompt(prompt, sample.columns) for prompt in self._job.spec_prompts]
        mode = self._job.prompt_shards.thinking_mode
        if sample.error is not None and sample.sample_id is None:
            return [Asked(NO_PROMPT, mode)]  # a range that cannot be read: its row says so
        rows = self._table.of(sample_id) if self._table is not None else ()
        if not rows and self._job.prompt_shards.unmatched == "error":
            return [Asked(NO_PROMPT, mode, error=SampleError("prompt_missing", "No prompt names this sample."))]
        return [
            Asked(row.prompt_id, row.thinking_mode or mode, row.messages, row.sampling, error=row.error) for row in rows
        ]


def ask_spec_prompt(prompt: PromptSpec, columns: Mapping[str, Any]) -> Asked:
    """A prompt of the spec over one sample's columns."""
    try:
        rendered = render_prompt(prompt.all_messages, prompt.thinking_mode, prompt.sampling, columns)
        _check(rendered.sampling)
    except SampleError as error:
        plain = prompt.thinking_mode in THINKING_MODES
        return Asked(prompt.id, prompt.thinking_mode if plain else "auto", error=error)
    return Asked(prompt.id, rendered.thinking_mode, rendered.messages, rendered.sampling)


def _check(sampling: Mapping[str, Any]) -> None:
    try:
        check_sampling(dict(sampling))
    except ValueError as error:
        raise SampleError("sampling_invalid", f"The prompt's sampling cannot be used: {error}.") from error


@lru_cache(maxsize=1)
def load_prompt_table(url: str, version: str, storage: StorageSpec) -> PromptTable:
    """A prompt shard, kept for the chunks that follow; raises SpecError."""
    return read_prompt_table(url, version, storage)
