"""The command line as a user meets it: exit codes, one clear message and no traceback for what is wrong.

`r4b demo` and real jobs are in test_real_job.py.
"""

import contextlib
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.terminal import heeded_interrupt
from tests.running import r4b, simulated_spec, write_scene_shards, write_spec

Change = Callable[[dict[str, Any], Path], None]


def unknown_key(spec: dict[str, Any], folder: Path) -> None:
    spec["engine"]["max_seqs"] = 4


def wrong_type(spec: dict[str, Any], folder: Path) -> None:
    spec["output"]["chunk_rows"] = "many"


def missing_input(spec: dict[str, Any], folder: Path) -> None:
    spec["input"]["url"] = str(folder / "nowhere")


def empty_prefix(spec: dict[str, Any], folder: Path) -> None:
    (folder / "empty").mkdir()
    spec["input"]["url"] = str(folder / "empty") + "/"


def missing_folder_model(spec: dict[str, Any], folder: Path) -> None:
    spec["engine"] |= {"kind": "vllm", "model": str(folder / "no-model")}


def missing_hub_model(spec: dict[str, Any], folder: Path) -> None:
    spec["engine"] |= {"kind": "vllm", "model": "nobody/no-such-model"}


def unknown_engine_arg(spec: dict[str, Any], folder: Path) -> None:
    spec["engine"] |= {"kind": "vllm", "model": str(Path("checkpoints/r4b-shapes").resolve())}
    spec["engine"]["args"] = {"enforce_eagerly": True}


def output_is_a_file(spec: dict[str, Any], folder: Path) -> None:
    (folder / "file").write_text("not a folder")
    spec["output"]["url"] = str(folder / "file" / "out")


def unknown_column(spec: dict[str, Any], folder: Path) -> None:
    spec["prompts"][0]["template"] = "{{ qestion }}"


def unreachable_store(spec: dict[str, Any], folder: Path) -> None:
    spec["input"]["url"] = "s3://bucket/images/"
    spec["storage"] = {"endpoint_url": "http://127.0.0.1:9"}


def unknown_scheme(spec: dict[str, Any], folder: Path) -> None:
    spec["output"]["url"] = "s3a://bucket/out"


def endpoint_without_a_scheme(spec: dict[str, Any], folder: Path) -> None:
    spec["input"]["url"] = "s3://bucket/images/"
    spec["storage"] = {"endpoint_url": "localhost:8333"}


def token_in_args(spec: dict[str, Any], folder: Path) -> None:
    spec["engine"]["args"] = {"hf_token": "hf_do-not-print"}


def more_gpus_than_here(spec: dict[str, Any], folder: Path) -> None:
    spec["engine"]["num_gpus"] = 1000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (unknown_key, "engine.max_seqs"),
        (wrong_type, "output.chunk_rows"),
        (missing_input, "nowhere"),
        (empty_prefix, "empty"),
        (missing_folder_model, "no-model"),
        (missing_hub_model, "nobody/no-such-model"),
        (unknown_engine_arg, "enforce_eagerly"),
        (output_is_a_file, "output.url"),
        (unknown_column, "qestion"),
        (unreachable_store, "s3://bucket/images/"),
        (unknown_scheme, "s3a://"),
        (endpoint_without_a_scheme, "localhost:8333"),
        (token_in_args, "HF_TOKEN"),
        (more_gpus_than_here, "needs 1000 GPUs"),
    ],
)
def test_run_wrong_spec_exits_2_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, says: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-this-test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-this-test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    write_scene_shards(tmp_path / "in", 4)
    spec = simulated_spec(tmp_path)
    change(spec, tmp_path)
    finished = r4b("run", write_spec(tmp_path, spec), timeout=120)
    assert finished.code == 2, finished.stderr
    assert says in finished.stderr
    assert finished.stderr.count("r4b: ") == 1
    assert "Traceback" not in finished.stderr + finished.stdout
    assert "secret-of-this-test" not in finished.stderr
    assert not (tmp_path / "out" / "data").exists()


def test_run_unwritable_output_exits_2(tmp_path: Path) -> None:
    write_scene_shards(tmp_path / "in", 4)
    spec = simulated_spec(tmp_path)
    spec["output"]["url"] = "/proc/r4b-cannot-write-here"
    finished = r4b("run", write_spec(tmp_path, spec))
    assert finished.code == 2, finished.stderr
    assert "/proc/r4b-cannot-write-here" in finished.stderr


def test_run_without_a_spec_exits_2() -> None:
    assert r4b("run").code == 2
    missing = r4b("run", "no-such-file.yaml")
    assert missing.code == 2
    assert "no-such-file.yaml" in missing.stderr


def test_plan_and_status_tell_what_is_done(tmp_path: Path) -> None:
    write_scene_shards(tmp_path / "in", 40)
    path = write_spec(tmp_path, simulated_spec(tmp_path))
    planned = json.loads(r4b("plan", path, "--json").stdout)
    assert (planned["rows"], planned["chunks"], planned["rows_to_do"]) == (40, 3, 40)
    assert not (tmp_path / "out").exists()
    assert r4b("status", str(tmp_path / "out")).code == 2
    assert r4b("run", path).code == 0
    assert json.loads(r4b("plan", path, "--json").stdout)["rows_to_do"] == 0
    status = json.loads(r4b("status", str(tmp_path / "out"), "--json").stdout)
    assert (status["finished"], status["rows"], status["chunks_left"], status["errors"]) == (True, 40, 0, 0)
    report = json.loads(r4b("report", str(tmp_path / "out"), "--json").stdout)
    assert sum(mode["rows"] for mode in report["modes"].values()) == 40


def test_set_overrides_the_spec(tmp_path: Path) -> None:
    write_scene_shards(tmp_path / "in", 40)
    path = write_spec(tmp_path, simulated_spec(tmp_path))
    planned = json.loads(r4b("plan", path, "--json", "--set", "input.limit=10").stdout)
    assert planned["rows"] == 10
    assert r4b("plan", path, "--set", "input.limit=ten").code == 2


@pytest.mark.parametrize("command", [[], ["run"], ["plan"], ["status"], ["report"], ["demo"]])
def test_help_teaches(command: list[str]) -> None:
    finished = r4b(*command, "--help")
    assert finished.code == 0
    assert finished.stdout.startswith("Usage: r4b")
    assert len(finished.stdout.splitlines()) > 8


def test_interrupt_that_a_library_lost_is_heeded_at_the_next_commit() -> None:
    before = signal.getsignal(signal.SIGINT)
    with heeded_interrupt() as heed:
        heed()
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            heed()
    assert signal.getsignal(signal.SIGINT) is before
