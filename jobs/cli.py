"""The command line `r4b`. Progress and messages on stderr, results on stdout.

Exit codes: 0 done, 1 the job failed, 2 the spec or the call was wrong, 130 stopped by Ctrl-C.
"""

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from jobs.publish import publish_command, published
from jobs.spec_file import load_spec
from jobs.submit import submit
from jobs.terminal import endpoint_option, exits_cleanly, heeded_interrupt, json_option, say, set_option, storage_at
from pipeline.errors import SpecError
from pipeline.plan import Plan, make_plan
from pipeline.records import ChunkReport, Losses, Manifest, Work
from pipeline.spec import JobSpec


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="r4b")
def main() -> None:
    """Run R-4B, a vision-language model that decides by itself when to think, over whole datasets.

    A job is a YAML file (see docs/job-spec.md): where the images are, what to ask, which engine, where the answers
    go. `r4b plan` shows what would run, `r4b run` runs it and resumes it, `r4b status` tells how far it is.
    """


@main.command()
@click.argument("spec")
@set_option
@click.option("--retry-errors", is_flag=True, help="Also run the rows again that hold an error, and replace them.")
@click.option(
    "--drop-stale",
    is_flag=True,
    help="Delete parts whose shards, or their prompts, changed since; their rows are redone.",
)
@click.option("--force-new", is_flag=True, help="Delete all parts at output.url, this job's own too, and start over.")
@json_option
@exits_cleanly
def run(spec: str, overrides: tuple[str, ...], as_json: bool, **options: bool) -> None:
    """Run the job in SPEC, or what an earlier run left of it.

    Only chunks without a part at output.url are done, so the command may be killed and repeated at any time.
    """
    job = load_spec(spec, overrides)
    manifest, _ = run_with_progress(job, **options)
    if as_json:
        click.echo(manifest.to_json(), nl=False)
    else:
        click.echo(describe_manifest(job, manifest))


def run_with_progress(job: JobSpec, **options: bool) -> tuple[Manifest, int]:
    """Run a job with a progress bar on stderr; returns the manifest and the number of rows generated."""
    from pipeline.batch import run_batch

    generated = 0
    with ExitStack() as stack:
        bar: Any = None
        heed_interrupt = stack.enter_context(heeded_interrupt())

        def on_start(plan: Plan, works: list[Work]) -> None:
            nonlocal bar
            for note in plan.notes:
                say(note)
            say(f"{job.name}: {describe_plan(job, plan)}; {describe_work(plan, works)} to do")
            rows_to_do = sum(work.chunk.num_samples for work in works) * len(job.spec_prompts)
            pause = 1 if sys.stderr.isatty() else 15
            total = None if plan.streams or job.prompt_shards or job.input.selects else rows_to_do
            bar = stack.enter_context(tqdm(total=total, unit="row", file=sys.stderr, mininterval=pause))

        def on_commit(report: ChunkReport) -> None:
            nonlocal generated
            heed_interrupt()
            generated += report.num_rows
            bar.update(report.num_rows)

        def on_losses(lost: Losses) -> None:
            if lost.engines or lost.chunks:
                say(
                    f"{lost.engines} engines were lost and replaced, {lost.with_nodes} of them with their nodes; "
                    f"{lost.chunks} chunks were generated again"
                )

        manifest = run_batch(job, on_start=on_start, on_commit=on_commit, on_losses=on_losses, **options)
    return manifest, generated


def describe_plan(job: JobSpec, plan: Plan) -> str:
    """How large the job is, as far as it is known before it is read."""
    text = f"{plan.num_shards} shards, {plan.num_samples} samples"
    if not plan.streams and job.prompt_shards is None:
        text += f", {plan.num_samples * len(job.spec_prompts)} rows"
    text += f" in {len(plan.chunks)} chunks"
    return text + (
        f", and {len(plan.streams)} shards whose samples are counted as they are read" if plan.streams else ""
    )


def describe_work(plan: Plan, works: list[Work]) -> str:
    """What of it is left."""
    return f"{len(works)} chunks" + (f" and {len(plan.streams)} shards" if plan.streams else "")


