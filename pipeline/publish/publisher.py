"""The flow of `r4b publish`.

    publish(source, target):
        parts   = list_parts(source)                   # and the version's name: a hash of what there is to publish
        footers = read_footers(parts)                  # rows, sizes, schemas; sorted on disk into the input's order
        plans   = plan_files(footers)                  # which part goes into which file, before the first is written
        write   = plans that are not there yet         # each file in one step, under a name that the plan fixes
        complete, then point_to                        # the manifest, and one put that moves all readers on

Killed at any moment and started again, it goes on with the files that are there. Memory does not grow with the number
of parts.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.errors import JobError, SpecError
from pipeline.publish.files import Partitions, Writing, json_value, merge_schemas
from pipeline.publish.index import FilePlan, PartsIndex
from pipeline.publish.parts import Footer, Source, check_unchanged, list_parts, open_source, read_footers
from pipeline.publish.versions import FORMAT, PublishedFile, Target, Version
from pipeline.spec import StorageSpec
from pipeline.storage import is_glob


@dataclass(frozen=True)
class PublishOptions:
    """What a version is made of and looks like; all but `max_partitions` are part of its name."""

    target_size: int = 256_000_000
    """Bytes of compressed Parquet in a file, about."""
    partition_by: str | None = None
    max_partitions: int = 1000
    unfinished: bool = False
    with_stale: bool = False


@dataclass(frozen=True)
class Published:
    """What a publish did."""

    version: Version
    files_written: int
    """By this call; the others were there."""
    moved: bool
    """Whether readers were moved on to this version; if not, they had it already."""


OnStart = Callable[[str, int], Callable[[int], None]]
"""Is told of a step (`parts` or `rows`) and how many it has; gives what is told of each few."""


def publish(
    output_url: str,
    target_url: str,
    storage: StorageSpec,
    options: PublishOptions,
    on_start: OnStart = lambda unit, total: lambda count: None,
) -> Published:
    """Publish a job's parts as one version; raises SpecError if that is not to be had, JobError if it fails."""
    if is_glob(target_url):
        raise SpecError(
            f"--to: {target_url} holds one of * ? [, which stand for other characters; choose another name."
        )
    source = open_source(output_url, storage, options.unfinished)
    target = Target(target_url, storage)
    if (target.url + "/").startswith(f"{source.url}/data/"):
        raise SpecError(f"--to: {target.url} lies among the parts; choose a place outside {source.url}/data.")
    with closing(PartsIndex()) as index, told_of_index():
        name = list_into(index, source, options)
        version = target.read(name)
        there = target.files_there(name)
        written = 0
        if version is None or not {file.path for file in version.files} <= set(there):
            made, written = _Publisher(source, target, options, index, on_start).make(name, there)
            check_unchanged(source)
            version = target.complete(made)
    moved = target.point_to(name)
    if target.read(name) is None:
        target.point_to_newest()
        raise JobError(f"Another publisher's --keep removed version {name} meanwhile. Run the command again.")
    return Published(version, written, moved)


@contextmanager
def told_of_index() -> Iterator[None]:
    """Turn what SQLite says into a JobError."""
    try:
        yield
    except sqlite3.Error as error:
        raise JobError(
            f"The list of parts cannot be kept on the local disk: {error}. TMPDIR names another place."
        ) from error


def list_into(index: PartsIndex, source: Source, options: PublishOptions) -> str:
    """List the parts, and name the version: a hash of what they are and of how they are to be published."""
    form = [FORMAT, source.fingerprint, source.finished, options.target_size, options.partition_by]
    digest = hashlib.sha256(json.dumps(form).encode())
    for part in list_parts(source, options.with_stale):
        index.add_part(part)
        digest.update(f"\n{part.chunk_id} {part.version}".encode())
    if index.num_parts == 0:
        raise SpecError(f"{source.url} holds no parts to publish.")
    return digest.hexdigest()[:32]


