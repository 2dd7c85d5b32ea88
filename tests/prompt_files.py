"""Prompt shards for tests: rows, files of them in every format, and what is read back.

Not covered: what a row or a shard must be, which is `test_prompt_rows` and `test_prompt_shards`.
"""

import gzip
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.prompt_rows import PromptRow
from pipeline.prompt_shards import PromptTable, read_prompt_table
from pipeline.spec import StorageSpec

Row = Mapping[str, Any]

PARTS = 'must be {"type": "text", "text": ...} or {"type": "image"}'
"""What a message says of a part that is none."""


def to_bytes(rows: Sequence[Row | str], name: str) -> bytes:
    """The rows as a file of this name; a string is a line as it is. Parquet gets JSON strings for lists and objects."""
    if name.lower().endswith(("parquet", "pq")):
        flat = [{key: _flat(value) for key, value in row.items()} for row in rows if isinstance(row, Mapping)]
        names = {"sample_id": None, "prompt_id": None, "text": None} | dict.fromkeys(key for row in flat for key in row)
        return to_parquet(pa.table({key: [row.get(key) for row in flat] for key in names}))
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    data = "".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape")
    if name.endswith(".gz"):
        return gzip.compress(data)
    packed: bytes = pa.compress(data, codec="zstd", asbytes=True) if name.endswith(".zst") else data
    return packed


def _flat(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def to_parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=150)
    return file.getvalue()


def read_bytes(folder: Path, data: bytes, name: str = "p.parquet", **options: Any) -> PromptTable:
    (folder / name).write_bytes(data)
    return read_prompt_table(str(folder / name), None, StorageSpec(), **options)


def read_rows(folder: Path, rows: Sequence[Row | str], name: str = "p.jsonl", **options: Any) -> PromptTable:
    return read_bytes(folder, to_bytes(rows, name), name, **options)


def prompt(sample_id: Any = "s", prompt_id: Any = "p", **changes: Any) -> Row:
    """A good row; `changes` add or replace keys."""
    return {"sample_id": sample_id, "prompt_id": prompt_id, "text": "What is it?", **changes}


def messages_row(messages: Any, **changes: Any) -> Row:
    return {"sample_id": "s", "prompt_id": "p", "messages": messages, **changes}


def message_of(row: PromptRow) -> str:
    assert row.error is not None
    assert row.error.error_type == "prompt_invalid"
    assert (row.messages, row.thinking_mode, row.sampling) == ((), None, {})
    return row.error.message


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}