def describe_manifest(job: JobSpec, manifest: Manifest) -> str:
    """A few lines about a finished job."""
    lines = [
        f"{manifest.num_rows} rows in {manifest.num_chunks} parts: {job.output.url.rstrip('/')}/data/*.parquet",
        f"thinking {manifest.num_thinking}, direct {manifest.num_rows - manifest.num_errors - manifest.num_thinking}, "
        f"errors {manifest.num_errors}; {manifest.prompt_tokens} prompt and {manifest.completion_tokens} output tokens",
    ]
    lines += [f"  {count} x {name}" for name, count in sorted(manifest.errors_by_type.items())]
    if manifest.num_left_out:
        lines.append(
            f"{manifest.num_left_out} of {manifest.num_samples} samples left out by input.where or input.sample"
        )
    if manifest.num_without_prompt:
        lines.append(f"{manifest.num_without_prompt} of {manifest.num_samples} samples have no prompt")
    if manifest.prompts_without_sample or manifest.prompts_unreadable:
        lines.append(
            f"{manifest.prompts_without_sample or 0} prompts have no sample, "
            f"{manifest.prompts_unreadable or 0} lines of prompt shards name none"
        )
        lines += [f"  {example}" for example in manifest.examples_without_sample]
    lines += [f"damaged: {shard}" for shard in manifest.damaged_shards]
    if manifest.stale_parts:
        lines.append(f"{len(manifest.stale_parts)} parts are stale: their shards are no longer in the input.")
    return "\n".join(lines)


