"""What all commands share: options, messages on stderr, exit codes, Ctrl-C."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import click

from pipeline.errors import R4BError, SpecError
from pipeline.spec import StorageSpec

set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the spec, such as --set engine.max_num_seqs=128. May be given several times.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
endpoint_option = click.option("--endpoint-url", metavar="URL", help="The S3 endpoint, if it is not AWS.")


def storage_at(endpoint_url: str | None) -> StorageSpec:
    """The store that `--endpoint-url` names."""
    try:
        return StorageSpec(endpoint_url=endpoint_url)
    except ValueError as error:  # without the value: it may hold a password
        raise SpecError("--endpoint-url must not hold a user or a password; boto3 finds those itself.") from error


def say(message: str) -> None:
    """A line for the person at the terminal."""
    click.echo(message, err=True)


def exits_cleanly(command: Callable[..., None]) -> Callable[..., None]:
    """Turn our errors into one message and an exit code, and Ctrl-C into a hint."""

    @wraps(command)
    def run(**kwargs: Any) -> None:
        try:
            command(**kwargs)
        except R4BError as error:
            say(f"r4b: {error}")
            sys.exit(2 if isinstance(error, SpecError) else 1)
        except KeyboardInterrupt:
            without = ", without --force-new," if kwargs.get("force_new") else ""
            say(f"r4b: stopped. Committed chunks are kept; the same command{without} goes on from there.")
            sys.exit(130)

    return run


@contextmanager
def heeded_interrupt() -> Iterator[Callable[[], None]]:
    """Ctrl-C as ever, and a function that raises it again: libraries that call back into Python may lose the first."""
    interrupted = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    def heed() -> None:
        if interrupted:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield heed
    finally:
        signal.signal(signal.SIGINT, before)
