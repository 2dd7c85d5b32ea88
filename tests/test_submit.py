"""Jobs on a real Ray cluster of one node, on loopback, which asks for a token.

The project is hidden from the cluster's own Python, so what runs there is what was shipped. The engine is the simulated
one; Ray, its job server, the commits and the store are real.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.log_view import BAR, LogView
from jobs.shipping import RESULT_MARK, Shipment
from pipeline.errors import JobError
from tests.running import (
    Finished,
    keys_of,
    kill_tree,
    r4b,
    read_output,
    simulated_spec,
    started_r4b,
    write_scene_shards,
    write_spec,
)
from tests.s3_server import S3Server

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "127.0.0.41"
"""Not 127.0.0.1, for which Ray takes the machine's own address on the network."""

HIDE_PROJECT = f"""
import sys
from pathlib import Path
if not Path(__file__).with_name("show").exists():
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path({str(ROOT)!r})]
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
"""
"""A sitecustomize.py: this environment has the project installed, a cluster's need not."""


@dataclass(frozen=True)
class RayCluster:
    """Where the head's dashboard listens."""

    address: str
    folder: Path

    def submit(self, *args: str, timeout: float = 120) -> Finished:
        return r4b("submit", *args, "--address", self.address, timeout=timeout)

    def jobs(self, output: str | None = None) -> list[Any]:
        """All that were submitted, the oldest first; of one output if that is named."""
        from ray.job_submission import JobSubmissionClient

        jobs = [job for job in JobSubmissionClient(self.address).list_jobs() if job.submission_id]
        return sorted((job for job in jobs if output in (None, job.submission_id.split("-")[-2])), key=_started)


def _started(job: Any) -> int:
    return int(job.start_time)


def free_ports(count: int) -> list[int]:
    """Below the ephemeral ports, so that no outgoing connection takes one before it is used; on all addresses."""
    found: list[int] = []
    for port in range(22_100 + os.getpid() % 4_000, 32_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, s3: S3Server) -> Iterator[RayCluster]:
    """`ray start --head --block`; all its processes are ended with it. It has the store's credentials."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "sitecustomize.py").write_text(HIDE_PROJECT)
    names = ("", "dashboard-", "dashboard-agent-listen-", "dashboard-agent-grpc-", "runtime-env-agent-")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    options = [f"--{name}port={port}" for name, port in ports.items()]
    with tempfile.TemporaryDirectory(prefix="r4b-ray-") as short:  # Ray's sockets lie there, and their paths are short
        options += [f"--node-ip-address={ADDRESS}", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
        options += ["--disable-usage-stats", f"--temp-dir={short}", "--num-cpus=2", "--object-store-memory=300000000"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with (folder / "head.log").open("w") as log:
            process = subprocess.Popen(
                [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *options],
                env=os.environ | {"PATH": path, "PYTHONPATH": str(folder)},
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            found = RayCluster(f"http://127.0.0.1:{ports['dashboard-']}", folder)
            wait_until(lambda: answers(found), 120)
            yield found
        finally:
            kill_tree(process.pid)
            process.wait()


def answers(found: RayCluster) -> bool:
    with suppress(Exception):
        return found.jobs() == []
    return False


def wait_until(happened: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def parts_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Name to (inode, time of change) of each part."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("out/data/*.parquet")}


def output_of(folder: Path) -> str:
    """What the submission ids of a job that writes there hold of its output."""
    from jobs.submit import check_spec, identify

    return identify(check_spec(str(folder / "job.yaml"), ()).job, ()).output


def prepared(folder: Path, rows: int, max_num_seqs: int = 32, seconds_per_token: float = 0.02, **changes: Any) -> str:
    """Shards and a spec in a folder; the spec's path. A row takes 35 tokens."""
    write_scene_shards(folder / "in", rows, rows_per_shard=200)
    simulation = {"seconds_per_token": seconds_per_token}
    return write_spec(folder, simulated_spec(folder, max_num_seqs=max_num_seqs, simulation=simulation) | changes)


