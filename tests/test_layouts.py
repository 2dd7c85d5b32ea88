"""The same 300 scenes in every layout, from disk and S3, give the same answers under the documented ids.

The simulated engine's answers depend on every byte of a request, so equal answers are equal requests. The slow tests
ask the small checkpoint on vLLM, greedily.
"""

from pathlib import Path
from typing import Any

import pytest

from pipeline.batch import run_batch
from pipeline.report import read_parts
from pipeline.spec import StorageSpec, parse_spec
from tests.layouts import LAYOUTS, Layout, scene_samples, upload
from tests.running import real_spec, simulated_spec
from tests.s3_server import S3Server

NUM_SCENES = 300
COMPARED = ("prompt_id", "mode_chosen", "reasoning", "answer", "finish_reason", "completion_tokens", "truth")
on_both_engines = pytest.mark.parametrize(
    "engine",
    [simulated_spec, pytest.param(real_spec, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
    ids=["simulated", "vllm"],
)


@pytest.fixture(scope="module")
def scenes() -> list[dict[str, Any]]:
    return scene_samples(NUM_SCENES)


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, tuple[Any, ...]]]:
    """By engine, what the first layout's job answered, by scene."""
    return {}


@on_both_engines
@pytest.mark.parametrize("place", ["disk", "s3"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_gives_the_same_answers(
    layout: Layout,
    place: str,
    engine: Any,
    tmp_path: Path,
    s3: S3Server,
    scenes: list[dict[str, Any]],
    answers: dict[str, dict[str, tuple[Any, ...]]],
) -> None:
    layout.write(tmp_path / "in", scenes)
    spec = engine(tmp_path)
    if place == "s3":
        prefix = s3.fresh_prefix(layout.name)
        upload(s3, tmp_path / "in", f"{prefix}/in")
        spec |= {"storage": {"endpoint_url": s3.endpoint_url}}
        spec["input"]["url"], spec["output"]["url"] = f"{prefix}/in/", f"{prefix}/out"
    spec["output"]["chunk_rows"] = 40
    job = parse_spec(spec, "the test's spec")
    manifest = run_batch(job)
    assert (manifest.num_samples, manifest.num_rows, manifest.num_errors) == (NUM_SCENES,) * 2 + (0,)
    found = read_answers(job.output.url, job.storage)
    expected = answers.setdefault(engine.__name__, {row["id"]: found[layout.id_of(row["id"])] for row in scenes})
    assert found == {layout.id_of(name): answer for name, answer in expected.items()}


def read_answers(url: str, storage: StorageSpec) -> dict[str, tuple[Any, ...]]:
    """Sample id to what was answered; no id may come twice."""
    found: dict[str, tuple[Any, ...]] = {}
    for table in read_parts(url, storage, ["sample_id", *COMPARED]):
        for row in table.to_pylist():
            assert row["sample_id"] not in found
            found[row["sample_id"]] = tuple(row[name] for name in COMPARED)
    return found
