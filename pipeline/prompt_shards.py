"""Prompts kept in object storage beside the images: one prompt shard, by sample id.

A row whose sample_id can be read is kept, whatever else is wrong with it: it becomes an error row of its sample.
Rows that belong to no sample are counted. A sample's prompts keep the order of the shard, and no two of them have the
same prompt_id. Columns that no prompt has are passed over.
Not covered: what a prompt may be (`pipeline.prompt_rows`), which prompt shard belongs to which shard of images, and
samples that have no prompt.
"""

import io
import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SampleError, SpecError
from pipeline.formats.jsonlines import COMPRESSIONS, REQUEST_BYTES, compression_of, iter_json_rows
from pipeline.prompt_rows import PromptRow, show_value, to_prompt
from pipeline.records import valid_text
from pipeline.spec import StorageSpec
from pipeline.storage import open_store

JSON_ENDINGS = (".jsonl", ".ndjson")
PARQUET_ENDINGS = (".parquet", ".pq")
DATA_ENDINGS = (*JSON_ENDINGS, *PARQUET_ENDINGS, ".tar", ".tgz", *COMPRESSIONS)
MAX_SHARD_BYTES = 512 << 20
UNPACKED = 4
"""A table may hold this many times the bytes that its file may have: compressed files grow."""
ROW_BYTES = 250
"""What a row costs beside its text and its id: a million rows with 197 MB of those took 440 MB."""
MAX_EXAMPLES = 10
PARQUET_BATCH = 1024
SMALLER_SHARDS = "keep the prompts in smaller shards, one beside each shard of the input (prompts.shape: aligned)"

Row = Mapping[str, Any] | SampleError


class PromptTable:
    """All prompts of one shard. `unreadable_examples` tell of some of the `num_unreadable` rows that have no sample.

    Rows are JSON in one buffer, and each knows the row of its sample before it: a Python object for each would take
    several times the memory.
    """

    def __init__(self) -> None:
        self.num_unreadable = 0
        self.unreadable_examples: tuple[str, ...] = ()
        self._last_rows: dict[str, int] = {}
        self._previous_rows = array("q")
        self._ends = array("Q")
        self._records = bytearray()
        self._num_id_bytes = 0

    @property
    def num_rows(self) -> int:
        return len(self._ends)

    @property
    def num_bytes(self) -> int:
        """About the memory that it takes."""
        return len(self._records) + self._num_id_bytes + self.num_rows * ROW_BYTES

    def of(self, sample_id: str) -> tuple[PromptRow, ...]:
        """The sample's prompts in the shard's order; ids are compared as the output writes them."""
        return tuple(_unpack(self._record(row)) for row in self._rows_of(valid_text(sample_id)))

    def keys(self) -> Iterator[tuple[str, str]]:
        """(sample_id, prompt_id) of all rows, each once, sample by sample."""
        for sample_id in self._last_rows:
            for row in self._rows_of(sample_id):
                yield sample_id, self._record(row)[0]

    def _rows_of(self, sample_id: str) -> list[int]:
        rows = []
        row = self._last_rows.get(sample_id, -1)
        while row >= 0:
            rows.append(row)
            row = self._previous_rows[row]
        return rows[::-1]

    def _record(self, row: int) -> Any:
        start = self._ends[row - 1] if row else 0
        return json.loads(self._records[start : self._ends[row]].decode())

    def _add(self, sample_id: str, prompt: PromptRow) -> None:
        if sample_id not in self._last_rows:
            self._num_id_bytes += len(sample_id)
        self._previous_rows.append(self._last_rows.get(sample_id, -1))
        self._last_rows[sample_id] = self.num_rows
        self._records += _pack(prompt)
        self._ends.append(len(self._records))

    def _count_unreadable(self, message: str) -> None:
        self.num_unreadable += 1
        if len(self.unreadable_examples) < MAX_EXAMPLES:
            self.unreadable_examples += (message,)


_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one for each row


def _pack(prompt: PromptRow) -> bytes:
    message = prompt.error.message if prompt.error else None
    record = [prompt.prompt_id, prompt.messages, prompt.thinking_mode, prompt.sampling, message]
    return _encoder.encode(record).encode()


def _unpack(record: Any) -> PromptRow:
    prompt_id, messages, thinking_mode, sampling, message = record
    error = None if message is None else SampleError("prompt_invalid", message)
    return PromptRow(prompt_id, tuple(messages), thinking_mode, sampling, error)


def stem_of(url: str) -> str:
    """The name without the endings that say how data is kept: `a/00017.tar.gz` is `00017`."""
    name = url.rpartition("/")[2]
    while ending := next((one for one in DATA_ENDINGS if name.lower().endswith(one) and name.lower() != one), None):
        name = name[: -len(ending)]
    return name


