"""A process that does work: what names it, the signs of life that it gives the watch, and how it is killed."""

import contextlib
import os
import threading
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import JobError
from pipeline.spec import LimitsSpec

BEATS_IN_A_TIMEOUT = 10
ASK_S = 60.0
"""For an answer of the watch; without one the work goes on."""
MAX_READ_DEATHS = 10
"""Of processes over one pass, each on a node that lives: Ray would try it for ever."""
SAME_START_S = 60.0
"""Between what a clock that was set anew makes of one start; a process's number is not given again so soon."""


@dataclass(frozen=True)
class Life:
    """A process that does work. An actor has another life each time it is restarted; its `owner`, the actor, stays."""

    owner: str
    node_id: str
    pid: int
    started: float

    @classmethod
    def here(cls) -> "Life":
        """This process's."""
        context = ray.get_runtime_context()
        owner = context.get_actor_id() or context.get_worker_id()
        return cls(owner, context.get_node_id(), os.getpid(), psutil.Process().create_time())


def find_draining() -> frozenset[str]:
    """Nodes that will go soon: their machines had notice, or somebody drains them. Blocks."""
    return frozenset(ray._private.state.state.get_draining_nodes())


def is_node_alive(node_id: str) -> bool:
    """As the cluster knows it now. Blocks."""
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def kill_there(life: Life) -> Awaitable[bool]:
    """SIGKILL a process and its children on whichever node it runs, from that node; tells whether it was there."""
    there = NodeAffinitySchedulingStrategy(life.node_id, soft=False)
    killed: Awaitable[bool] = _kill_remotely.options(scheduling_strategy=there).remote(life.pid, life.started)
    return killed


def kill_process(pid: int, started: float) -> bool:
    """SIGKILL a process of this machine and its children, unless it is gone or another has its number now."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if abs(process.create_time() - started) < SAME_START_S:
            kill_children(process)
            process.kill()
            return True
    return False


_kill_remotely: Any = ray.remote(num_cpus=0, max_retries=0)(kill_process)


def kill_children(process: psutil.Process) -> None:
    """SIGKILL everything that a process has started: an engine that hangs does not see its parent go."""
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


class Beats:
    """A thread that lets the watch know, until `stop`, that this process lives."""

    def __init__(self, watch: Any, life: Life, limits: LimitsSpec) -> None:
        self._over = threading.Event()

        def beat() -> None:
            while not self._over.is_set():
                watch.beat.remote(life)
                self._over.wait(limits.stall_timeout_s / BEATS_IN_A_TIMEOUT)

        self._thread = threading.Thread(target=beat, name="beats", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """None comes after this."""
        self._over.set()
        self._thread.join()


_beats: dict[Any, Beats] = {}
"""This process's, by their watch, if it runs tasks."""


@contextlib.contextmanager
def counted(watch: Any, name: str) -> Iterator[None]:
    """A pass that the watch knows of, if there is one; raises JobError if it has ended too many processes."""
    life, deaths = Life.here(), 0
    with contextlib.suppress(RayError):
        deaths = ray.get(watch.read.remote(life, name), timeout=ASK_S)
    if deaths >= MAX_READ_DEATHS:
        raise JobError(
            f"{name}: {deaths} processes that read it have ended before it was read. If they ran out of memory, lower "
            "output.chunk_rows or limits.max_image_pixels, or give each processor of the cluster more memory."
        )
    try:
        yield
    finally:
        watch.has_read.remote(life, name)


def attend(watch: Any, limits: LimitsSpec) -> None:
    """Let the watch know of this process as long as it lives: Ray gives it one task after another."""
    if watch in _beats:
        return
    while _beats:  # of an earlier run of the same driver
        _beats.popitem()[1].stop()
    _beats[watch] = Beats(watch, Life.here(), limits)
