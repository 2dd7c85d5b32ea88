"""Prompts without a sample: what the prompt shards hold and no row has, counted exactly when the job is done.

Memory holds one prompt shard, then its keys alone while the parts of its chunks go by, a few at a time.
Not covered: samples without a prompt, which each part counts.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from pipeline.ahead import map_ahead
from pipeline.commits import Output
from pipeline.errors import JobError, SpecError
from pipeline.plan import Plan, part_url
from pipeline.prompt_shards import PromptTable, read_prompt_table
from pipeline.records import Manifest, read_part
from pipeline.storage import open_store

MAX_EXAMPLES = 10
READS_AT_ONCE = 8
Key = tuple[str, str]


def match_prompts(output: Output, plan: Plan, manifest: Manifest) -> None:
    """Fill in the manifest's counts; raises JobError if `prompts.unmatched` is `error` and there is a difference."""
    spec = output.job.prompt_shards
    if spec is None:
        manifest.prompts_without_sample = manifest.prompts_unreadable = 0
        return
    if output.job.input.selects:
        return  # nobody can tell a prompt without a sample from one whose sample was left out
    manifest.prompts_without_sample = manifest.prompts_unreadable = 0
    for shard, chunk_ids in _chunks_by_prompt_shard(plan):
        _match_shard(output, shard, chunk_ids, manifest)
    lost = manifest.prompts_without_sample + manifest.prompts_unreadable
    if spec.unmatched == "error" and lost:
        examples = "".join(f"\n  {one}" for one in manifest.examples_without_sample)
        raise JobError(
            f"{lost} prompts of {spec.url} belong to no sample (prompts.unmatched: error); all rows are committed. "
            "Mend the prompts; then run with --drop-stale, or with --force-new if they are one table."
            f"{examples}"
        )


def _match_shard(output: Output, shard: Key, chunk_ids: Iterable[str], manifest: Manifest) -> None:
    left = _count_prompts(output, shard, manifest)
    for keys in _keys_of_parts(output, chunk_ids):
        for key in keys:
            left.pop(key, None)
    manifest.prompts_without_sample = (manifest.prompts_without_sample or 0) + len(left)
    _add_examples(manifest, (f"{sample_id}, {prompt_id} in {shard[0]}" for sample_id, prompt_id in left))


def _count_prompts(output: Output, shard: Key, manifest: Manifest) -> dict[Key, None]:
    """The keys of a prompt shard, in its order."""
    table = _read_table(output, shard)
    manifest.prompts_unreadable = (manifest.prompts_unreadable or 0) + table.num_unreadable
    _add_examples(manifest, table.unreadable_examples)
    return dict.fromkeys(table.keys())


def _read_table(output: Output, shard: Key) -> PromptTable:
    try:  # not from the cache of `asking`, which would keep it
        return read_prompt_table(*shard, output.job.storage)
    except SpecError as error:
        raise JobError(f"All rows are committed, but not all prompts can be counted. {error}") from error


def _add_examples(manifest: Manifest, examples: Iterable[str]) -> None:
    for example in examples:
        if len(manifest.examples_without_sample) == MAX_EXAMPLES:
            return
        manifest.examples_without_sample.append(example)


def _chunks_by_prompt_shard(plan: Plan) -> Iterator[tuple[Key, list[str]]]:
    if plan.prompt_table is not None:
        yield plan.prompt_table, [chunk.chunk_id for chunk in plan.chunks]
        return
    groups: dict[Key, list[str]] = {shard: [] for shard in plan.prompt_shards}
    for chunk in plan.chunks:
        if chunk.prompts is not None:
            groups[chunk.prompts].append(chunk.chunk_id)
    yield from groups.items()


def _keys_of_parts(output: Output, chunk_ids: Iterable[str]) -> Iterator[list[Key]]:
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        yield from map_ahead(pool, lambda chunk_id: _keys_of(output, chunk_id), chunk_ids, READS_AT_ONCE)


def _keys_of(output: Output, chunk_id: str) -> list[Key]:
    with open_store(output.url, output.job.storage).open(part_url(output.url, chunk_id)) as file:
        table = read_part(file, ["sample_id", "prompt_id"])
    return list(zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True))
