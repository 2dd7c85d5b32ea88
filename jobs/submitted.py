"""What runs on the cluster's head for `r4b submit`: a job as `r4b run` runs it, whose result is a line of its log.

Ray sets RAY_ADDRESS, so that it joins the cluster that it was submitted to. Ray stops it with SIGINT, which is Ctrl-C.
"""

import json
import signal
from dataclasses import asdict
from importlib.metadata import version

import click

from jobs.cli import describe_manifest, run_with_progress
from jobs.shipping import PROJECT, RESULT_MARK
from jobs.spec_file import load_spec
from jobs.terminal import exits_cleanly
from pipeline.errors import SpecError


@click.command()
@click.argument("spec")
@click.option("--expect", required=True, metavar="VERSION")
@click.option("--retry-errors", is_flag=True)
@click.option("--drop-stale", is_flag=True)
@click.option("--force-new", is_flag=True)
@exits_cleanly
def main(spec: str, expect: str, **options: bool) -> None:
    """Run the job in SPEC, and write its result as the last line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a head that was started in the background ignores it
    if version(PROJECT) != expect:
        raise SpecError(f"the cluster has r4b {version(PROJECT)}, not {expect}; leave --installed out to ship it.")
    job = load_spec(spec)
    manifest, _ = run_with_progress(job, **options)
    result = {"manifest": asdict(manifest), "text": describe_manifest(job, manifest)}
    click.echo(f"\n{RESULT_MARK}{json.dumps(result)}")


if __name__ == "__main__":
    main()