class Talk:
    """What a process says on stderr, while it says it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process, self.said = process, ""
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.said, 90)

    def end(self, seconds: float) -> tuple[str, str]:
        """Wait for its end; what it said on stdout and stderr."""
        self.process.wait(seconds)
        self.thread.join(10)
        assert self.process.stdout is not None
        return self.process.stdout.read(), self.said


def test_submitted_job_outlives_its_submitter_and_is_followed_stopped_and_resumed(
    cluster: RayCluster, tmp_path: Path
) -> None:
    path, rows = prepared(tmp_path, 800, max_num_seqs=4), 800
    output = output_of(tmp_path)
    with started_r4b("submit", path, "--address", cluster.address) as process:
        wait_until(lambda: len(parts_of(tmp_path)) >= 2, 90)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 130, told
    assert f"Follow it: r4b submit {path} --address {cluster.address}\n" in told
    assert f"Stop it:   r4b submit {path} --address {cluster.address} --stop\n" in told

    with started_r4b("submit", path, "--address", cluster.address) as process:
        Talk(process).wait_for("runs already")
        kill_tree(process.pid)
    assert [job.status.value for job in cluster.jobs(output)] == ["RUNNING"]

    with started_r4b("submit", path, "--address", cluster.address) as process:
        talk = Talk(process)
        talk.wait_for("runs already")
        before = len(parts_of(tmp_path))
        wait_until(lambda: len(parts_of(tmp_path)) >= before + 2, 60)
        stopped = cluster.submit(path, "--stop")
        stdout, told = talk.end(60)
    assert stopped.code == 0, stopped.stderr
    assert "Stopped. Committed chunks are kept" in stopped.stderr
    assert (process.returncode, stdout) == (1, "")
    assert "runs already" in told
    assert told.count("test: 4 shards, 800 samples") == 1
    assert "r4b: stopped. Committed chunks are kept" in told, "the run was killed, not asked to stop"
    assert [job.status.value for job in cluster.jobs(output)] == ["STOPPED"]

    kept = parts_of(tmp_path)
    assert 4 <= len(kept) < rows // 16
    again = cluster.submit(path, "--stop")
    assert again.code == 0
    assert "Nothing to stop" in again.stderr
    assert parts_of(tmp_path) == kept

    done = cluster.submit(path, "--json", "--set", "engine.max_num_seqs=256")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "_manifest.json").read_text())
    now = parts_of(tmp_path)
    assert {name: now[name] for name in kept} == kept
    keys = keys_of(read_output(tmp_path / "out"))
    assert len(keys) == rows
    assert set(keys) == {(f"scene-{n:06d}", "question") for n in range(rows)}
    assert [job.submission_id for job in cluster.jobs(output)] == [f"r4b-{output}-{n}" for n in (1, 2)]
    assert_bar_is_readable(done.stderr)

    nothing = cluster.submit(path)
    assert nothing.code == 0, nothing.stderr
    assert nothing.stdout.startswith("800 rows in 52 parts")
    assert parts_of(tmp_path) == now


def assert_bar_is_readable(text: str) -> None:
    """Each state of the bar is a line of its own, and no line holds two or a control character."""
    bars = [line for line in text.splitlines() if BAR.search(line)]
    assert bars
    assert all(line.count("/s]") + line.count("s/row]") == 1 for line in bars)
    assert not re.search(r"[\r\x1b]", text)
    assert re.search(r"100%\|█+\| \d+/\d+ \[", bars[-1])


def test_two_submitters_at_once_start_one_job(cluster: RayCluster, tmp_path: Path) -> None:
    path = prepared(tmp_path, 16, seconds_per_token=0.5)
    with (
        started_r4b("submit", path, "--address", cluster.address) as one,
        started_r4b("submit", path, "--address", cluster.address) as other,
    ):
        told = [process.communicate(timeout=120) for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), told
    assert told[0][0] == told[1][0]
    assert len(cluster.jobs(output_of(tmp_path))) == 1


def test_detach_prints_the_id_and_a_changed_spec_waits_for_the_output(cluster: RayCluster, tmp_path: Path) -> None:
    path, output = prepared(tmp_path, 200, seconds_per_token=5), output_of(tmp_path)
    first = cluster.submit(path, "--detach")
    assert (first.code, first.stdout) == (0, f"r4b-{output}-1\n"), first.stderr
    same = cluster.submit(path, "--no-wait", "--json")
    assert json.loads(same.stdout) == {"submission_id": f"r4b-{output}-1"}
    for change in (["--set", "sampling.seed=5"], ["--retry-errors"]):
        other = cluster.submit(path, *change)
        assert (other.code, other.stdout) == (2, "")
        assert f"r4b-{output}-1 writes to this output already" in other.stderr
    assert len(cluster.jobs(output)) == 1
    wait_until((tmp_path / "out" / "_job.json").exists, 90)
    assert cluster.submit(path, "--stop", "--set", "sampling.seed=5").code == 0
    with_option = cluster.submit(path, "--retry-errors", "--set", "engine.simulation.seconds_per_token=0")
    assert with_option.code == 2, "the fingerprint differs: found on the cluster"
    assert "output.url" in with_option.stderr
    new = cluster.submit(path, "--force-new", "--set", "engine.simulation.seconds_per_token=0")
    assert new.code == 0, new.stderr
    assert "--force-new" in cluster.jobs(output)[-1].entrypoint
    assert sorted(keys_of(read_output(tmp_path / "out"))) == [(f"scene-{n:06d}", "question") for n in range(200)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"temperatur": 0}}, "sampling.temperatur: unknown key"),
        ({"input": {"url": "in"}}, "input.url: in is a path of this machine"),
        ({"input": {"url": ["/data/in", "./in"]}}, "input.url: ./in is a path of this machine"),
        ({"output": {"url": "~/out"}}, "output.url: ~/out is a path of this machine"),
        ({"output": {"url": "file://out"}}, "output.url: file://out is a path of this machine"),
        ({"prompts": {"url": "prompts"}}, "prompts.url: prompts is a path of this machine"),
        ({"engine": {"model": "checkpoints/r4b-shapes"}}, "engine.model: checkpoints/r4b-shapes is a path"),
        ({"engine": {"model": "./R-4B"}}, "engine.model: ./R-4B is a path"),
    ],
)
def test_wrong_spec_is_refused_here(cluster: RayCluster, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    before = len(cluster.jobs())
    path = write_spec(tmp_path, simulated_spec(tmp_path) | changes)
    refused = r4b("submit", path, "--address", cluster.address, cwd=ROOT)
    assert (refused.code, refused.stdout) == (2, "")
    assert message in refused.stderr
    assert len(cluster.jobs()) == before
    assert not (tmp_path / "out").exists()


def test_paths_that_any_node_understands_pass(tmp_path: Path) -> None:
    from jobs.submit import check_spec

    for model in ("YannQi/R-4B", "/models/R-4B"):
        spec = simulated_spec(tmp_path) | {"engine": {"model": model}, "input": {"url": "s3://bucket/in/"}}
        spec["output"] = {"url": "file:///data/out"}
        checked = check_spec(write_spec(tmp_path, spec), ("engine.max_num_seqs=7",))
        assert (checked.job.engine.model, checked.job.output.url) == (model, "/data/out")
        assert checked.data["engine"] == {"model": model, "max_num_seqs": 7}


def test_wrong_input_is_found_on_the_cluster(cluster: RayCluster, tmp_path: Path) -> None:
    path = write_spec(tmp_path, simulated_spec(tmp_path))
    refused = cluster.submit(path)
    assert (refused.code, refused.stdout) == (2, "")
    assert re.search(r"^r4b: input\.url: ", refused.stderr, re.MULTILINE), refused.stderr


def test_failing_job_ends_with_1_and_its_message(cluster: RayCluster, tmp_path: Path) -> None:
    prompts = [{"id": "question", "template": "{{ question.nothing.there }}"}]
    failed = cluster.submit(prepared(tmp_path, 200, prompts=prompts))
    assert (failed.code, failed.stdout) == (1, "")
    assert re.search(r"^r4b: \d+ of \d+ rows failed, more than limits\.max_error_rate", failed.stderr, re.MULTILINE)
    assert "failed with exit code 1" in failed.stderr


@pytest.mark.parametrize(
    ("mode", "token", "message"),
    [("token", "wrong" * 8, "refuses the token"), ("disabled", "", "asks for a token")],
    ids=["wrong", "none"],
)
def test_cluster_that_refuses_the_token_is_explained(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, token: str, message: str
) -> None:
    path = prepared(tmp_path, 16)
    right = os.environ["RAY_AUTH_TOKEN"]
    with monkeypatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", mode)
        patch.setenv("RAY_AUTH_TOKEN", token)
        refused = cluster.submit(path)
    assert (refused.code, refused.stdout) == (2, "")
    assert message in refused.stderr
    assert "RAY_AUTH_TOKEN" in refused.stderr
    assert right not in refused.stderr
    assert not token or token not in refused.stderr
    assert cluster.jobs(output_of(tmp_path)) == []


def test_credentials_are_the_nodes_and_none_are_sent(
    cluster: RayCluster, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scene_shards(tmp_path / "in", 32)
    [shard] = (tmp_path / "in").iterdir()
    prefix = s3.fresh_prefix("submit")
    s3.put(f"{prefix}/in/a.parquet", shard.read_bytes())
    spec = simulated_spec(tmp_path) | {"storage": {"endpoint_url": s3.endpoint_url, "region": "us-east-1"}}
    spec["input"], spec["output"] = {"url": f"{prefix}/in/"}, {"url": f"{prefix}/out/"}
    path = write_spec(tmp_path, spec)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "this-machine-has-no-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nor-a-secret")
        patch.setenv("HF_TOKEN", "nor-this")
        done = cluster.submit(path, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["num_rows"] == 32
    job = cluster.jobs(output_of(tmp_path))[-1]
    assert set(job.runtime_env) - {"_ray_commit"} == {"working_dir", "env_vars"}
    assert set(job.runtime_env["env_vars"]) == {"RAY_JOB_STOP_SIGNAL", "RAY_JOB_STOP_WAIT_TIME_S"}


def test_installed_ships_the_spec_alone_and_asks_for_the_same_version(cluster: RayCluster, tmp_path: Path) -> None:
    path = prepared(tmp_path, 16)
    missing = cluster.submit(path, "--installed")
    assert missing.code == 1
    assert "No module named" in missing.stderr
    (cluster.folder / "show").touch()
    try:
        done = cluster.submit(path, "--installed")
        assert done.code == 0, done.stderr
    finally:
        (cluster.folder / "show").unlink()
    other = subprocess.run(
        [sys.executable, "-m", "jobs.submitted", path, "--expect", "0.0.1"], cwd=ROOT, capture_output=True, text=True
    )
    assert other.returncode == 2
    assert "leave --installed out" in other.stderr


@dataclass
class Line:
    """A connection to the head that can be cut: a TCP proxy on loopback."""

    target: int
    port: int = 0
    cut: bool = False
    sockets: list[socket.socket] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def serve(self, server: socket.socket) -> None:
        self.port = server.getsockname()[1]
        with suppress(OSError):
            while True:
                client, _ = server.accept()
                with self.lock:
                    if self.cut:
                        client.close()
                        continue
                    head = socket.create_connection(("127.0.0.1", self.target))
                    self.sockets += [client, head]
                for source, sink in ((client, head), (head, client)):
                    threading.Thread(target=self.pump, args=(source, sink), daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def break_off(self) -> None:
        with self.lock:
            self.cut = True
            for end in self.sockets:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            self.sockets.clear()


@pytest.fixture
def line(cluster: RayCluster) -> Iterator[Line]:
    made = Line(int(cluster.address.rpartition(":")[2]))
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=made.serve, args=(server,), daemon=True)
        thread.start()
        wait_until(lambda: made.port, 10)
        yield made
        made.break_off()
        server.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=10)


def test_following_goes_on_where_the_connection_broke(cluster: RayCluster, line: Line, tmp_path: Path) -> None:
    path = prepared(tmp_path, 400, max_num_seqs=8)
    with started_r4b("submit", path, "--address", f"http://127.0.0.1:{line.port}") as process:
        talk = Talk(process)
        for number in (1, 2):
            before = len(parts_of(tmp_path))
            wait_until(lambda least=before + 3: len(parts_of(tmp_path)) >= least, 90)
            line.break_off()
            wait_until(lambda times=number: talk.said.count("does not answer; trying again") == times, 90)
            line.cut = False
        stdout, told = talk.end(120)
    assert process.returncode == 0, told
    assert stdout.startswith("400 rows in 26 parts")
    assert len(cluster.jobs(output_of(tmp_path))) == 1
    from ray.job_submission import JobSubmissionClient

    log = JobSubmissionClient(cluster.address).get_job_logs(cluster.jobs(output_of(tmp_path))[0].submission_id)
    lines = [text for text in log.splitlines() if text and not text.startswith(RESULT_MARK)]
    shown = [text for text in told.splitlines() if text and not text.startswith(("r4b: http", "r4b-"))]
    assert [text for text in shown if not BAR.search(text)] == [text for text in lines if not BAR.search(text)]
    assert_bar_is_readable(told)


def test_head_that_is_gone_is_given_up_with_a_message(cluster: RayCluster, line: Line, tmp_path: Path) -> None:
    path = prepared(tmp_path, 400, max_num_seqs=4)
    with started_r4b("submit", path, "--address", f"http://127.0.0.1:{line.port}", "--patience", "2") as process:
        wait_until(lambda: parts_of(tmp_path), 90)
        line.break_off()
        stdout, told = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (1, "")
    assert "has not answered for 2 s" in told
    assert "Traceback" not in told
    assert "Stopped." in cluster.submit(path, "--stop").stderr
    [port] = free_ports(1)
    nobody = r4b("submit", path, "--address", f"http://127.0.0.1:{port}")
    assert nobody.code == 2
    assert f"--address: no Ray dashboard answers at http://127.0.0.1:{port}" in nobody.stderr


def test_head_that_was_started_anew_does_not_know_the_job(cluster: RayCluster) -> None:
    from jobs.ray_jobs import Cluster

    with pytest.raises(JobError, match="does not know the job any more"):
        Cluster(cluster.address, 1).follow("r4b-0000000000-1")


def test_address_of_the_call_goes_before_the_environment(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = prepared(tmp_path, 16)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    assert cluster.submit(path, "--stop").code == 0
    assert r4b("submit", path, "--stop").code == 2
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    assert r4b("submit", path, "--stop").code == 0


def test_shipment_holds_the_project_and_its_plugins(tmp_path: Path) -> None:
    """Without the site's packages nothing else could be found."""
    code = (
        "import pipeline.errors, jobs, deployments; from importlib.metadata import entry_points, version; "
        "print(version('r4b'), pipeline.errors.__file__, "
        "[entry.value for group in ('torch.backends', 'vllm.general_plugins') for entry in entry_points(group=group)])"
    )
    with Shipment({"name": "x"}, ("--drop-stale",)).packed() as folder:
        ran = subprocess.run([sys.executable, "-S", "-c", code], cwd=folder, capture_output=True, text=True)
        assert yaml.safe_load((Path(folder) / "job.yaml").read_text()) == {"name": "x"}
        files = {str(path.relative_to(folder)) for path in Path(folder).rglob("*.py")}
        assert f"{folder}/pipeline/errors.py" in ran.stdout, ran.stderr
    assert "['pipeline.cpu_torch:adapt', 'pipeline.engine.plugin:register']" in ran.stdout
    ours = {
        str(path.relative_to(ROOT))
        for name in ("pipeline", "jobs", "deployments")
        for path in ROOT.glob(f"{name}/**/*.py")
    }
    assert files == ours
    with Shipment({"name": "x"}, installed=True).packed() as folder:
        assert [path.name for path in Path(folder).iterdir()] == ["job.yaml"]
    assert not Path(folder).exists()


