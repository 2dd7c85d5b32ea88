"""`r4b demo`: draw scenes into Parquet shards, run a real job on them with the small checkpoint, and show the result.

Not covered: anything that an ordinary job cannot do; the demo writes a spec and runs it.
"""

import io
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.errors import SpecError
from pipeline.report import Report, make_report, read_parts
from pipeline.scenes import KINDS, ask, draw_scene, make_scene
from pipeline.spec import JobSpec, StorageSpec, parse_spec
from pipeline.storage import LocalStore

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "r4b-shapes"
ROWS_PER_SHARD = 100

CPU_ENGINE_ARGS = {
    "dtype": "float32",  # greedy answers then do not depend on what shares a batch
    "enforce_eager": True,
    "skip_mm_profiling": True,
    "kv_cache_memory_bytes": 256 << 20,
}
"""vLLM arguments that start the small checkpoint quickly on a CPU."""


def scene_rows(first_seed: int, num_rows: int) -> pa.Table:
    """Rows of id, image, question, kind, truth: one question for each held-out scene, the kinds in turn."""
    rows = []
    for seed in range(first_seed, first_seed + num_rows):
        scene = make_scene(seed)
        question = ask(scene, KINDS[seed % len(KINDS)])
        buffer = io.BytesIO()
        draw_scene(scene).save(buffer, "PNG")
        rows.append(
            {
                "id": f"scene-{seed:06d}",
                "image": {"bytes": buffer.getvalue(), "path": f"scene-{seed:06d}.png"},
                "question": question.text,
                "kind": question.kind,
                "truth": question.answer,
            }
        )
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    text = {name: pa.string() for name in ("question", "kind", "truth")}
    return pa.Table.from_pylist(rows, pa.schema({"id": pa.string(), "image": image, **text}))


def write_shards(folder: Path, num_rows: int) -> None:
    """Parquet shards of up to ROWS_PER_SHARD scenes; a shard that is there already is left alone."""
    store = LocalStore()
    firsts = range(0, num_rows, ROWS_PER_SHARD)
    shards = {f"scenes-{first:06d}-{min(ROWS_PER_SHARD, num_rows - first)}.parquet": first for first in firsts}
    if other := {path.name for path in folder.glob("*.parquet")} - set(shards):
        raise SpecError(f"--output: {folder} holds {min(other)}, of a demo with other --rows; choose another --output.")
    for name, first in shards.items():
        sink = io.BytesIO()
        pq.write_table(scene_rows(first, min(ROWS_PER_SHARD, num_rows - first)), sink)
        store.put_if_absent(str(folder / name), sink.getvalue())


def demo_spec(folder: Path) -> JobSpec:
    """The demo's job; the same keys as in jobs/examples/shapes-demo.yaml."""
    if not (CHECKPOINT / "model.safetensors").is_file():
        raise SpecError(f"The small checkpoint is not at {CHECKPOINT}; run the demo from a clone of the repository.")
    data = {
        "name": "shapes-demo",
        "input": {"url": str(folder / "input") + "/"},
        "prompts": [{"id": "question", "template": "{{ question }}", "thinking_mode": "auto"}],
        "sampling": {"temperature": 0.0, "max_tokens": 256},
        "engine": {"model": str(CHECKPOINT), "num_gpus": 0, "max_num_seqs": 64, "args": CPU_ENGINE_ARGS},
        "output": {"url": str(folder / "output"), "chunk_rows": 20, "keep_columns": ["kind", "truth"]},
    }
    return parse_spec(data, "the demo's spec")


def prepare_demo(folder: Path, num_rows: int) -> JobSpec:
    """Write the shards and the spec into the folder."""
    job = demo_spec(folder)
    write_shards(folder / "input", num_rows)
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(exclude_unset=True), sort_keys=False))
    return job


def show_demo(job: JobSpec, seconds: float, num_generated: int, say: Callable[[str], None]) -> None:
    """Print where the parts are, the table and three rows."""
    report = make_report(job.output.url, StorageSpec(), truth="truth", kind="kind")
    say(f"\nParts: {job.output.url}/data/*.parquet ({report.num_parts} files)\n")
    for line in report_lines(report):
        say(line)
    if num_generated:
        say(f"\n{num_generated} rows in {seconds:.1f} s, engine start included: {num_generated / seconds:.1f} rows/s")
    say("\nThree rows:")
    for row in example_rows(job.output.url):
        say(f"\n  {row['sample_id']}  {row['kind']}  {row['mode_chosen']}, {row['completion_tokens']} tokens")
        if row["reasoning"] is not None:
            say(f"    thought: {row['reasoning']}")
        say(f"    answer:  {row['answer']}    (truth: {row['truth']})")


def report_lines(report: Report, with_truth: bool = True) -> list[str]:
    """Two small tables: by mode, and by kind of question where the report has kinds."""
    right = f"{'right':>8}" if with_truth else ""
    head = f"{'mode':<14}{'rows':>8}{'prompt tok':>12}{'image tok':>11}{'output tok':>12}{'thought tok':>13}{right}"
    lines = [head]
    for name, totals in [*sorted(report.modes.items()), ("all", report.total)]:
        rate = f"{totals.right / totals.rows:>8.1%}" if with_truth else ""
        lines.append(
            f"{name:<14}{totals.rows:>8}{totals.prompt_tokens:>12}{totals.image_tokens:>11}"
            f"{totals.completion_tokens:>12}{totals.reasoning_tokens:>13}{rate}"
        )
    if report.kinds:
        lines.append("")
    lines += [f"{kind:<14}{t.rows:>8} rows {t.right / t.rows:>8.1%} right" for kind, t in sorted(report.kinds.items())]
    return lines


def example_rows(output_url: str) -> list[dict[str, object]]:
    """A caption, a colour and a comparison, where the output has them."""
    found: dict[str, dict[str, object]] = {}
    for table in read_parts(output_url, StorageSpec()):
        for row in table.to_pylist():
            if row["kind"] in ("caption", "color", "compare"):
                found.setdefault(row["kind"], row)
    return [found[kind] for kind in sorted(found)]
