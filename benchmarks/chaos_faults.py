"""The faults that `benchmarks.chaos` lets strike: each a method, whose name says what it does."""

import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

from benchmarks.cluster_scene import ACTOR, ENGINE, READER, WRITER, find_workers
from benchmarks.raylets import Raylets, kill_family
from tests.store_proxy import KINDS, StoreProxy

IMPORTS_S = 4.0
"""Of processor time: a worker that is stopped while it imports its modules is not missed, see docs/DESIGN.md."""
TROUBLE_SHARE = 0.2
TROUBLE_S = (5.0, 20.0)


@dataclass
class Faults:
    """What may strike one run. `rng` chooses the process or node."""

    cluster: Raylets
    store: StoreProxy
    rng: random.Random
    driver: "subprocess.Popen[bytes] | None" = None
    _mending: list[threading.Timer] = field(default_factory=list)

    def strike(self, fault: str) -> str:
        """Let one happen; says what it struck."""
        told = f"{fault}({getattr(self, fault)() or ''})"
        print(told, file=sys.stderr, flush=True)
        return told

    def end(self) -> None:
        """Nothing strikes any more, and the store is well."""
        for timer in self._mending:
            timer.cancel()
        self._mend_store()

    def kill_driver(self) -> None:
        assert self.driver is not None
        kill_family(self.driver)

    def kill_actor(self) -> str:
        return self._signal(ACTOR, signal.SIGKILL)

    def kill_engine(self) -> str:
        return self._signal(ENGINE, signal.SIGKILL) or self._signal(ACTOR, signal.SIGKILL)

    def kill_reader(self) -> str:
        return self._signal(READER, signal.SIGKILL)

    def kill_writer(self) -> str:
        return self._signal(WRITER, signal.SIGKILL)

    def stop_actor(self) -> str:
        return self._signal(ACTOR, signal.SIGSTOP)

    def stop_engine(self) -> str:
        return self._signal(ENGINE, signal.SIGSTOP) or self._signal(ACTOR, signal.SIGSTOP)

    def stop_reader(self) -> str:
        return self._signal(READER, signal.SIGSTOP, IMPORTS_S)

    def preempt_actor(self) -> str:
        return self._signal(ACTOR, signal.SIGTERM)

    def kill_raylet(self) -> str:
        node = self.rng.choice(self.cluster.nodes)
        for process in node.processes():
            if process.name() == "raylet":
                process.kill()
        time.sleep(2)
        self.cluster.remove(node)
        self.cluster.add_node()
        return node.address

    def lose_node(self) -> str:
        node = self.rng.choice(self.cluster.nodes)
        self.cluster.remove(node)
        self.cluster.add_node()
        return node.address

    def add_node(self) -> str:
        return self.cluster.add_node().address

    def cut_network(self) -> str:
        node = self.rng.choice(self.cluster.nodes)
        node.cut()
        time.sleep(self.rng.uniform(1, 4))
        node.mend()
        return node.address

    def trouble_store(self) -> str:
        """For a while it breaks one request in five, in every way."""
        return self._break_store(TROUBLE_SHARE, KINDS)

    def throttle_store(self) -> str:
        """For a while it refuses everything."""
        return self._break_store(1.0, ("503",))

    def _break_store(self, share: float, kinds: tuple[str, ...]) -> str:
        seconds = self.rng.uniform(*TROUBLE_S)
        self.store.kinds, self.store.rate = kinds, share
        self._mending.append(threading.Timer(seconds, self._mend_store))
        self._mending[-1].start()
        return f"{seconds:.0f} s"

    def _mend_store(self) -> None:
        self.store.rate = 0.0

    def _signal(self, title: str, number: int, at_least_s: float = 0.0) -> str:
        found = sorted((process.pid, process) for _, process in find_workers(self.cluster, title, at_least_s))
        if not found:
            return ""
        _, process = self.rng.choice(found)
        process.send_signal(number)
        return str(process.pid)


FAULTS = [
    name
    for name, value in vars(Faults).items()
    if callable(value) and not name.startswith("_") and name not in ("strike", "end")
]
