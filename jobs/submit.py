"""`r4b submit`: a job runs on a Ray cluster, through Ray Jobs, and is followed from here.

Where a job writes says which job it is: as long as one writes to an output, the same command follows it instead of
starting a second. Not covered: what is shipped (`shipping.py`), how Ray is spoken to (`ray_jobs.py`).
"""

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from jobs.shipping import Shipment
from jobs.spec_file import apply_override, read_yaml, resolve_paths
from jobs.terminal import exits_cleanly, json_option, say, set_option
from pipeline.engine.models import is_local
from pipeline.errors import JobError, SpecError
from pipeline.spec import JobSpec, parse_spec

if TYPE_CHECKING:
    from jobs.ray_jobs import Cluster, Ended, Running

ADDRESS = "http://127.0.0.1:8265"
FORCE_NEW = "--force-new"


@dataclass(frozen=True)
class Call:
    """One call of the command, as it was made."""

    spec: str
    overrides: tuple[str, ...]
    address: str
    flags: tuple[str, ...] = ()
    """Options of `r4b run` that are passed on."""
    installed: bool = False

    @property
    def lasting(self) -> tuple[str, ...]:
        """The flags that whoever comes back to the job gives again: `--force-new` would start it over once more."""
        return tuple(flag for flag in self.flags if flag != FORCE_NEW)

    def again(self, *extra: str) -> str:
        """The command line that comes back to the same job."""
        sets = [word for override in self.overrides for word in ("--set", override)]
        flags = [*self.lasting, *(["--installed"] if self.installed else []), *extra]
        return shlex.join(["r4b", "submit", self.spec, *sets, "--address", self.address, *flags])


@dataclass(frozen=True)
class Identity:
    """What a job is known by on a cluster."""

    name: str
    output: str
    """Digest of the place that it writes to: one job at a time."""
    spec: str
    """Digest of the spec and of the options of the run."""

    @property
    def prefix(self) -> str:
        """Of its submission ids; a number makes each of them one of its own.

        Without the name: of two who submit at once, under two names, the second must find the first's id taken.
        """
        return f"r4b-{self.output}-"

    @property
    def metadata(self) -> dict[str, str]:
        return {"r4b_name": self.name, "r4b_output": self.output, "r4b_spec": self.spec}


@dataclass
class Checked:
    """A spec that a cluster can run."""

    job: JobSpec
    data: dict[str, Any] = field(repr=False)
    """What the file says, with every `--set`."""


@click.command()
@click.argument("spec")
@set_option
@click.option(
    "--address",
    envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
    default=ADDRESS,
    show_default=True,
    metavar="URL",
    help="The dashboard of the cluster's head. Else RAY_API_SERVER_ADDRESS or RAY_ADDRESS says where it is.",
)
@click.option("--detach", "--no-wait", "detach", is_flag=True, help="Return once it is submitted; print its id.")
@click.option("--stop", is_flag=True, help="Stop the job that writes to this output, and wait until it has ended.")
@click.option("--installed", is_flag=True, help="Ship only the spec: every node has this version of r4b installed.")
@click.option(
    "--patience",
    default=300.0,
    show_default=True,
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long a head that does not answer is waited for, once the job is known.",
)
@click.option("--retry-errors", is_flag=True, help="As for r4b run.")
@click.option("--drop-stale", is_flag=True, help="As for r4b run.")
@click.option("--force-new", is_flag=True, help="As for r4b run.")
@json_option
@exits_cleanly
def submit(
    spec: str,
    overrides: tuple[str, ...],
    address: str,
    detach: bool,
    stop: bool,
    installed: bool,
    patience: float,
    as_json: bool,
    **options: bool,
) -> None:
    """Run the job in SPEC on a Ray cluster, and follow it.

    \b
      r4b submit job.yaml --address http://head:8265            run and follow; the result is printed at the end
      r4b submit job.yaml --address http://head:8265            again: follows the job that runs, starts no second
      r4b submit job.yaml --address http://head:8265 --detach   only submit
      r4b submit job.yaml --address http://head:8265 --stop     stop it; what is committed stays

    The spec is checked here, then shipped with the project's own code. Ray, the engine and all other packages must
    be on the nodes, and so must credentials: none are sent. Input, output and model are s3:// URLs, hub ids, or
    absolute paths on a disk that all nodes share.

    Ctrl-C, or a lost terminal, only ends the following. The job goes on, and the same command follows it again; one
    that has ended is submitted anew, and does what is left (with --force-new it would start over: leave that out).
    One job at a time writes to an output.

    If the cluster asks for a token, set RAY_AUTH_MODE=token; Ray takes it from RAY_AUTH_TOKEN, or from the file
    ~/.ray/auth_token.

    Exit codes: those of r4b run on the cluster (0 done, 1 failed, 2 the spec or the call was wrong), 130 detached.
    """
    flags = tuple(f"--{name.replace('_', '-')}" for name, given in sorted(options.items()) if given)
    call = Call(spec, overrides, address, flags, installed)
    checked = check_spec(spec, overrides)
    identity = identify(checked.job, call.lasting)
    if stop and detach:
        raise SpecError("--stop waits until the job has ended; leave --detach out.")
    with detaching(call):
        cluster = connect(address, patience)
        if stop:
            stop_job(cluster, identity, call)
            return
        found = cluster.find(identity.output)
        if found.running is not None:
            job_id = attach(cluster, found.running, identity, call)
        else:
            job_id = f"{identity.prefix}{found.generations + 1}"
            ship(cluster, job_id, identity, Shipment(checked.data, flags, installed))
        if detach:
            say(f"Follow it: {call.again()}\nStop it:   {call.again('--stop')}")
            click.echo(json.dumps({"submission_id": job_id}) if as_json else job_id)
            return
        show_result(job_id, cluster.follow(job_id), call, as_json)


