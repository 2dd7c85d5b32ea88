"""The faults that `benchmarks.chaos` lets strike: each a method, whose name says what it does.

Each gives what it struck, or nothing if there was nothing to strike: then its time has not come yet.
"""

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from benchmarks.cluster_scene import ACTOR, ENGINE, READER, WRITER, find_workers
from benchmarks.raylets import Node, Raylets, kill_family
from tests.store_proxy import KINDS, StoreProxy

IMPORTS_S = 4.0
"""Of processor time: a worker that is stopped while it imports its modules is not missed, see docs/DESIGN.md."""
TROUBLE_SHARE = 0.2
TROUBLE_S = (5.0, 20.0)
PAUSES_S = ((2.0, 5.0), (30.0, 45.0))
"""Of a node: Ray takes no notice of short ones; after the long ones it holds the node for dead."""
DRIVER_PAUSE_S = (3.0, 15.0)
WRITERS_WAIT_S = 5.0


@dataclass
class Faults:
    """What may strike one run."""

    cluster: Raylets
    store: StoreProxy
    wakes_after_s: float
    """A process that was stopped goes on after this time, if it has not been replaced by then, or even so."""
    driver: "subprocess.Popen[bytes] | None" = None
    was_killed: bool = False
    """Whether the present driver was."""
    rng: random.Random = field(default_factory=random.Random)
    """Chooses the process or node and for how long; each strike has its own."""
    _later: list[threading.Timer] = field(default_factory=list)
    _well_again: threading.Timer | None = None

    def strike(self, fault: str, seed: str) -> str:
        """Let one happen; says what it struck, or nothing."""
        self.rng = random.Random(seed)
        struck = getattr(self, fault)()
        told = f"{fault}({struck})" if struck else ""
        if told:
            print(told, file=sys.stderr, flush=True)
        return told

    def end(self) -> None:
        """Nothing strikes any more, and what is stopped or cut off goes on."""
        for timer in self._later:
            timer.cancel()
            timer.join()
            timer.function(*timer.args, **timer.kwargs)
        self._later.clear()
        self._mend_store()

    def kill_driver(self) -> str:
        assert self.driver is not None
        kill_family(self.driver)
        self.was_killed = True
        return str(self.driver.pid)

    def pause_driver(self) -> str:
        assert self.driver is not None
        return self._stop(psutil.Process(self.driver.pid), self.rng.uniform(*DRIVER_PAUSE_S))

    def kill_actor(self) -> str:
        return self._kill(ACTOR)

    def kill_engine(self) -> str:
        return self._kill(ENGINE)

    def kill_reader(self) -> str:
        return self._kill(READER)

    def kill_writer(self) -> str:
        """In the middle of a write, which the proxy holds up meanwhile."""
        self.store.release.clear()
        try:
            return self._kill(WRITER, wait_s=WRITERS_WAIT_S)
        finally:
            self.store.release.set()

    def stop_actor(self) -> str:
        return self._stop(self._find(ACTOR), self.wakes_after_s)

    def stop_engine(self) -> str:
        return self._stop(self._find(ENGINE), self.wakes_after_s)

    def stop_reader(self) -> str:
        return self._stop(self._find(READER, IMPORTS_S), self.wakes_after_s)

    def preempt_actor(self) -> str:
        return self._signal(self._find(ACTOR), signal.SIGTERM)

    def kill_raylet(self) -> str:
        return self._signal(self._find_raylet(), signal.SIGKILL)

    def pause_raylet(self) -> str:
        return self._stop(self._find_raylet(), self.rng.uniform(*self.rng.choice(PAUSES_S)))

    def lose_node(self) -> str:
        """For good; another comes."""
        node = self._choose_node()
        self.cluster.remove(node)
        self.cluster.add_node()
        return node.address

    def add_node(self) -> str:
        return self.cluster.add_node().address

    def cut_network(self) -> str:
        node, seconds = self._choose_node(), self.rng.uniform(*self.rng.choice(PAUSES_S))
        node.cut()
        self._do_later(seconds, node.mend)
        return f"{node.address} for {seconds:.0f} s"

    def trouble_store(self) -> str:
        """For a while it breaks one request in five, in every way."""
        return self._break_store(TROUBLE_SHARE, KINDS)

    def throttle_store(self) -> str:
        """For a while it refuses everything."""
        return self._break_store(1.0, ("503",))

    def _break_store(self, share: float, kinds: tuple[str, ...]) -> str:
        seconds = self.rng.uniform(*TROUBLE_S)
        if self._well_again is not None:
            self._well_again.cancel()
        self.store.kinds, self.store.rate = kinds, share
        self._well_again = threading.Timer(seconds, self._mend_store)
        self._well_again.start()
        return f"{seconds:.0f} s"

    def _mend_store(self) -> None:
        self.store.rate = 0.0

    def _choose_node(self) -> Node:
        return self.rng.choice(self.cluster.nodes)

    def _find(self, title: str, at_least_s: float = 0.0) -> psutil.Process | None:
        found = sorted((process.pid, process) for _, process in find_workers(self.cluster, title, at_least_s))
        return self.rng.choice(found)[1] if found else None

    def _find_raylet(self) -> psutil.Process | None:
        for process in self._choose_node().processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "raylet":
                    return process
        return None

    def _kill(self, title: str, wait_s: float = 0.0) -> str:
        deadline = time.monotonic() + wait_s
        while (process := self._find(title)) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._signal(process, signal.SIGKILL)

    def _stop(self, process: psutil.Process | None, seconds: float) -> str:
        """SIGSTOP, and SIGCONT later."""
        told = self._signal(process, signal.SIGSTOP)
        if process is not None and told:
            self._do_later(seconds, self._signal, process, signal.SIGCONT)
            told += f" for {seconds:.0f} s"
        return told

    def _signal(self, process: psutil.Process | None, number: int) -> str:
        if process is None:
            return ""
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            return str(process.pid)
        return ""

    def _do_later(self, seconds: float, function: Callable[..., object], *args: object) -> None:
        def do() -> None:
            with contextlib.suppress(subprocess.CalledProcessError):  # the node is gone
                function(*args)

        self._later.append(threading.Timer(seconds, do))
        self._later[-1].start()


def find_faults(engine: str) -> list[str]:
    """Names of those that can strike a job of this engine: a simulated one has no process of its own."""
    left_out = {"strike", "end"} | ({"kill_engine", "stop_engine"} if engine == "simulated" else set())
    names = (name for name, value in vars(Faults).items() if callable(value) and not name.startswith("_"))
    return [name for name in names if name not in left_out]
