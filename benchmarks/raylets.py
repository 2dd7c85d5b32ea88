"""A Ray cluster of several nodes on one host: each node has its own network namespace, so that it can be cut off.

Everything is inside one more namespace, which `inside_own_network` enters by running the program anew: nothing listens
outside. Needs root, `ip`, `unshare` and `nsenter`. Real GCS, raylets and workers; what is missing is other machines.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

INSIDE = "R4B_INSIDE_OWN_NETWORK"
HEAD = "10.77.0.1"
PORT = 6379
BRIDGE = "r4b0"
RAY = str(Path(sys.executable).with_name("ray"))
OBJECT_STORE = 200_000_000
PATIENCE = {"RAY_health_check_period_ms": "2000", "RAY_health_check_timeout_ms": "3000"}
"""With a silent node: five checks, 25 s, and not the minute that Ray has otherwise, so that a run is shorter."""


def inside_own_network(module: str) -> None:
    """Go on in a network namespace with a bridge on which the head listens; runs `python -m module` anew for that."""
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        os.execvp("unshare", ["unshare", "-n", sys.executable, "-m", module, *sys.argv[1:]])
    _run("ip link set lo up")
    _run(f"ip link add {BRIDGE} type bridge")
    _run(f"ip addr add {HEAD}/16 dev {BRIDGE}")
    _run(f"ip link set {BRIDGE} up")
    _run(f"ip route add default dev {BRIDGE}")  # by which Ray finds out this host's address


def make_address(number: int) -> str:
    """Of a node."""
    return f"10.77.{number // 256}.{number % 256}"


def _run(command: str, *words: str) -> None:
    subprocess.run([*command.split(), *words], check=True, capture_output=True)


@dataclass
class Node:
    """A node: the process that holds its namespace, and what runs in it."""

    number: int
    holder: "subprocess.Popen[bytes]"
    ray: "subprocess.Popen[bytes]"
    log: Path

    @property
    def address(self) -> str:
        return make_address(self.number)

    def has_joined(self) -> bool:
        """Whether its raylet is part of the cluster."""
        return "Ray runtime started" in self.log.read_text()

    def processes(self) -> list[psutil.Process]:
        """All of the node's."""
        here = os.readlink(f"/proc/{self.holder.pid}/ns/net")
        return [process for process in psutil.process_iter() if _network_of(process.pid) == here]

    def cut(self) -> None:
        """Take its network away."""
        _run(f"ip link set veth{self.number} down")

    def mend(self) -> None:
        """Give its network back."""
        _run(f"ip link set veth{self.number} up")

    def drain(self, seconds: float) -> None:
        """As a machine that had notice: it will be gone after so many seconds."""
        # Ray's command would take any raylet of this host for the one that is meant
        code = (
            "import ray; ray.init(log_to_driver=False);"
            f"print(*[n['NodeID'] for n in ray.nodes() if n['Alive'] and n['NodeManagerAddress'] == '{self.address}'])"
        )
        asked = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        words = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot interruption"]
        words += ["--node-id", asked.stdout.split()[-1], "--deadline-remaining-seconds", f"{seconds:.0f}"]
        _run(" ".join([RAY, "drain-node", f"--address={HEAD}:{PORT}"]), *words)

    def crash(self) -> None:
        """As a machine whose power fails: every process at once."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for started in (self.ray, self.holder):
            started.wait()


def _network_of(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return None


@dataclass
class Raylets:
    """The cluster. `nodes` are those that were added and not removed, the head is none of them."""

    folder: Path
    num_cpus: float = 2
    num_gpus: float = 1
    """Of each node."""
    nodes: list[Node] = field(default_factory=list)
    next_number: int = 2

    @property
    def address(self) -> str:
        return f"{HEAD}:{PORT}"

    def add_node(self) -> Node:
        """Start a node; it joins within seconds."""
        number = self.next_number
        self.next_number += 1
        holder = subprocess.Popen(["unshare", "-n", "sleep", "infinity"], start_new_session=True)
        while _network_of(holder.pid) == _network_of(os.getpid()):
            time.sleep(0.01)
        _run(f"ip link add veth{number} type veth peer name eth0 netns {holder.pid}")
        _run(f"ip link set veth{number} master {BRIDGE} up")
        enter = ["nsenter", "-t", str(holder.pid), "-n"]
        for command in (
            "ip link set lo up",
            f"ip addr add {make_address(number)}/16 dev eth0",
            "ip link set eth0 up",
            f"ip route add default via {HEAD}",
        ):
            _run(" ".join([*enter, command]))
        resources = [f"--num-cpus={self.num_cpus:g}", f"--num-gpus={self.num_gpus:g}"]
        start = [RAY, "start", f"--address={self.address}", f"--node-ip-address={make_address(number)}", *resources]
        log = self.folder / f"node-{number}.log"
        node = Node(number, holder, self._start([*enter, *start], log), log)
        self.nodes.append(node)
        return node

    def remove(self, node: Node) -> None:
        """Crash a node for good."""
        node.crash()
        self.nodes.remove(node)

    def mend(self) -> None:
        """Replace the nodes that did not come up: Ray gives a raylet 30 s, too few on a busy host."""
        for node in [node for node in self.nodes if node.ray.poll() is not None]:
            self.remove(node)
            self.add_node()

    def start_head(self, *options: str) -> "subprocess.Popen[bytes]":
        """GCS and a raylet that runs no work."""
        start = [RAY, "start", "--head", f"--node-ip-address={HEAD}", f"--port={PORT}", "--num-cpus=0", "--num-gpus=0"]
        return self._start(
            [*start, "--include-dashboard=false", f"--temp-dir={self.folder}", *options], self.folder / "head.log"
        )

    def _start(self, command: list[str], log: Path) -> "subprocess.Popen[bytes]":
        more = ["--block", f"--object-store-memory={OBJECT_STORE}", "--disable-usage-stats"]
        more += ["--include-log-monitor=false"]  # nobody reads what it sends, and it takes a tenth of a core
        env = os.environ | PATIENCE
        with log.open("wb") as file:
            return subprocess.Popen([*command, *more], stdout=file, stderr=file, start_new_session=True, env=env)


@contextlib.contextmanager
def running_raylets(num_nodes: int, num_cpus: float = 2, num_gpus: float = 1) -> Iterator[Raylets]:
    """A head and nodes, for as long as the block runs. RAY_ADDRESS names the cluster."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that what was started is ended
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        cluster = Raylets(Path(folder), num_cpus, num_gpus)
        head = cluster.start_head()
        os.environ["RAY_ADDRESS"] = cluster.address
        try:
            wait_for_head()
            for _ in range(num_nodes):
                cluster.add_node()
                while not cluster.nodes[-1].has_joined():
                    time.sleep(0.2)
                    cluster.mend()
            yield cluster
        finally:
            for node in list(cluster.nodes):
                cluster.remove(node)
            kill_family(head)


def wait_for_head(seconds: float = 60) -> None:
    """Until its GCS listens."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), socket.create_connection((HEAD, PORT), timeout=1):
            return
        if time.monotonic() > deadline:
            raise TimeoutError("Ray's head did not start.")
        time.sleep(0.2)


def kill_family(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL a process that was started here, and its children."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
    process.kill()
    process.wait()