@dataclass
class _Publisher:
    """One version while it is made."""

    source: Source
    target: Target
    options: PublishOptions
    index: PartsIndex
    on_start: OnStart

    def make(self, name: str, there: dict[str, int]) -> tuple[Version, int]:
        """Write the files that are not among `there`; gives the version, and how many were written."""
        partitions = Partitions(self.options.partition_by, self.options.max_partitions)
        schema, sample = self._read_footers(partitions)
        self._check_complete()
        plans = list(self.index.plan_files(self.options.target_size))
        if not plans:
            partitions.numbers[None] = 0
            plans = [FilePlan(1, 0, 0, 0, 0)]
        values = list(partitions.numbers)
        paths = {plan.id: f"{partitions.folder_of(values[plan.partition])}{plan.number:05d}.parquet" for plan in plans}
        missing = {plan.id: plan for plan in plans if paths[plan.id] not in there}
        self.index.set_present(plan.id for plan in plans if plan.id not in missing)

        def put(plan: FilePlan, file: BinaryIO) -> None:
            self.target.store.put_file_if_absent(self.target.file(name, paths[plan.id]), file)

        on_rows = self.on_start("row", sum(plan.num_rows for plan in missing.values()))
        metadata = self._footer_metadata(name, sample)
        writing = Writing(self.source, schema.with_metadata(metadata), partitions, put, on_rows)
        if self.index.num_rows:
            writing.write(self.index, missing)
        elif missing:
            writing.write_empty(plans[0])
        sizes = self.target.files_there(name)
        if lost := [paths[plan.id] for plan in plans if paths[plan.id] not in sizes]:
            raise JobError(f"{self.target.file(name, lost[0])} is gone: another publisher removed it. Run it again.")
        files = [self._describe(plan, paths[plan.id], sizes, values[plan.partition]) for plan in plans]
        return self._version(name, schema, sample, files), len(missing)

    def _read_footers(self, partitions: Partitions) -> tuple[pa.Schema, Footer]:
        on_parts = self.on_start("part", self.index.num_parts)
        schema = sample = None
        for number, footer in enumerate(read_footers(self.source, self.index.parts(), partitions.column), 1):
            schema, sample = merge_schemas(schema, footer), footer
            self.index.add_footer(number, footer, partitions.number(footer))
            on_parts(1)
        if sample is None:
            raise SpecError(f"{self.source.url} holds no parts to publish.")
        self.index.rank_parts()
        return schema, replace(sample, rows_by_value={})

    def _check_complete(self) -> None:
        """The parts of a finished job are those that its manifest counted; those of any job lie side by side."""
        if not self.source.of_folders:
            self.index.check_overlaps()
        manifest = self.source.manifest
        if manifest is None or self.options.with_stale:
            return
        found = (self.index.num_parts, self.index.num_rows)
        if found != (manifest["num_chunks"], manifest["num_rows"]):
            raise JobError(
                f"{self.source.url} has {found[1]} rows in {found[0]} parts, and its manifest counts "
                f"{manifest['num_rows']} in {manifest['num_chunks']}: parts were added or removed since it was "
                "finished. Run the job again, then publish."
            )

    def _footer_metadata(self, name: str, sample: Footer) -> dict[str, str]:
        return {
            "r4b.model": sample.model,
            "r4b.revision": sample.revision,
            "r4b.fingerprint": self.source.fingerprint,
            "r4b.version": name,
            "r4b.software_version": package_version("r4b"),
        }

    def _describe(self, plan: FilePlan, path: str, sizes: dict[str, int], value: Any) -> PublishedFile:
        column = self.options.partition_by
        partition = {} if column is None else {column: json_value(value)}
        return PublishedFile(path, plan.num_rows, sizes[path], partition)

    def _version(self, name: str, schema: pa.Schema, sample: Footer, files: list[PublishedFile]) -> Version:
        return Version(
            version=name,
            created_at=datetime.now(UTC).isoformat(timespec="microseconds"),
            name=self.source.name,
            source=self.source.url,
            model=sample.model,
            revision=sample.revision,
            fingerprint=self.source.fingerprint,
            software_version=package_version("r4b"),
            finished=self.source.finished,
            num_parts=self.index.num_parts,
            num_rows=self.index.num_rows,
            num_bytes=sum(file.bytes for file in files),
            target_size=self.options.target_size,
            partition_by=self.options.partition_by,
            columns={field.name: str(field.type) for field in schema},
            files=tuple(sorted(files, key=lambda file: file.path)),
        )
