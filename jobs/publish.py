"""`r4b publish` and `r4b published`: from a job's parts to files that are handed on, and what was handed on last."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import click
from tqdm import tqdm

from jobs.terminal import endpoint_option, exits_cleanly, heeded_interrupt, json_option, say, storage_at
from pipeline.errors import SpecError
from pipeline.publish import Published, PublishOptions, Target, Version, publish

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
STEPS = {"part": "reading footers", "row": "writing files"}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?|)b?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """`256MB`, `1GiB` or a number as bytes; raises SpecError."""
    match = SIZE.fullmatch(text)
    size = int(float(match[1]) * UNITS[match[2].lower()]) if match else 0
    if size < 1:
        raise SpecError(f"--target-size: {text!r} is not a size; write it as 256MB, 1GiB or a number of bytes.")
    return size


@click.command(name="publish")
@click.argument("output")
@click.option("--to", "target", required=True, metavar="TARGET", help="Folder or prefix to publish to.")
@click.option(
    "--target-size", default="256MB", show_default=True, metavar="SIZE", help="Of a file, about: 500KB, 1GiB, bytes."
)
@click.option("--partition-by", metavar="COLUMN", help="A folder COLUMN=value/ for each value of an output column.")
@click.option("--max-partitions", default=1000, show_default=True, type=click.IntRange(1), help="Refuse more values.")
@click.option("--unfinished", is_flag=True, help="Publish what is there of a job that is not finished.")
@click.option("--with-stale", is_flag=True, help="Also parts whose shards are no longer in the input.")
@click.option("--keep", type=click.IntRange(1), metavar="N", help="Then remove all but it and the N - 1 before it.")
@endpoint_option
@json_option
@exits_cleanly
def publish_command(
    output: str,
    target: str,
    target_size: str,
    endpoint_url: str | None,
    keep: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Merge the many parts of the job at OUTPUT into few files at TARGET.

    \b
      r4b publish ./out --to ./published
      r4b publish s3://b/out --to s3://b/published --target-size 1GB
      r4b publish ./out --to ./published --partition-by mode_chosen --keep 3
      r4b published ./published            # the files to read, one a line

    Each publish makes a version, TARGET/versions/<version>/, named by its content: the same parts and options give the
    same version. When it is complete, one small file, TARGET/_latest.json, is put to point to it. Readers take the
    files that the version's _manifest.json names (`r4b published` prints them), and so see all of a version or nothing.

    The command may be killed and repeated at any time: files that are there are not written again. Rows keep the order
    of the input. Versions stay until --keep removes them; a reader that is still at a removed version fails.

    OUTPUT must be finished (_SUCCESS), unless --unfinished. It is not changed. See docs/publishing.md.
    """
    chosen = PublishOptions(target_size=parse_size(target_size), **options)
    try:
        done = publish_with_progress(output, target, endpoint_url, chosen)
        place = Target(target, storage_at(endpoint_url))
        removed = place.remove_older(done.version, keep) if keep else []
    except KeyboardInterrupt:
        say("r4b: stopped. Files that are complete are kept; the same command goes on from there.")
        sys.exit(130)
    show_published(place, done, removed, as_json)


def publish_with_progress(output: str, target: str, endpoint_url: str | None, options: PublishOptions) -> Published:
    """Publish with progress bars on stderr."""
    bar: Any = None
    pause = 1 if sys.stderr.isatty() else 15
    with heeded_interrupt() as heed_interrupt:

        def on_start(unit: str, total: int) -> Callable[[int], None]:
            nonlocal bar
            if bar is not None:
                bar.close()
            bar = tqdm(total=total, unit=unit, desc=STEPS[unit], file=sys.stderr, mininterval=pause)
            return on_some

        def on_some(count: int) -> None:
            heed_interrupt()
            bar.update(count)

        try:
            return publish(output, target, storage_at(endpoint_url), options, on_start)
        finally:
            if bar is not None:
                bar.close()


def show_published(target: Target, done: Published, removed: list[str], as_json: bool) -> None:
    """The result: a line or two, or JSON."""
    version = done.version
    if as_json:
        facts = asdict(replace(version, files=()))
        del facts["files"]
        facts |= {"target": target.url, "manifest": target.file(version.version, "_manifest.json")}
        facts |= {"num_files": len(version.files), "files_written": done.files_written}
        click.echo(json.dumps({**facts, "moved": done.moved, "removed": removed}, indent=2, ensure_ascii=False))
        return
    click.echo(
        f"{version.num_rows} rows in {len(version.files)} files, {version.num_bytes} bytes: "
        f"{target.file(version.version, '')} ({done.files_written} written now)"
    )
    click.echo("Readers have it now." if done.moved else "Readers had it already.")
    for name in removed:
        click.echo(f"removed version {name}")


@click.command()
@click.argument("target")
@endpoint_option
@json_option
@exits_cleanly
def published(target: str, endpoint_url: str | None, as_json: bool) -> None:
    """Print the files of the latest version at TARGET, one a line.

    With --json, the version's manifest with the URL of each file. To read them all, for instance:

    \b
      r4b published ./published | xargs -d '\\n' ls -l
    """
    place = Target(target, storage_at(endpoint_url))
    version = place.latest()
    if as_json:
        click.echo(json.dumps(describe_version(place, version), indent=2, ensure_ascii=False))
        return
    for file in version.files:
        click.echo(place.file(version.version, file.path))


def describe_version(target: Target, version: Version) -> dict[str, Any]:
    """A version's manifest, with the URL of each file."""
    facts = asdict(version)
    for file in facts["files"]:
        file["url"] = target.file(version.version, file["path"])
    return facts
