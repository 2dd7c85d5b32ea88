"""A store that breaks one request in five: the job ends right. A store that throttles is not pressed. Credentials that
expire are looked for again.
"""

import io
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.batch import run_batch
from pipeline.spec import parse_spec
from tests.builders import image_table
from tests.running import simulated_spec, started_r4b, write_spec
from tests.s3_server import S3Server
from tests.store_proxy import KINDS, running_proxy

pytestmark = pytest.mark.long

SHARE = 0.2


def put_shards(s3: S3Server, prefix: str, num_rows: int, rows_per_shard: int = 50) -> None:
    for first in range(0, num_rows, rows_per_shard):
        buffer = io.BytesIO()
        pq.write_table(image_table(rows_per_shard, first), buffer, row_group_size=25)
        s3.put(f"{prefix}/in/{first:06d}.parquet", buffer.getvalue())


def spec_over(folder: Path, prefix: str, endpoint_url: str) -> dict[str, object]:
    spec = simulated_spec(folder)
    return spec | {
        "input": {"url": f"{prefix}/in/"},
        "prompts": [{"id": "p", "template": "What is this?"}],
        "output": {"url": f"{prefix}/out/", "chunk_rows": 25},
        "storage": {"endpoint_url": endpoint_url, "region": "us-east-1"},
    }


def test_job_ends_right_on_a_store_that_breaks_one_request_in_five(tmp_path: Path, s3: S3Server) -> None:
    prefix = s3.fresh_prefix("faults")
    put_shards(s3, prefix, 300)
    with running_proxy(s3.endpoint_url, seed=3, rate=SHARE, stall_s=1) as proxy:
        manifest = run_batch(parse_spec(spec_over(tmp_path, prefix, proxy.url), "the test's spec"))
        assert set(proxy.broken) == set(KINDS)
    assert (manifest.num_rows, manifest.num_errors) == (300, 0)
    parts = [s3.get(url) for url in s3.list(f"{prefix}/out/data/")]
    ids = [row for data in parts for row in pq.read_table(io.BytesIO(data)).column("sample_id").to_pylist()]
    assert sorted(ids) == sorted(f"row-{n}" for n in range(300))


def test_job_outlasts_a_store_that_throttles_and_does_not_press_it(tmp_path: Path, s3: S3Server) -> None:
    prefix = s3.fresh_prefix("throttled")
    put_shards(s3, prefix, 300)
    with running_proxy(s3.endpoint_url, kinds=("503",)) as proxy:
        begun: list[float] = []

        def throttle() -> None:
            deadline = time.monotonic() + 60
            while proxy.asked["get"] <= 7 and time.monotonic() < deadline:  # the plan reads each of six shards' footers
                time.sleep(0.05)
            begun.append(time.monotonic() - proxy.started)
            proxy.rate = 1.0
            time.sleep(25)
            proxy.rate = 0.0

        thread = threading.Thread(target=throttle, daemon=True)
        thread.start()
        manifest = run_batch(parse_spec(spec_over(tmp_path, prefix, proxy.url), "the test's spec"))
        thread.join()
    assert (manifest.num_rows, manifest.num_errors) == (300, 0)
    seconds = range(int(begun[0]) + 5, int(begun[0]) + 25)
    assert proxy.broken["503"] > 0
    assert sum(proxy.arrived[second] for second in seconds) < 5 * len(seconds)


def test_job_goes_on_when_connections_to_the_store_hang(tmp_path: Path, s3: S3Server) -> None:
    prefix = s3.fresh_prefix("hung")
    put_shards(s3, prefix, 300)
    with running_proxy(s3.endpoint_url, seed=5, rate=0.1, kinds=("stall",), stall_s=3600) as proxy:
        spec = spec_over(tmp_path, prefix, proxy.url) | {"limits": {"fetch_timeout_s": 2}}
        manifest = run_batch(parse_spec(spec, "the test's spec"))
        assert proxy.broken["stall"] > 2
    assert (manifest.num_rows, manifest.num_errors) == (300, 0)


def test_job_goes_on_with_the_credentials_that_came_after_those_that_expired(
    tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = s3.fresh_prefix("expired")
    put_shards(s3, prefix, 300)
    credentials = tmp_path / "credentials"

    def write_credentials(key: str, secret: str) -> None:
        new = tmp_path / "new"
        new.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
        new.replace(credentials)

    write_credentials(s3.access_key, s3.secret_key)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with running_proxy(s3.endpoint_url) as proxy:
        spec = write_spec(tmp_path, spec_over(tmp_path, prefix, proxy.url))
        with started_r4b("run", spec, "--json") as job:
            deadline = time.monotonic() + 120
            while not s3.list(f"{prefix}/out/data/") and time.monotonic() < deadline:
                time.sleep(0.05)
            proxy.expired_key = s3.access_key
            while not proxy.broken["expired"] and time.monotonic() < deadline:
                time.sleep(0.05)
            write_credentials(*s3.second_key)
            output, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors
    assert proxy.broken["expired"] > 0
    assert '"num_rows": 300' in output
    assert '"num_errors": 0' in output
    assert s3.secret_key not in output + errors
