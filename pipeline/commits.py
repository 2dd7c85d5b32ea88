"""The commit protocol: how a chunk becomes visible exactly once, and how a job knows its own output.

A part is written in one atomic put-if-absent to its final name `data/<chunk_id>.parquet`: the first writer wins and a
lost race changes nothing, so retried tasks, zombie actors and a second driver cannot duplicate a row. The list of
parts is the only commit log. `_job.json` says what the parts were made with; `_manifest.json` and `_SUCCESS` appear
when every chunk of the plan is committed.
Compute is at-least-once, visibility exactly-once.
Not covered: generation, and removing parts of shards that changed.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version as package_version
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ahead import map_ahead
from pipeline.errors import JobError, ShardChangedError, SpecError
from pipeline.plan import part_url
from pipeline.records import SUMS, ChunkReport, GeneratedChunk, Retry, read_part, report_of, rows_to_table
from pipeline.spec import JobSpec, StorageSpec, fingerprint_of
from pipeline.storage import absolute_url, join_url, open_store
from pipeline.surveys import list_surveys

READS_AT_ONCE = 16
MAX_NAMED = 100
"""Damaged shards that a manifest names."""
PART_NAME = re.compile(r"([0-9a-f]{32})\.parquet")
FOOTER_NUMBERS = ("start", "stop", *(name for name in SUMS if name != "num_rows"))
JOB_FILE, MANIFEST_FILE, SUCCESS_FILE = "_job.json", "_manifest.json", "_SUCCESS"


@dataclass(frozen=True)
class Output:
    """An output URL together with the store and the fingerprint of the job that owns it."""

    job: JobSpec
    fingerprint: dict[str, str]
    """What decides an answer, by name (`spec.fingerprint_parts`)."""

    @property
    def url(self) -> str:
        return absolute_url(self.job.output.url)

    @property
    def fingerprint_hash(self) -> str:
        return fingerprint_of(self.fingerprint)

    def file(self, name: str) -> str:
        return join_url(self.url, name)


def claim_output(output: Output, force_new: bool = False) -> None:
    """Write `_job.json`, or check that the one that is there names the same fingerprint; raises SpecError."""
    store = open_store(output.url, output.job.storage)
    content = {
        "name": output.job.name,
        "fingerprint": output.fingerprint_hash,
        "made_with": output.fingerprint,
        "software_version": package_version("r4b"),
        "spec": output.job.model_dump(mode="json", exclude_unset=True),
    }
    data = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    try:
        if force_new:
            discard_output(output)
        if store.stat(output.file(JOB_FILE)) is None:
            store.put_if_absent(output.file(JOB_FILE), data)
        check_owner(output)
    except JobError as error:
        raise SpecError(f"output.url: {error}") from error


def check_owner(output: Output) -> None:
    """Raise SpecError if the output belongs to another job, or does so by now."""
    theirs = read_job_file(output.url, output.job.storage)
    if theirs["fingerprint"] != output.fingerprint_hash:
        raise SpecError(_refusal(output, theirs["made_with"]))


def _refusal(output: Output, theirs: dict[str, str]) -> str:
    lines = [f"output.url: {output.url} holds the parts of another job. What differs:"]
    for name in sorted(set(theirs) | set(output.fingerprint)):
        before, now = theirs.get(name), output.fingerprint.get(name)
        if before != now:
            lines.append(f"  {name}: was {_shorten(before)}\n  {' ' * len(name)}  now {_shorten(now)}")
    lines.append("Choose another output.url, or discard what is there with --force-new.")
    return "\n".join(lines)


def _shorten(text: str | None) -> str:
    return "absent" if text is None else text if len(text) <= 600 else text[:600] + " ..."


def read_job_file(output_url: str, storage: StorageSpec) -> dict[str, Any]:
    """`_job.json`; raises SpecError if this is no output of a job."""
    store, url = open_store(output_url, storage), join_url(output_url, JOB_FILE)
    if store.stat(url) is None:
        raise SpecError(f"{output_url} holds no job: there is no {JOB_FILE}.")
    try:
        content = json.loads(store.read(url))
        return {**content, "made_with": dict(content["made_with"]), "fingerprint": str(content["fingerprint"])}
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{url} is not a job file of this software.") from error


def discard_output(output: Output) -> None:
    """Remove what a job wrote at this URL, and nothing else."""
    store = open_store(output.url, output.job.storage)
    for name in (SUCCESS_FILE, MANIFEST_FILE):
        store.delete(output.file(name))
    drop_parts(output, committed_chunks(output))
    for url in list_surveys(output.job):
        store.delete(url)
    store.delete(output.file(JOB_FILE))


def drop_parts(output: Output, chunk_ids: Iterable[str]) -> None:
    """Delete these chunks' parts."""
    store = open_store(output.url, output.job.storage)
    for chunk_id in chunk_ids:
        store.delete(part_url(output.url, chunk_id))


def committed_chunks(output: Output) -> frozenset[str]:
    """The ids of all committed chunks: one listing."""
    store = open_store(output.url, output.job.storage)
    names = (info.url.rpartition("/")[2] for info in store.list(join_url(output.url, "data") + "/"))
    return frozenset(match[1] for name in names if (match := PART_NAME.fullmatch(name)))


def has_part(output: Output, chunk_id: str) -> bool:
    """Whether a chunk is committed at this moment."""
    url = part_url(output.url, chunk_id)
    return open_store(url, output.job.storage).stat(url) is not None


