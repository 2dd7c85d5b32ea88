"""The access log: one line of JSON for each request, to the logger `r4b.access`.

The invariant: a line holds no key, query, prompt, image or answer, and a client cannot break it into two.
Not covered: where the lines go, which is the logger's configuration.
"""

import json
import logging
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

MAX_SHOWN = 200
"""Characters of what a client chose freely."""

logger = logging.getLogger("r4b.access")


@dataclass
class Access:
    """One request, filled in while it goes on. `status` stays None where the client left before an answer began."""

    request_id: str
    method: str
    path: str
    key_id: str | None = None
    status: int | None = None
    bytes_in: int = 0
    """Of the body, as far as it was read."""
    bytes_out: int = 0
    first_byte_s: float | None = None
    """Until the first byte of the answer's body: the first token, if the answer is a stream."""
    client_disconnected: bool = False
    started: float = field(default_factory=time.monotonic)

    def count_out(self, size: int) -> None:
        """Some more bytes of the answer's body go out."""
        if size and self.first_byte_s is None:
            self.first_byte_s = time.monotonic() - self.started
        self.bytes_out += size

    def write(self) -> None:
        """Log the line; called once, at the end."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "key_id": self.key_id,
            "method": self.method[:MAX_SHOWN],
            "path": self.path[:MAX_SHOWN],
            "status": self.status,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "duration_s": round(time.monotonic() - self.started, 4),
            "first_byte_s": None if self.first_byte_s is None else round(self.first_byte_s, 4),
            "client_disconnected": self.client_disconnected,
        }
        logger.info(json.dumps(line))