def test_log_view_shows_each_line_once_and_keeps_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    log = (
        'one\n\r  0%|  | 0/9 [00:00<?, ?row/s]\r 11%|# | 1/9 [00:05<00:40,  5.00s/row]\nätwo\nr4b-result: {"a": 1}\nend'
    )
    for size in (1, 7, len(log)):
        view = LogView()
        for start in range(0, len(log), size):
            view.take(start, log[start : start + size])
            view.take(0, log[: start + size])
        view.close()
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if "0%|" not in line] == [
            "one", " 11%|# | 1/9 [00:05<00:40,  5.00s/row]", "ätwo", "end"
        ]  # fmt: skip
        assert view.result == {"a": 1}
    assert lines == ["one", " 11%|# | 1/9 [00:05<00:40,  5.00s/row]", "ätwo", "end"]


def test_log_view_draws_bars_in_place_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = LogView()
    view.in_place = True
    monkeypatch.setenv("COLUMNS", "30")
    for position, text in (
        (0, " 1%|# | 1/9 [00:05<00:40,  5.00row/s]\n"),
        (38, "note\n"),
        (43, "7row [00:05,  5.00row/s]\n"),
    ):
        view.take(position, text)
    view.close()
    clear = "\r\x1b[K"
    assert (
        capsys.readouterr().err == f"{clear} 1%|# | 1/9 [00:05<00:40,  5.{clear}note\n{clear}7row [00:05,  5.00row/s]\n"
    )
