"""What every input format gives: shards cut into chunks, and samples read from them.

A format that can tell how many samples a shard has cuts it into chunks; one that would have to read it all gives the
shard itself, whose chunks get their names as it is read. Either way a sample's index in its shard never changes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from pipeline.errors import SampleError, SpecError
from pipeline.records import Anchor, Chunk, Shard
from pipeline.spec import JobSpec
from pipeline.storage import ObjectInfo


@dataclass(frozen=True)
class ImageRef:
    """An image that lies elsewhere: `url` is a local path, `s3://` or http(s); `version` where it is known."""

    url: str
    version: str | None = None


ImageSource = bytes | ImageRef | SampleError | None


@dataclass(frozen=True)
class Sample:
    """One sample as its shard holds it, before anything is fetched or decoded."""

    index: int
    """Its place in the shard, damaged ranges counted."""
    sample_id: str | None
    """None where the input does not name it."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[ImageSource, ...] = ()
    position: int = 0
    """Where it stands in the shard (`Anchor.position`)."""
    kept: pa.Table | None = None
    """Its kept columns as one Arrow row; None for a sample that has an error or does not pass."""
    error: SampleError | None = None
    """Nothing of this sample can be read."""
    passes: bool = True
    """Whether `input.where` holds."""


@dataclass(frozen=True)
class Listing:
    """One shard of the input, or one loose image; `root` is the folder or prefix that the spec names above it."""

    root: str
    info: ObjectInfo
    companions: tuple[ObjectInfo, ...] = ()
    """Files of the same name that belong to it: an index, side-cars."""
    prompts: tuple[str, str] | None = None
    """(URL, version) of the prompt shard that belongs to it."""

    @property
    def shard(self) -> Shard:
        return Shard(self.info.url, self.info.version, self.prompts)


@dataclass(frozen=True)
class Head:
    """The start of the input: what its samples look like."""

    schema: pa.Schema
    """Types of the columns that are kept or filtered by."""
    rows: tuple[Mapping[str, Any], ...] = ()
    """Columns of the first samples, where the format has no schema that would tell which there are."""


@dataclass(frozen=True)
class Span:
    """What is read in one pass: a shard's samples from `anchor` to `stop`, or to its end.

    `end` is the position where the last of them ends, where that is known; then it decides, not the count.
    """

    shard: Shard
    anchor: Anchor = field(default_factory=Anchor)
    stop: int | None = None
    end: int | None = None
    members: tuple[tuple[tuple[str, str], ...], ...] = ()


Wanted = Callable[[int], bool]
Note = Callable[[str], None]
"""Takes a sentence about the input that a person should see."""


class Format(Protocol):
    """One input format."""

    extensions: frozenset[str]
    """Endings of the names that are shards of this format, in lower case."""
    companions: frozenset[str]
    """Endings of files that the listing must show too, though they are no shards."""

    def look(self, job: JobSpec, listings: Iterable[Listing]) -> Head:
        """Check the columns that the job names against the first shard that can be read; raises SpecError."""
        ...

    def cut(self, job: JobSpec, listings: Iterator[Listing], head: Head, note: Note) -> Iterator[Chunk | Shard]:
        """Chunks of each shard, or the shard itself if its samples would have to be counted."""
        ...

    def read(self, job: JobSpec, span: Span, schema: pa.Schema, wanted: Wanted) -> Iterator[Sample]:
        """The span's samples in order; those that are not wanted may lack everything but their index.

        `schema` is that of the head.

        Raises ShardChangedError when the shard is not the planned one. What cannot be read inside it comes as a
        sample with an error.
        """
        ...


def damaged(index: int, message: str, position: int = 0) -> Sample:
    """The sample that stands for a range of a shard that cannot be read."""
    return Sample(index, None, position=position, error=SampleError("shard_damaged", message))


def check_filter(job: JobSpec, shard: str, schema: pa.Schema) -> None:
    """Raise SpecError if `input.where` cannot be applied to columns of these types."""
    if job.input.filter is None:
        return
    try:
        schema.empty_table().filter(job.input.filter)
    except (pa.ArrowException, NotImplementedError) as error:
        raise SpecError(f"input.where: it cannot be applied to the columns of {shard}: {error}") from error
