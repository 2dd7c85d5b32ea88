"""The files of a version: one schema for all parts, row groups of an even size, folders of partitions.

What a file holds, and where its row groups end, depends on the parts and the options alone, so that whoever writes it
writes the same. Rows wait in memory for their row group; files grow on the local disk, without a name, until they are
put into the target in one step.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from typing import Any, BinaryIO, cast
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import JobError, SpecError
from pipeline.publish.index import FilePlan, PartsIndex
from pipeline.publish.parts import Footer, Part, Source, fetch_parts, plain, read_batches

OPEN_FILES = 32
"""Partitions that are written in one pass over the parts."""
BUFFERED_BYTES = 128 << 20
"""Of rows that wait for their row groups, over all open files."""
MAX_GROUP_BYTES = 32 << 20
MAX_GROUP_ROWS = 1 << 20
PIECES_AT_ONCE = 64
"""Tables that wait are joined: a small one costs more than its rows."""
NULL_FOLDER = "__HIVE_DEFAULT_PARTITION__"
MAX_FOLDER_BYTES = 255
"""What disks allow a name."""


def merge_schemas(known: pa.Schema | None, footer: Footer) -> pa.Schema:
    """The schema that holds both, without a loss; raises JobError that names the part."""
    schema = pa.schema([field.with_type(_wide_type(field.type)) for field in footer.schema])
    if known is None or known.equals(schema):
        return schema
    try:
        if known.names != schema.names:
            raise pa.ArrowInvalid(f"it has the columns {', '.join(schema.names)}")
        return pa.schema([_merge_fields(*pair) for pair in zip(known, schema, strict=True)])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise JobError(f"{footer.part.url} does not fit the parts before it: {error}.") from error


def _merge_fields(known: pa.Field, other: pa.Field) -> pa.Field:
    nullable = known.nullable or other.nullable
    if known.type != other.type:
        fields = [field.with_type(_plain_type(field.type)) for field in (known, other)]
        merged = pa.unify_schemas([pa.schema([one]) for one in fields], promote_options="permissive").field(0)
        if pa.types.is_floating(merged.type) and any(pa.types.is_integer(one.type) for one in fields):
            raise pa.ArrowInvalid(f"column {known.name!r} has whole numbers in one and {merged.type} in the other")
        known = merged
    return known.with_nullable(nullable)


def _wide_type(kind: pa.DataType) -> pa.DataType:
    """The values of all parts together may be more than a small index can count."""
    return pa.dictionary(pa.int32(), kind.value_type, kind.ordered) if pa.types.is_dictionary(kind) else kind


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


@dataclass
class Partitions:
    """The values of the column to partition by, numbered as they are met; without a column there is one: None."""

    column: str | None
    limit: int
    numbers: dict[Any, int] = field(default_factory=dict)

    def number(self, footer: Footer) -> dict[int, int]:
        """A part's rows by partition; raises SpecError for a column, or values, that cannot be folders."""
        if self.column is not None:
            self._check(footer.schema.field(self.column).type, footer.rows_by_value)
        for value in footer.rows_by_value:
            self.numbers.setdefault(value, len(self.numbers))
        if len(self.numbers) > self.limit:
            raise SpecError(
                f"--partition-by: column {self.column!r} has more than {self.limit} different values. Choose a column "
                "with fewer, or raise --max-partitions; each value has a folder, and at least one file."
            )
        return {self.numbers[value]: rows for value, rows in footer.rows_by_value.items()}

    def _check(self, kind: pa.DataType, values: dict[Any, int]) -> None:
        plain_type = _plain_type(kind)
        tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean)
        if not any(test(plain_type) for test in (*tests, pa.types.is_date, pa.types.is_null)):
            raise SpecError(
                f"--partition-by: column {self.column!r} is {kind}; text, whole numbers, booleans and dates can name "
                "folders."
            )
        for value in values:
            if value in ("", NULL_FOLDER) or len(self.folder_of(value).encode()) > MAX_FOLDER_BYTES:
                shown = repr(value) if len(str(value)) < 50 else f"a value of {len(str(value))} characters"
                raise SpecError(f"--partition-by: column {self.column!r} holds {shown}, which cannot name a folder.")

    def folder_of(self, value: Any) -> str:
        """`column=value/` as Hive writes it; nothing without a column."""
        if self.column is None:
            return ""
        text = str(value).lower() if isinstance(value, bool) else str(value)
        return f"{_escape(self.column)}={NULL_FOLDER if value is None else _escape(text)}/"


def _escape(text: str) -> str:
    """Url-quoted as Hive and Spark read it: for them each %XX is a character, so what is not ASCII stays as it is."""
    return "".join(char if char.isprintable() and not char.isascii() else quote(char, safe="") for char in text)


def json_value(value: Any) -> Any:
    """A partition's value as a manifest holds it."""
    return value.isoformat() if isinstance(value, date) else value