@main.command()
@click.argument("spec")
@set_option
@json_option
@exits_cleanly
def plan(spec: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what `r4b run SPEC` would do. Starts no model.

    Reads listings, footers, indexes of tars and the input's first samples; with input.limit, tars and JSONL as far as
    the limit reaches. Shards "not counted" are tars and JSONL that no run has read to their end yet. Parts are
    "unplanned" if they belong to such a shard, or to one that changed or is gone.
    """

    job = load_spec(spec, overrides)
    planned = make_plan(job)
    committed = committed_if_any(job)
    left = planned.without(committed)
    prompts = len(job.spec_prompts)
    facts = {
        "name": job.name,
        "format": planned.format,
        "shards": planned.num_shards,
        "shards_not_counted": len(planned.streams),
        "samples": planned.num_samples,
        "rows": planned.num_samples * prompts if prompts else None,
        "chunks": len(planned.chunks),
        "chunks_committed": len(planned.chunks) - len(left.chunks),
        "rows_to_do": left.num_samples * prompts if prompts else None,
        "unplanned_parts": len(planned.unplanned(committed)),
    }
    for note in planned.notes:
        say(note)
    show_facts(facts, as_json)


def committed_if_any(job: JobSpec) -> frozenset[str]:
    """Chunks that the output holds already; none if there is no output yet."""
    from pipeline.commits import Output, committed_chunks

    return committed_chunks(Output(job, {}))


@main.command()
@click.argument("output")
@endpoint_option
@json_option
@exits_cleanly
def status(output: str, endpoint_url: str | None, as_json: bool) -> None:
    """Tell how far the job at OUTPUT is: chunks done and left, rows, modes, errors."""
    from pipeline.commits import Output, committed_chunks, is_finished, read_job_file, read_reports
    from pipeline.spec import parse_spec
    from pipeline.storage import absolute_url

    found = read_job_file(absolute_url(output), storage_at(endpoint_url))
    job = parse_spec(found["spec"], f"{output}/_job.json")
    # The output may have been moved or copied since; OUTPUT is where it is now.
    changes: dict[str, Any] = {"output": job.output.model_copy(update={"url": absolute_url(output)})}
    if endpoint_url is not None:
        changes["storage"] = job.storage.model_copy(update={"endpoint_url": endpoint_url})
    job = job.model_copy(update=changes)
    place = Output(job, found["made_with"])
    committed = committed_chunks(place)
    totals = Manifest(job.name, found["fingerprint"], job.engine.model, len(committed))
    for report in read_reports(place, sorted(committed)):
        totals.add(report)
    facts: dict[str, Any] = {"name": job.name, "model": job.engine.model, "finished": is_finished(place)}
    try:
        planned = make_plan(job)
        facts |= {"chunks": len(planned.chunks), "chunks_left": len(planned.without(committed).chunks)}
        facts |= {"shards_not_counted": len(planned.streams), "unplanned_parts": len(planned.unplanned(committed))}
    except SpecError as error:
        facts |= {"chunks": None, "chunks_left": None, "input": str(error)}
    facts |= {"chunks_committed": len(committed), "rows": totals.num_rows, "errors": totals.num_errors}
    facts |= {"thinking": totals.num_thinking, "prompt_tokens": totals.prompt_tokens}
    show_facts({**facts, "completion_tokens": totals.completion_tokens}, as_json)


def show_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Names and values, one a line, or as JSON."""
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        width = max(len(name) for name in facts)
        click.echo("\n".join(f"{name.replace('_', ' '):<{width}}  {value}" for name, value in facts.items()))


@main.command()
@click.argument("output")
@endpoint_option
@click.option("--truth", metavar="COLUMN", help="A kept column of true answers to compare with.")
@click.option("--by", metavar="COLUMN", help="A kept column to group that comparison by.")
@json_option
@exits_cleanly
def report(output: str, endpoint_url: str | None, truth: str | None, by: str | None, as_json: bool) -> None:
    """Sum up the parts at OUTPUT: rows, tokens and thoughts by mode, errors by type."""
    from jobs.demo import report_lines
    from pipeline.report import make_report

    made = make_report(output, storage_at(endpoint_url), truth, by)
    if as_json:
        click.echo(json.dumps(asdict(made), indent=2))
        return
    click.echo("\n".join(report_lines(made, with_truth=truth is not None)))
    for name, count in sorted(made.errors_by_type.items()):
        click.echo(f"{count} x {name}")


@main.command()
@click.option("--rows", default=300, show_default=True, type=click.IntRange(1, 100_000), help="Scenes to draw.")
@click.option(
    "--output", default="./demo-output", show_default=True, metavar="DIR", help="Folder for shards and parts."
)
@exits_cleanly
def demo(rows: int, output: str) -> None:
    """Draw scenes, annotate them with the small checkpoint on this machine's CPU, and show the result.

    DIR gets the shards under input/, the job's spec as job.yaml and its parts under output/. Running it again with
    the same DIR and --rows does only what is missing.
    """
    from jobs.demo import prepare_demo, show_demo

    job = prepare_demo(Path(output).resolve(), rows)
    say("Starting the engine; this takes about half a minute on a CPU.")
    start = time.monotonic()
    _, generated = run_with_progress(job)
    show_demo(job, time.monotonic() - start, generated, click.echo)


@main.command()
@click.argument("settings", required=False)
@set_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all of them.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--no-auth", is_flag=True, help="Ask for no API key. On loopback only.")
@exits_cleanly
def serve(settings: str | None, overrides: tuple[str, ...], host: str, port: int, no_auth: bool) -> None:
    """Serve the model on this machine through the OpenAI API, until Ctrl-C.

    SETTINGS is a YAML file (see docs/serving.md); without it, the published model on one GPU, which needs
    --set engine.args.trust_remote_code=true. API keys are read from the file that auth.keys_file names, and from the
    environment variable R4B_API_KEYS, comma-separated.
    """
    from jobs.serve import asks_for_keys, check_listening, load_settings, serve_here

    data = load_settings(settings, overrides, auth=not no_auth)
    check_listening(host, port, asks_for_keys(data))
    say("Starting the engine; this takes from half a minute to some minutes.")
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    serve_here(data, host, port, lambda: say(f"Serving at {address}/v1, playground at {address}/. Ctrl-C stops."))


main.add_command(submit)
main.add_command(publish_command)
main.add_command(published)
