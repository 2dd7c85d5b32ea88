"""Which prompt shard belongs to which shard, by their names: `a/00017.tar` takes `a/00017.jsonl`.

Without endings and below their roots, the names are equal, or one ends with the other (`00017` and `a/00017`). No
prompt shard belongs to two shards: sample ids are often counted anew in each. In the shape `table` there is one table
of prompts for all shards.
Not covered: what the prompt shards hold; none is read here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pipeline.errors import JobError, SpecError
from pipeline.formats.contract import Listing
from pipeline.formats.jsonlines import COMPRESSIONS
from pipeline.listing import is_hidden, is_named
from pipeline.prompt_shards import JSON_ENDINGS, PARQUET_ENDINGS, stem_of
from pipeline.spec import InputFormat, JobSpec
from pipeline.storage import ObjectInfo, absolute_url, glob_root, open_store

PROMPT_ENDINGS = (
    *JSON_ENDINGS,
    *(f"{name}{packed}" for name in JSON_ENDINGS for packed in COMPRESSIONS),
    *PARQUET_ENDINGS,
)
Named = tuple[str, str]


@dataclass
class PromptListing:
    """The prompt shards of a job. `table`, or `by_path`: paths below `prompts.url`, without endings."""

    table: Named | None = None
    by_path: dict[str, Named] = field(default_factory=dict)
    by_end: dict[str, Named | None] = field(default_factory=dict)
    """By the ends of those paths, such as `00017` of `a/00017`; None where several paths end so."""
    claimed: dict[Named, str] = field(default_factory=dict)
    """The URL of the shard that each belongs to."""

    def claim(self, listing: Listing) -> Listing:
        """The shard with its prompt shard, if it has one; raises SpecError if another shard has the same."""
        path = _path_below(listing.root, listing.info.url)
        known = [end for end in (path, *_ends_of(path)) if end in self.by_path]
        found = self.by_path[known[0]] if known else self.by_end.get(path)
        if found is not None and self.claimed.setdefault(found, listing.info.url) != listing.info.url:
            raise SpecError(
                f"prompts.url: by its name, {found[0]} belongs to {self.claimed[found]} and to {listing.info.url}; "
                "keep prompt shards in folders named as those of the shards, or use one table (prompts.shape: table)."
            )
        return replace(listing, prompts=found)

    def check(self) -> None:
        """Raise SpecError if no prompt shard belongs to any shard: then the names were meant otherwise."""
        if self.by_path and not self.claimed:
            (first, *_) = self.by_path.values()
            raise SpecError(
                f"prompts.url: no prompt shard, such as {first[0]}, has the name of a shard of the input; "
                "rename them, or use one table (prompts.shape: table)."
            )

    @property
    def all(self) -> tuple[Named, ...]:
        return tuple(self.by_path.values())


def list_prompt_shards(job: JobSpec, input_format: InputFormat) -> PromptListing:
    """What lies at `prompts.url`; raises SpecError. Empty if the spec holds the prompts itself."""
    spec = job.prompt_shards
    if spec is None:
        return PromptListing()
    files = list(_prompt_files(job, spec.url))
    if not files:
        raise SpecError(f"prompts.url: no prompt shards ({', '.join(PROMPT_ENDINGS)}) at {spec.url}.")
    one_file = len(files) == 1 and files[0].url == absolute_url(spec.url)
    shape = spec.shape or ("table" if one_file else "aligned")
    if shape == "table":
        if len(files) > 1:
            raise SpecError(f"prompts.shape: table takes one file, and {spec.url} holds {len(files)}.")
        return PromptListing(table=(files[0].url, files[0].version))
    if input_format == "images":
        raise SpecError("prompts.shape: loose images have no shards to align with; use one table of prompts.")
    return _aligned(spec.url, files)


def _prompt_files(job: JobSpec, url: str) -> Iterator[ObjectInfo]:
    try:
        for info in open_store(url, job.storage).list(absolute_url(url)):
            if info.url.lower().endswith(PROMPT_ENDINGS) and (is_named(url, info) or not is_hidden(info)):
                yield info
    except (JobError, SpecError, OSError) as error:
        raise SpecError(f"prompts.url: {error}") from error


def _aligned(url: str, files: list[ObjectInfo]) -> PromptListing:
    listing = PromptListing()
    root = glob_root(absolute_url(url))
    for info in files:
        path, named = _path_below(root, info.url), (info.url, info.version)
        if path in listing.by_path:
            raise SpecError(f"prompts.url: {listing.by_path[path][0]} and {info.url} are both for {path}; keep one.")
        listing.by_path[path] = named
        for end in _ends_of(path):
            listing.by_end[end] = None if end in listing.by_end else named
    return listing


def _path_below(root: str, url: str) -> str:
    """Without its endings; of a file that the spec names in full, the name alone."""
    below = url.removeprefix(root.rstrip("/") + "/") if url != root else ""
    folder, slash, _ = below.rpartition("/")
    return f"{folder}{slash}{stem_of(url)}"


def _ends_of(path: str) -> list[str]:
    """`b/c` and `c` of `a/b/c`."""
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(1, len(parts))]