@contextmanager
def detaching(call: Call) -> Iterator[None]:
    """Ctrl-C leaves the job alone, says how to come back to it, and ends with 130."""
    try:
        yield
    except KeyboardInterrupt:
        say(
            "\nr4b: detached. A job that the cluster has taken goes on there."
            f"\nFollow it: {call.again()}\nStop it:   {call.again('--stop')}"
        )
        sys.exit(130)


def check_spec(path: str, overrides: tuple[str, ...]) -> Checked:
    """Read, override and check a spec; raises SpecError also for paths that only this machine knows."""
    data = read_yaml(path)
    for override in overrides:
        apply_override(data, override)
    job = parse_spec(data, path)
    check_paths(job)
    return Checked(resolve_paths(job), data)


def check_paths(job: JobSpec) -> None:
    """Raise SpecError for a path that means something else on another machine."""
    places = [("input.url", url) for url in job.input.urls] + [("output.url", job.output.url)]
    if job.prompt_shards is not None:
        places.append(("prompts.url", job.prompt_shards.url))
    if job.engine.kind == "vllm" and is_local(job.engine.model):
        places.append(("engine.model", job.engine.model))
    for key, url in places:
        path = url.removeprefix("file://")
        if "://" not in path and not os.path.isabs(path):
            raise SpecError(
                f"{key}: {url} is a path of this machine, and the cluster's nodes would look for it elsewhere. Use "
                "s3:// or an absolute path on a disk that all nodes share"
                + (", or a hub id." if key == "engine.model" else ".")
            )


def identify(job: JobSpec, flags: tuple[str, ...]) -> Identity:
    """By its output, wherever the spec lies and whatever else it says."""
    place = [(job.storage.endpoint_url or "").rstrip("/"), job.output.url.rstrip("/")]
    said = job.model_dump(mode="json", exclude_defaults=True)  # another version of r4b may have other defaults
    return Identity(job.name, _digest(place)[:10], _digest([said, flags])[:32])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def connect(address: str, patience: float) -> "Cluster":
    """The cluster at an address; raises SpecError if none answers there, or it refuses the token."""
    from jobs.ray_jobs import Cluster  # here, for Ray is slow to import

    if "@" in address:
        raise SpecError("--address must not hold a user or a password.")
    if not address.startswith(("http://", "https://")):
        raise SpecError(f"--address: {address} is not the address of a dashboard, such as http://head:8265.")
    return Cluster(address, patience)


def attach(cluster: "Cluster", running: "Running", identity: Identity, call: Call) -> str:
    """The id of the job that writes to this output now; raises SpecError if it is not the same job."""
    if running.metadata.get("r4b_spec") != identity.spec:
        raise SpecError(
            f"{running.job_id} writes to this output already, with another spec or other options. "
            f"Follow it with its own, wait for its end, or stop it: {call.again('--stop')}"
        )
    say(f"{running.job_id} runs already on {cluster.address}; following it.")
    if FORCE_NEW in call.flags:
        say(f"It is not started over for {FORCE_NEW}. To do that, stop it first: {call.again('--stop')}")
    return running.job_id


def ship(cluster: "Cluster", job_id: str, identity: Identity, shipment: Shipment) -> None:
    """Submit the job under this id. If the same command elsewhere was faster, its job has the id, and is the same."""
    try:
        with shipment.packed() as folder:
            taken = cluster.submit(job_id, shipment.entrypoint, folder, identity.metadata)
    except OSError as error:  # of the folder; what the cluster says is a JobError
        raise JobError(f"the project could not be packed on this machine: {error}") from error
    if taken.metadata.get("r4b_spec") != identity.spec:
        raise SpecError(f"{job_id} was submitted a moment ago with another spec or other options.")
    say(f"{job_id} submitted to {cluster.address}.")


def stop_job(cluster: "Cluster", identity: Identity, call: Call) -> None:
    """Stop what writes to the output and wait for its end; says so if nothing does."""
    running = cluster.find(identity.output).running
    if running is None:
        say(f"Nothing to stop: no job that writes to this output runs on {cluster.address}.")
        return
    say(f"Stopping {running.job_id}.")
    status = cluster.stop(running.job_id)
    if status == "STOPPED":
        say(f"Stopped. Committed chunks are kept; this goes on from there: {call.again()}")
    else:
        say(f"It ended before it could be stopped: {status}.")


def show_result(job_id: str, ended: "Ended", call: Call, as_json: bool) -> None:
    """The result on stdout, or the exit code of the run on the cluster, whose message its log has shown."""
    if ended.status == "SUCCEEDED":
        if ended.result is None:
            say(f"{job_id} is done, but its log could not be read to its end; r4b status OUTPUT tells more.")
            return
        click.echo(json.dumps(ended.result["manifest"], indent=2, sort_keys=True) if as_json else ended.result["text"])
        return
    if ended.status == "STOPPED":
        raise JobError(f"{job_id} was stopped. Committed chunks are kept; this goes on from there: {call.again()}")
    if ended.exit_code is None:
        raise JobError(f"{job_id} failed: {' '.join((ended.message or 'Ray does not say why').split())[:1500]}")
    say(f"r4b: {job_id} failed with exit code {ended.exit_code}. This goes on from what is committed: {call.again()}")
    sys.exit(2 if ended.exit_code == 2 else 1)