def commit_chunk(chunk: GeneratedChunk, output: Output) -> ChunkReport:
    """Make a chunk's rows visible, all at once; if another writer was first, report its part."""
    chunk_id = chunk.work.chunk.chunk_id
    store, url = open_store(output.url, output.job.storage), part_url(output.url, chunk_id)
    table = rows_to_table(chunk)
    if chunk.work.retry is not None:
        return _replace_errors(chunk, chunk.work.retry, table, output)
    report = report_of(chunk, table)
    if store.put_if_absent(url, _to_parquet(table, report, output)):
        return report
    return read_report(output, chunk_id)


def _replace_errors(chunk: GeneratedChunk, retry: Retry, redone: pa.Table, output: Output) -> ChunkReport:
    """Put the redone rows in the place of the error rows, in a part that is still the one that was read."""
    url = part_url(output.url, chunk.work.chunk.chunk_id)
    store = open_store(url, output.job.storage)
    try:
        with store.open(url, retry.part_version) as file:
            old = read_part(file)
    except ShardChangedError:  # another driver, or this task before Ray ran it again, has replaced it
        return read_report(output, chunk.work.chunk.chunk_id)
    both = pa.concat_tables([old.replace_schema_metadata(None), redone.cast(old.schema.remove_metadata())])
    order = list(range(old.num_rows))
    for index, row in enumerate(sorted(retry.rows)):
        order[row] = old.num_rows + index
    table = pa.concat_tables([both.slice(row, 1) for row in order])  # Arrow cannot `take` rows of every type
    report = report_of(chunk, table)
    if store.replace(url, _to_parquet(table, report, output), retry.part_version):
        return report
    return read_report(output, report.chunk_id)


def _to_parquet(table: pa.Table, report: ChunkReport, output: Output) -> bytes:
    footer = {
        "r4b.model": output.job.engine.model,
        "r4b.revision": output.job.engine.revision or "",
        "r4b.fingerprint": output.fingerprint_hash,
        "r4b.chunk_id": report.chunk_id,
        "r4b.shard": report.shard,
        "r4b.software_version": package_version("r4b"),
    }
    footer |= {f"r4b.{name}": str(getattr(report, name)) for name in FOOTER_NUMBERS}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(footer), sink, compression="zstd")
    return sink.getvalue()


def read_report(output: Output, chunk_id: str) -> ChunkReport:
    """The numbers of a committed part, from its footer alone."""
    url = part_url(output.url, chunk_id)
    try:
        with open_store(url, output.job.storage).open(url) as file:
            metadata = pq.ParquetFile(file).metadata
    except pa.ArrowException as error:
        raise JobError(f"{url} is not a readable Parquet file: {error}") from error
    footer = {key.decode(): value.decode() for key, value in (metadata.metadata or {}).items() if key[:4] == b"r4b."}
    if footer.get("r4b.fingerprint", output.fingerprint_hash) != output.fingerprint_hash:
        raise JobError(
            f"{url} was made with other settings than {JOB_FILE} says: another run is still writing here. "
            "Stop it, then start over with --force-new."
        )
    try:
        numbers: Any = {name: int(footer[f"r4b.{name}"]) for name in FOOTER_NUMBERS}
        return ChunkReport(chunk_id, footer["r4b.shard"], num_rows=metadata.num_rows, **numbers)
    except KeyError as error:
        raise JobError(f"{url} was not written by this software: its footer lacks {error}.") from error


def read_reports(output: Output, chunk_ids: Iterable[str]) -> Iterator[ChunkReport]:
    """The numbers of many parts, several footers at a time."""
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        yield from map_ahead(pool, lambda chunk_id: read_report(output, chunk_id), chunk_ids, READS_AT_ONCE)


def read_retry(output: Output, chunk_id: str) -> Retry:
    """Which rows of a part hold an error, tied to the part's present version."""
    url = part_url(output.url, chunk_id)
    store = open_store(url, output.job.storage)
    info = store.stat(url)
    if info is None:
        raise JobError(f"{url} is gone.")
    with store.open(url, info.version) as file:
        errors = read_part(file, ["error_type"]).column(0).to_pylist()
    return Retry(info.version, frozenset(row for row, error in enumerate(errors) if error is not None))


def count_errors(output: Output, chunk_ids: Iterable[str]) -> tuple[dict[str, int], list[str]]:
    """How often each `error_type` stands in these parts, and the first shards that were damaged."""
    counts: dict[str, int] = {}
    damaged: dict[str, None] = {}
    for chunk_id in chunk_ids:
        with open_store(output.url, output.job.storage).open(part_url(output.url, chunk_id)) as file:
            rows = read_part(file, ["shard", "error_type"]).to_pylist()
        for row in rows:
            if row["error_type"] is not None:
                counts[row["error_type"]] = counts.get(row["error_type"], 0) + 1
            if row["error_type"] == "shard_damaged" and len(damaged) < MAX_NAMED:
                damaged[row["shard"]] = None
    return counts, list(damaged)


def reopen_output(output: Output) -> None:
    """Take the marks of a finished job away before more chunks are added."""
    store = open_store(output.url, output.job.storage)
    for name in (SUCCESS_FILE, MANIFEST_FILE):
        store.delete(output.file(name))


def is_finished(output: Output) -> bool:
    """Whether every chunk of the last plan was committed."""
    return open_store(output.url, output.job.storage).stat(output.file(SUCCESS_FILE)) is not None


def finish_output(output: Output, manifest: str) -> None:
    """Say that every chunk of the plan is committed."""
    store = open_store(output.url, output.job.storage)
    store.put(output.file(MANIFEST_FILE), manifest.encode())
    store.put(output.file(SUCCESS_FILE), b"")