class GroupedWriter:
    """One Parquet file on the local disk, written in row groups of about `group_bytes` of rows in memory."""

    def __init__(self, schema: pa.Schema, group_bytes: int) -> None:
        self._group_bytes = group_bytes
        self._small: list[pa.Table] = []
        self._waiting: list[pa.Table] = []
        self._num_bytes = self._num_rows = self.total_rows = 0
        with _told_of_disk():
            self._file = cast(BinaryIO, tempfile.TemporaryFile(prefix="r4b-publish-"))  # noqa: SIM115
            self._writer = pq.ParquetWriter(self._file, schema, compression="zstd")

    def add(self, table: pa.Table) -> None:
        self._small.append(table)
        if len(self._small) == PIECES_AT_ONCE:
            self._waiting.append(_joined(self._small))
            self._small = []
        self._num_bytes += table.nbytes
        self._num_rows += table.num_rows
        self.total_rows += table.num_rows
        if self._num_bytes >= self._group_bytes or self._num_rows >= MAX_GROUP_ROWS:
            self._write_group()

    def _write_group(self) -> None:
        if self._num_rows:
            table = pa.concat_tables([*self._waiting, *self._small]).unify_dictionaries()
            with _told_of_disk():
                self._writer.write_table(table, row_group_size=table.num_rows)
        self._small, self._waiting, self._num_bytes, self._num_rows = [], [], 0, 0

    def finish(self) -> BinaryIO:
        """The complete file; it is gone after `close`."""
        self._write_group()
        with _told_of_disk():
            self._writer.close()
        return self._file

    def close(self) -> None:
        with suppress(OSError):
            self._writer.close()
        self._file.close()


def _joined(tables: list[pa.Table]) -> pa.Table:
    try:
        return pa.concat_tables(tables).combine_chunks()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):  # a type that Arrow cannot join
        return pa.concat_tables(tables)


@contextmanager
def _told_of_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JobError(
            f"No file can be made in {tempfile.gettempdir()}: {error}. TMPDIR names another place."
        ) from error


@dataclass(frozen=True)
class Writing:
    """How files are written: `schema` is theirs, with the column to partition by and with the footer's metadata."""

    source: Source
    schema: pa.Schema
    partitions: Partitions
    put: Callable[[FilePlan, BinaryIO], None]
    """Takes a complete file."""
    on_rows: Callable[[int], None]

    def write(self, index: PartsIndex, plans: Mapping[int, FilePlan]) -> None:
        """Write the files that are planned and not there: a pass over the parts for each `OPEN_FILES` partitions."""
        group_bytes = min(MAX_GROUP_BYTES, BUFFERED_BYTES // min(OPEN_FILES, max(1, len(self.partitions.numbers))))
        for first in range(0, len(self.partitions.numbers), OPEN_FILES):
            writers: dict[int, GroupedWriter] = {}
            try:
                self._write_pass(index, plans, first, lambda: GroupedWriter(self.file_schema, group_bytes), writers)
            finally:
                for writer in writers.values():
                    writer.close()

    def _write_pass(
        self,
        index: PartsIndex,
        plans: Mapping[int, FilePlan],
        first: int,
        open_writer: Callable[[], GroupedWriter],
        writers: dict[int, GroupedWriter],
    ) -> None:
        placings = ((one.part, one) for one in index.placings(first, first + OPEN_FILES - 1))
        for (part, placing), file in fetch_parts(self.source, placings):
            for batch in read_batches(part, file, placing.num_rows):
                for partition, rows in self._split(part, batch, list(placing.files)):
                    file_id = placing.files[partition]
                    if file_id not in writers:
                        writers[file_id] = open_writer()
                    writers[file_id].add(rows)
                    self.on_rows(rows.num_rows)
            for file_id in placing.files.values():
                if plans[file_id].last_rank == placing.rank:
                    self._finish(plans[file_id], writers.pop(file_id))

    def _finish(self, plan: FilePlan, writer: GroupedWriter) -> None:
        with closing(writer):
            if writer.total_rows != plan.num_rows:
                raise JobError(
                    f"A file has {writer.total_rows} rows where {plan.num_rows} are due; nothing is published."
                )
            self.put(plan, writer.finish())

    def write_empty(self, plan: FilePlan) -> None:
        """A file without rows, so that readers find the columns."""
        self._finish(plan, GroupedWriter(self.file_schema, MAX_GROUP_BYTES))

    @property
    def file_schema(self) -> pa.Schema:
        """Of each file: without the column that its folder names."""
        column = self.partitions.column
        return self.schema if column is None else self.schema.remove(self.schema.get_field_index(column))

    def _split(self, part: Part, batch: pa.RecordBatch, wanted: list[int]) -> Iterator[tuple[int, pa.Table]]:
        """The rows of each partition that is wanted, in the files' schema."""
        column = self.partitions.column
        table = pa.Table.from_batches([batch]).replace_schema_metadata(None)
        try:
            table = table if column is None else table.drop_columns([column])
            table = table if table.schema.equals(self.file_schema) else table.cast(self.file_schema)
        except (pa.ArrowException, ValueError) as error:
            raise JobError(f"{part.url} holds a value that does not fit the other parts: {error}.") from error
        if column is None:
            yield 0, table
            return
        values = plain(batch.column(column)).dictionary_encode(null_encoding="encode")
        places = {self.partitions.numbers[value]: n for n, value in enumerate(values.dictionary.to_pylist())}
        for partition in wanted:
            if partition in places:
                yield partition, _rows_where(table, pc.equal(values.indices, places[partition]))


def _rows_where(table: pa.Table, mask: pa.Array) -> pa.Table:
    try:
        return table.filter(mask)
    except pa.ArrowNotImplementedError:  # Arrow cannot filter columns of every type
        rows = [table.slice(row, 1) for row, taken in enumerate(mask.to_pylist()) if taken]
        return pa.concat_tables(rows or [table.slice(0, 0)]).combine_chunks()
