"""The input's files: those that are shards of its format, each once, with the files that belong to them.

Files of one key (the name up to its first dot) stand together in a sorted listing, or with folders between them, so
companions are found without holding the listing. A name given in full or by a glob is taken as it is; a folder is
filtered by endings.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.errors import JobError, SpecError
from pipeline.formats import FORMATS, detect_format
from pipeline.formats.contract import Format, Listing
from pipeline.formats.detect import endings_of
from pipeline.spec import InputFormat, JobSpec
from pipeline.storage import ObjectInfo, absolute_url, glob_root, is_glob, open_store


@dataclass(frozen=True)
class InputFiles:
    """The files of a job's input, listed anew at each iteration."""

    job: JobSpec
    name: InputFormat
    any_ending: bool = False
    """The format was told by first bytes: names say nothing."""

    @property
    def format(self) -> Format:
        return FORMATS[self.name]

    def listings(self) -> Iterator[Listing]:
        """Shards in the order of the URLs, each once however many of the URLs reach it; raises SpecError."""
        seen: set[str] | None = set() if len(self.job.input.urls) > 1 else None
        for url in self.job.input.urls:
            found = False
            for listing in self._below(url):
                found = True
                if seen is None or listing.info.url not in seen:
                    yield listing
                if seen is not None:
                    seen.add(listing.info.url)
            if not found:
                what = "image" if self.name == "images" else self.name
                raise SpecError(
                    f"input.url: no {what} files at {url}; it must be a file, a folder or prefix, or a glob."
                )

    def _below(self, url: str) -> Iterator[Listing]:
        root = glob_root(absolute_url(url))
        for files in group_files(list_files(self.job, url)):
            companions: dict[str, list[ObjectInfo]] = {}
            for info in filter(self._is_companion, files):
                companions.setdefault(_stem_of(info), []).append(info)
            for info in files:
                if not self._is_companion(info) and self._is_shard(url, info):
                    # `a.txt` and `a.jpg.txt` belong to `a.jpg`
                    ours = companions.get(info.url, []) + companions.get(_stem_of(info), [])
                    yield Listing(root, info, tuple(sorted(ours, key=lambda one: one.url)))

    def _is_companion(self, info: ObjectInfo) -> bool:
        return PurePosixPath(info.url).suffix.lower() in self.format.companions

    def _is_shard(self, url: str, info: ObjectInfo) -> bool:
        return (
            self.any_ending
            or is_named(url, info)
            or (not is_hidden(info) and not endings_of(info.url).isdisjoint(self.format.extensions))
        )


def list_files(job: JobSpec, url: str) -> Iterator[ObjectInfo]:
    """All files at a URL, of whatever kind; raises SpecError."""
    try:
        yield from open_store(url, job.storage).list(absolute_url(url))
    except (JobError, OSError) as error:
        raise SpecError(f"input.url: {error}") from error


def group_files(files: Iterable[ObjectInfo]) -> Iterator[list[ObjectInfo]]:
    """Sorted files by key: `a.c` and `a.e` go together, though files of the folder `a.d` stand between them."""
    groups: list[tuple[str, list[ObjectInfo]]] = []
    for info in files:
        key = _key_of(info)
        while groups and not info.url.startswith(groups[-1][0] + "."):
            yield groups.pop()[1]
        if groups and groups[-1][0] == key:
            groups[-1][1].append(info)
        else:
            groups.append((key, [info]))
    while groups:
        yield groups.pop()[1]


def choose_format(job: JobSpec) -> tuple[InputFiles, str | None]:
    """The input's files under the format that the spec names or that they show, and what was decided."""
    if job.input.format != "auto":
        return InputFiles(job, job.input.format), None
    files = (
        info for url in job.input.urls for info in list_files(job, url) if is_named(url, info) or not is_hidden(info)
    )
    name, why, by_bytes = detect_format(job, FORMATS, files)
    return InputFiles(job, name, by_bytes), f"input.format: auto takes the input for {name} ({why})"


def is_named(url: str, info: ObjectInfo) -> bool:
    """Whether the spec names this very file, in full or by a glob, rather than a folder above it."""
    below = info.url.startswith(absolute_url(url).rstrip("/") + "/")
    return info.url == absolute_url(url) or (is_glob(url) and not below)


def is_hidden(info: ObjectInfo) -> bool:
    return PurePosixPath(info.url).name.startswith((".", "_"))


def _key_of(info: ObjectInfo) -> str:
    folder, _, name = info.url.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _stem_of(info: ObjectInfo) -> str:
    return info.url.rpartition(".")[0]
