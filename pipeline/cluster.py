"""Ray itself: joining a cluster or starting one here, and finding our own errors inside Ray's.

Not covered: Ray Data, which is `batch.py`'s.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import ray

from pipeline.errors import JobError, R4BError, SpecError
from pipeline.spec import JobSpec


def start_ray(job: JobSpec) -> None:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine; raises SpecError if neither can serve.

    A job of a deployment (`engine.pool: serve`) starts nothing: it joins the Ray that runs here already.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets anything else on the machine starve an engine
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's C++ core writes to our terminal
    options: dict[str, Any]
    if os.environ.get("RAY_ADDRESS"):
        options, failure = {}, "RAY_ADDRESS: no Ray cluster can be joined there"
    elif job.engine.pool == "serve":
        options, failure = {"address": "auto"}, NO_CLUSTER
    else:
        options, failure = {"address": "local", "include_dashboard": False}, "Ray cannot be started here"
    try:
        with silent_stderr():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises plain ones too, where a node is too slow to start
        raise SpecError(f"{failure}: {' '.join(str(error).split())[:300]}") from error
    if options.get("address") == "local":
        check_gpus(job)


NO_CLUSTER = (
    "engine.pool: serve needs a running deployment, and no Ray runs on this machine that could be joined. Start one "
    "with r4b serve, or set RAY_ADDRESS to the cluster where it runs"
)


def check_gpus(job: JobSpec) -> None:
    """Raise SpecError if this machine, which never grows, has too few GPUs for the engines that must run."""
    have = ray.cluster_resources().get("GPU", 0)
    need = job.engine.gpus_per_actor * job.engine.replicas.min
    if need > have:
        raise SpecError(
            f"engine.num_gpus: the job needs {need:g} GPUs to start, this machine has {have:g}. "
            "Set engine.num_gpus: 0 for a CPU, or RAY_ADDRESS to join a cluster."
        )


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Send the file descriptor itself to nowhere: Ray's C++ core greets every start there; errors are raised anyway."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def find_cause(error: BaseException) -> BaseException:
    """Our own error inside Ray's wrappers, or a JobError that says in a line what Ray said."""
    seen: BaseException | None = error
    while seen is not None:
        # Ray's RayTaskError(JobError) is a JobError too, whose message is a traceback; it holds the plain one.
        if isinstance(seen, R4BError) and not isinstance(seen, ray.exceptions.RayTaskError):
            seen.args = (str(seen).partition(DATA_ADVICE)[0],)
            return seen
        seen = getattr(seen, "cause", None) or seen.__cause__ or seen.__context__
    told = " ".join(str(error).split())
    return JobError(f"Ray: {told}" if len(told) <= MAX_TOLD else f"Ray: {told[:300]} ... {told[-MAX_TOLD:]}")


MAX_TOLD = 1000
"""Characters of the end, where Ray's tracebacks say what happened."""
DATA_ADVICE = "\nFailed to apply UDF transform"
"""Ray Data adds three lines about its own retries to the message of an error that it passes on."""