def read_prompt_table(
    url: str, version: str | None, storage: StorageSpec, max_bytes: int = MAX_SHARD_BYTES
) -> PromptTable:
    """Read a whole prompt shard; raises SpecError if it is no such thing, gone, damaged or too large.

    Raises JobError where the store fails, and where the shard is not of this version.
    """
    read_rows = _row_reader(url)
    store = open_store(url, storage)
    info = store.stat(url)
    if info is None:
        raise SpecError(f"prompts.url: there is no file {url}.")
    if info.size > max_bytes:
        raise SpecError(f"prompts.url: {url} has {info.size} bytes, the limit is {max_bytes}; {SMALLER_SHARDS}.")
    try:
        with store.open(url, version) as file:
            table = _fill_table(read_rows(file, url), url, max_bytes * UNPACKED)
    except (pa.ArrowException, OSError) as error:
        raise SpecError(f"prompts.url: {url} cannot be read: {error}") from error
    if table.num_unreadable and not table.num_rows:
        raise SpecError(f"prompts.url: no row of {url} has a usable sample_id. {table.unreadable_examples[0]}")
    return table


def _row_reader(url: str) -> Callable[[BinaryIO, str], Iterator[Row]]:
    name = url.lower()
    if name.endswith(PARQUET_ENDINGS):
        return _parquet_rows
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    if name.removesuffix(compression).endswith(JSON_ENDINGS):
        return _json_rows
    raise SpecError(
        f"prompts.url: {url} is no prompt shard; its name must end in {', '.join(JSON_ENDINGS)} "
        f"(or one of these and {', '.join(COMPRESSIONS)}), or {' or '.join(PARQUET_ENDINGS)}."
    )


def _fill_table(rows: Iterator[Row], url: str, max_bytes: int) -> PromptTable:
    table, keys = PromptTable(), set[str]()
    shard_name = valid_text(url.rpartition("/")[2])
    for number, row in enumerate(rows):
        _add_row(table, keys, row, number, shard_name)
        if table.num_bytes > max_bytes:
            raise SpecError(f"prompts.url: {url} holds more than {max_bytes} bytes; {SMALLER_SHARDS}.")
    return table


def _json_rows(file: BinaryIO, url: str) -> Iterator[Row]:
    for one in iter_json_rows(file, compression_of(url)):
        row = one.row
        if isinstance(row, SampleError) and row.error_type == "shard_damaged":  # nobody knows which prompts are lost
            raise SpecError(f"prompts.url: {url} cannot be read. {row.message}")
        if row is not None:
            yield row


def _parquet_rows(file: BinaryIO, url: str) -> Iterator[Row]:
    # Arrow asks for each column of each row group by itself, and they may be small.
    with io.BufferedReader(cast(io.RawIOBase, file), REQUEST_BYTES) as buffered:
        shard = pq.ParquetFile(buffered, pre_buffer=False)
        _check_columns(shard.schema_arrow, url)
        names = [name for name in COLUMNS if name in shard.schema_arrow.names]
        for batch in shard.iter_batches(PARQUET_BATCH, columns=names, use_threads=False):  # see `records.read_part`
            for row in _batch_to_rows(batch):
                sampling = row.get("sampling")
                if isinstance(sampling, dict):  # a struct has every key in every row
                    row["sampling"] = {name: value for name, value in sampling.items() if value is not None}
                yield row


def _batch_to_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:  # Arrow reads such bytes, and one of them would take the whole batch along
        for index in range(batch.num_rows):
            yield {name: _value_or_error(batch.column(name)[index]) for name in batch.schema.names}
    else:
        yield from rows


def _value_or_error(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _check_columns(schema: pa.Schema, url: str) -> None:
    for wanted in (("sample_id",), ("prompt_id",), ("text", "messages")):
        if not set(wanted) & set(schema.names):
            there = ", ".join(schema.names)
            raise SpecError(f"prompts.url: {url} has no column {' or '.join(wanted)}; it has {there}.")
    for name, (is_right, holds) in COLUMNS.items():
        kind = schema.field(name).type if name in schema.names else pa.null()
        if not (_is_text(kind) or is_right(kind) or (name != "sample_id" and pa.types.is_null(kind))):
            raise SpecError(f"prompts.url: column {name!r} of {url} is {kind}; it must hold {holds}.")


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list_of_structs(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and pa.types.is_struct(kind.value_type))


COLUMNS: Mapping[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "sample_id": (pa.types.is_integer, "strings or integers"),
    "prompt_id": (_is_text, "strings"),
    "text": (_is_text, "strings"),
    "messages": (_is_list_of_structs, "lists of structs, or strings of JSON"),
    "thinking_mode": (_is_text, "strings"),
    "sampling": (pa.types.is_struct, "structs, or strings of JSON"),
}
"""The columns of a prompt shard, and what each may hold in Parquet."""


def _add_row(table: PromptTable, keys: set[str], row: Row, number: int, shard_name: str) -> None:
    if isinstance(row, SampleError):
        table._count_unreadable(f"{shard_name}: {row.message}")
        return
    sample_id = _to_sample_id(row.get("sample_id"))
    if sample_id is None:
        why = f"sample_id is {show_value(row.get('sample_id'))}; it must be a string or an integer"
        table._count_unreadable(f"{shard_name}: Row #{number} belongs to no sample: {why}.")
    else:
        table._add(sample_id, to_prompt(row, sample_id, keys, number, shard_name))


def _to_sample_id(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return valid_text(value) if isinstance(value, str) and value else None
