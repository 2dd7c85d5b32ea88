"""schemathesis over the OpenAPI document that a running server serves; counts answers by status.

A finding is a status of 500 or more, other than 503 with Retry-After, and a request without an answer in 30 s.
Exit code 1 says that there was one, or that there were fewer cases than asked for.
Not covered: whether answers are right, and the hostile requests that one would write by hand.
"""

import argparse
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import requests
import schemathesis
from schemathesis.core.result import Ok

TIMEOUT_S = 30.0


@dataclass
class Found:
    """What became of the cases."""

    statuses: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def take(self, name: str, response: Any) -> None:
        """Count an answer."""
        status = int(response.status_code)
        self.statuses[str(status)] += 1
        is_overload = status == 503 and "retry-after" in response.headers
        if status >= 500 and not is_overload:
            self.findings.append(f"{name}: {status}")


def fuzz(url: str, key: str, num_cases: int) -> Found:
    """At least so many cases. Operations without a body have few; what they leave goes to those that have one."""
    headers = {"Authorization": f"Bearer {key}"}
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    operations.sort(key=lambda operation: len(operation.body))
    found = Found()
    for number, operation in enumerate(operations):
        share = (num_cases - found.statuses.total()) // (len(operations) - number) + 1

        @hypothesis.settings(
            max_examples=share,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def run(case: Any) -> None:
            try:
                found.take(f"{case.method} {case.path}", case.call(headers=headers, timeout=TIMEOUT_S))
            except requests.Timeout:
                found.statuses["no answer"] += 1
                found.findings.append(f"{case.method} {case.path}: no answer in {TIMEOUT_S:g} s")

        run()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server, without /v1; the key is read from R4B_API_KEY")
    parser.add_argument("--cases", type=int, default=2000)
    options = parser.parse_args()
    start = time.monotonic()
    found = fuzz(options.url, os.environ["R4B_API_KEY"], options.cases)
    total = sum(found.statuses.values())
    print(f"{total} cases in {time.monotonic() - start:.0f} s: {dict(sorted(found.statuses.items()))}")
    for finding, count in Counter(found.findings).most_common():
        print(f"  {count} x {finding}")
    sys.exit(1 if found.findings or total < options.cases else 0)


if __name__ == "__main__":
    main()
