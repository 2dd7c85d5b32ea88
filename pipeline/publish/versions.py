"""What a publish target looks like, and how its readers see all or nothing of a version.

    TARGET/versions/<version>/...parquet       files, each of them put in one step
    TARGET/versions/<version>/_manifest.json   which files the version has; written when all of them are there
    TARGET/_latest.json                        which version is the latest: one put moves every reader on

A version's name is a hash of its content and form, so publishers of the same version write the same names, and those of
different ones do not meet. All paths are relative: a target may be copied as a whole.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import tenacity

from pipeline.errors import JobError, ShardChangedError, SpecError
from pipeline.spec import StorageSpec
from pipeline.storage import Store, absolute_url, join_url, open_store

LATEST_FILE, VERSIONS, VERSION_MANIFEST = "_latest.json", "versions", "_manifest.json"
FORMAT = 3
"""Of what a target holds, and of how rows are laid out in files: another number gives other versions."""


@dataclass(frozen=True)
class PublishedFile:
    """A file of a version. `path` is below the version's folder, `partition` its column and value."""

    path: str
    rows: int
    bytes: int
    partition: dict[str, Any]


@dataclass(frozen=True)
class Version:
    """A complete version, as its manifest tells."""

    version: str
    created_at: str
    """UTC, ISO 8601."""
    name: str
    """Of the job."""
    source: str
    model: str
    revision: str
    fingerprint: str
    software_version: str
    finished: bool
    """Whether the job was finished; if not, rows are missing."""
    num_parts: int
    num_rows: int
    num_bytes: int
    target_size: int
    partition_by: str | None
    columns: dict[str, str]
    """Name and Arrow type, in order. The column to partition by stands in the folders' names, not in the files."""
    files: tuple[PublishedFile, ...]
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


class Target:
    """A place to publish to."""

    def __init__(self, url: str, storage: StorageSpec) -> None:
        self.url = absolute_url(url).rstrip("/")
        self.store: Store = open_store(self.url, storage)

    def file(self, version: str, path: str) -> str:
        return join_url(self.url, VERSIONS, version, path)

    def files_there(self, version: str) -> dict[str, int]:
        """Size by path of every Parquet file of a version, complete or not."""
        folder = self.file(version, "")
        found = {info.url.removeprefix(folder): info.size for info in self.store.list(folder)}
        return {path: size for path, size in found.items() if path.endswith(".parquet")}

    def read(self, version: str) -> Version | None:
        """None unless the version is complete."""
        url = self.file(version, VERSION_MANIFEST)
        if self.store.stat(url) is None:
            return None
        try:
            content = _read_json(self.store, url)
        except ShardChangedError:  # another publisher's --keep takes it away
            return None
        try:
            files = tuple(PublishedFile(**file) for file in content.pop("files"))
            return Version(files=files, **content)
        except (KeyError, TypeError) as error:
            raise JobError(f"{url} is not a manifest of this software.") from error

    def complete(self, version: Version) -> Version:
        """Write the manifest; gives the one that counts, which another publisher may have written before."""
        url = self.file(version.version, VERSION_MANIFEST)
        self.store.put_if_absent(url, version.to_json().encode())
        found = self.read(version.version)
        if found is None:
            raise JobError(f"{url} was removed by another publisher's --keep. Run the command again.")
        return found

    @tenacity.retry(
        retry=tenacity.retry_if_exception_type(ShardChangedError), stop=tenacity.stop_after_attempt(10), reraise=True
    )
    def latest_name(self) -> str | None:
        """The version that readers take; None if there is none yet. Reads again if another publisher moves them now."""
        url = join_url(self.url, LATEST_FILE)
        if self.store.stat(url) is None:
            return None
        try:
            return str(_read_json(self.store, url)["version"])
        except KeyError as error:
            raise JobError(f"{url} is not a pointer of this software.") from error

    def point_to(self, version: str) -> bool:
        """Move every reader on to a complete version, in one step; False if they are there already."""
        if self.latest_name() == version:
            return False
        content = {"format": FORMAT, "manifest": f"{VERSIONS}/{version}/{VERSION_MANIFEST}", "version": version}
        data = json.dumps(content, indent=2, sort_keys=True) + "\n"
        self.store.put(join_url(self.url, LATEST_FILE), data.encode())
        return True

    def point_to_newest(self) -> None:
        """Undo a `point_to` whose version another publisher's --keep has removed, so that readers have one."""
        versions = sorted(self._complete_versions(), key=lambda version: version.created_at)
        if versions:
            self.point_to(versions[-1].version)

    def latest(self) -> Version:
        """The version that readers take; raises SpecError if there is none."""
        name = self.latest_name()
        if name is None:
            raise SpecError(f"{self.url} holds nothing published: there is no {LATEST_FILE}.")
        version = self.read(name)
        if version is None and self.latest_name() != name:  # moved on, and removed by --keep, between the two
            return self.latest()
        if version is None:
            raise JobError(f"{self.url}: {LATEST_FILE} names version {name}, which was removed. Publish again.")
        return version

    def remove_older(self, than: Version, keep: int) -> list[str]:
        """Remove complete versions made before `than`, but for the `keep` - 1 latest of them; gives their names.

        Versions without a manifest stay: a publisher may be writing them.
        """
        older = [version for version in self._complete_versions() if version.created_at < than.created_at]
        older.sort(key=lambda version: version.created_at, reverse=True)
        removed = []
        for version in older[keep - 1 :]:
            if self.latest_name() == version.version:  # another publisher has just gone back to it
                continue
            self.store.delete(self.file(version.version, VERSION_MANIFEST))  # first: then it is no longer complete
            for info in self.store.list(self.file(version.version, "")):
                self.store.delete(info.url)
            removed.append(version.version)
        return removed

    def _complete_versions(self) -> Iterator[Version]:
        """All of them, but for those whose manifests are not of this software."""
        folder = join_url(self.url, VERSIONS) + "/"
        for info in self.store.list(folder):
            name, _, path = info.url.removeprefix(folder).partition("/")
            with suppress(JobError):
                if path == VERSION_MANIFEST and (version := self.read(name)) is not None:
                    yield version


def _read_json(store: Store, url: str) -> dict[str, Any]:
    try:
        content = json.loads(store.read(url))
        if isinstance(content, dict):
            return content
    except ValueError as error:
        raise JobError(f"{url} is not JSON: {error}") from error
    raise JobError(f"{url} is not a JSON object.")
