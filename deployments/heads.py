"""What the head of a request says, in the one reading that the gate and the app share.

Where a head can be read in two ways it is read as none: two request ids are no id, a path with `..` is not plain.
Not covered: whether it is let in (`deployments.gate`).
"""

import re
import sys
import uuid
from functools import cached_property

from starlette.types import Scope

Headers = list[tuple[bytes, bytes]]
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
NOT_PLAIN = re.compile(r"//|/\.\.?(/|$)|[\\\x00-\x1f\x7f]")


class Head:
    """The method, path and headers of an ASGI scope."""

    def __init__(self, scope: Scope) -> None:
        self.method = str(scope["method"])
        self.path = _find_path(scope)
        self.headers: Headers = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        target = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        self.num_bytes = target + sum(len(name) + len(value) for name, value in self.headers)

    def values(self, name: bytes) -> list[bytes]:
        """Of all headers of this name, which is in lower case."""
        return [value for other, value in self.headers if other.lower() == name]

    def choose_request_id(self) -> str:
        """The client's, if it is one and fit for logs and headers."""
        given = [value.decode("latin-1") for value in self.values(b"x-request-id")]
        return given[0] if len(given) == 1 and REQUEST_ID.fullmatch(given[0]) else uuid.uuid4().hex

    @property
    def host(self) -> str:
        """In lower case, without a port; empty if there is none or more than one."""
        values = self.values(b"host")
        return re.sub(r":\d*$", "", values[0].decode("latin-1").lower()) if len(values) == 1 else ""

    @property
    def media_type(self) -> bytes:
        """Of the body, without parameters; empty if there is none or more than one."""
        values = self.values(b"content-type")
        return values[0].partition(b";")[0].strip().lower() if len(values) == 1 else b""

    @cached_property
    def body_bytes(self) -> int:
        """As Content-Length has it, the largest if there are several; 0 if there is none."""
        lengths = [value for value in self.values(b"content-length") if re.fullmatch(rb"[0-9]+", value)]
        return max((int(value) if len(value) < 19 else sys.maxsize for value in lengths), default=0)

    @property
    def is_chunked(self) -> bool:
        """Whether nobody knows how long the body will be."""
        return bool(self.values(b"transfer-encoding"))

    @property
    def is_path_plain(self) -> bool:
        """No path that two readers may take for two."""
        return not NOT_PLAIN.search(self.path)


def is_below(path: str, roots: frozenset[str]) -> bool:
    """Whether a path is one of these or below one; below "/" is nothing."""
    return path in roots or any(root != "/" and path.startswith(root + "/") for root in roots)


def _find_path(scope: Scope) -> str:
    """As the app's router sees it: without the prefix under which the app is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root + "/") else path
