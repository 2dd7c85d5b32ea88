"""What every store can do, and what a listing shows of an object."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol


@dataclass(frozen=True)
class ObjectInfo:
    """A file or object as a listing shows it."""

    url: str
    version: str
    size: int


class Store(Protocol):
    """Where shards are read from and parts are written to."""

    def list(self, url: str) -> Iterator[ObjectInfo]:
        """All objects under a prefix or folder, matching a glob, or the one object; sorted by URL."""
        ...

    def open(self, url: str, version: str | None = None) -> BinaryIO:
        """A seekable reader; raises ShardChangedError if the object is gone or no longer of this version."""
        ...

    def open_listed(self, info: ObjectInfo) -> BinaryIO:
        """As `open`, of an object as a listing showed it, which spares a request; a change may show as it is read."""
        ...

    def read(self, url: str, version: str | None = None) -> bytes: ...

    def stat(self, url: str) -> ObjectInfo | None:
        """None when there is no such object."""
        ...

    def put_if_absent(self, url: str, data: bytes) -> bool:
        """Write in one step; False, and nothing changed, when the name is taken."""
        ...

    def put_file_if_absent(self, url: str, file: BinaryIO) -> bool:
        """As `put_if_absent`, with all that a seekable file holds: it is read from its beginning, piece by piece."""
        ...

    def put(self, url: str, data: bytes) -> None:
        """Write in one step, over whatever was there."""
        ...

    def replace(self, url: str, data: bytes, version: str) -> bool:
        """Overwrite in one step; False, and nothing changed, when the object is not of this version."""
        ...

    def delete(self, url: str) -> None: ...
