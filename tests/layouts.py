"""The same scenes in every layout that a dataset may have: what `input.url` points to is the only difference."""

import io
import json
import struct
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.demo import scene_rows
from tests.builders import write_shard
from tests.s3_server import S3Server

ROWS_PER_SHARD = 100


@dataclass(frozen=True)
class Layout:
    """One way to keep a dataset. `write` puts shards of these rows into a folder."""

    name: str
    format: str
    write: Callable[..., None]
    id_of: Callable[[str], str] = lambda name: name
    """The documented sample id of a scene."""


def scene_samples(num_rows: int) -> list[dict[str, Any]]:
    """Rows of id, image (bytes), question, kind, truth."""
    rows: list[dict[str, Any]] = scene_rows(0, num_rows).to_pylist()
    return [{**row, "image": row["image"]["bytes"]} for row in rows]


def _shards(rows: list[dict[str, Any]], rows_per_shard: int) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    for first in range(0, len(rows), rows_per_shard):
        yield f"{first // rows_per_shard:05d}", rows[first : first + rows_per_shard]


def _write_images(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        (folder / f"{row['id']}.png").write_bytes(row["image"])


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("question", "kind", "truth")}


def _write_parquet(image: Callable[[dict[str, Any]], Any], kind: pa.DataType) -> Callable[..., None]:
    def write(folder: Path, rows: list[dict[str, Any]], rows_per_shard: int = ROWS_PER_SHARD) -> None:
        for name, some in _shards(rows, rows_per_shard):
            columns: dict[str, Any] = {"id": [row["id"] for row in some]}
            columns |= {fact: [row[fact] for row in some] for fact in _facts(some[0])}
            columns["image"] = pa.array([image(row) for row in some], kind)
            write_shard(folder / f"{name}.parquet", pa.table(columns), row_group_size=30)

    return write


def _write_parquet_url(folder: Path, rows: list[dict[str, Any]]) -> None:
    _write_images(folder / "pictures", rows)
    _write_parquet(lambda row: f"pictures/{row['id']}.png", pa.string())(folder, rows)


def _write_jsonl(folder: Path, rows: list[dict[str, Any]], rows_per_shard: int = ROWS_PER_SHARD) -> None:
    _write_images(folder / "pictures", rows)
    for name, some in _shards(rows, rows_per_shard):
        lines = [{"id": row["id"], "image": f"pictures/{row['id']}.png", **_facts(row)} for row in some]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_folder(folder: Path, rows: list[dict[str, Any]]) -> None:
    _write_images(folder, rows)
    for row in rows:
        (folder / f"{row['id']}.json").write_text(json.dumps(_facts(row)))


def _write_tar(packed: str) -> Callable[..., None]:
    def write(folder: Path, rows: list[dict[str, Any]], rows_per_shard: int = ROWS_PER_SHARD) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, some in _shards(rows, rows_per_shard):
            members = [(f"{row['id']}.{end}", data) for row in some for end, data in _members(row).items()]
            (folder / f"{name}.tar{packed and '.' + packed}").write_bytes(tar_bytes(members, packed))

    return write


def _members(row: dict[str, Any]) -> dict[str, bytes]:
    return {"png": row["image"], "json": json.dumps(_facts(row)).encode()}


def tar_bytes(members: Iterable[tuple[str, bytes]], packed: str = "") -> bytes:
    """A tar of these files; `packed` is "" or "gz"."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{packed}") as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LAYOUTS = (
    Layout("parquet-bytes", "parquet", _write_parquet(lambda row: row["image"], pa.binary())),
    Layout("parquet-struct", "parquet", _write_parquet(lambda row: {"bytes": row["image"], "path": None}, STRUCT)),
    Layout("parquet-url", "parquet", _write_parquet_url),
    Layout("tar", "webdataset", _write_tar("")),
    Layout("tar-gz", "webdataset", _write_tar("gz")),
    Layout("jsonl", "jsonl", _write_jsonl),
    Layout("folder", "images", _write_folder, lambda name: f"{name}.png"),
)


def upload(server: S3Server, folder: Path, url: str) -> None:
    """All files of a folder to the same names below a URL."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            server.put(f"{url}/{path.relative_to(folder)}", path.read_bytes())


def write_tar_index(path: Path) -> None:
    """An index beside a tar as Megatron-Energon writes it: where each sample begins, and where the last one ends."""
    offsets: dict[str, int] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            offsets.setdefault(member.name.partition(".")[0], member.offset)
        end = archive.offset
    path.with_name(path.name + ".idx").write_bytes(struct.pack(f"<{len(offsets) + 1}Q", *offsets.values(), end))
