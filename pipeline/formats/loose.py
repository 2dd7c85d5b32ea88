"""Columns that are Python values, as JSON has them, where others have Arrow's: their types are found by looking.

Types are taken from the first samples of the input and hold for all of it, because the parts must be of one schema. A
column that holds values of several types there is kept as JSON text.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.errors import SampleError, SpecError
from pipeline.formats.contract import Head, check_filter
from pipeline.records import valid_text
from pipeline.spec import JobSpec

HEAD_ROWS = 64
JSON_TEXT = {b"r4b.json": b"1"}
"""Marks a kept column whose values are written as JSON text."""


def make_head(job: JobSpec, rows: Sequence[Mapping[str, Any]], where_from: str) -> Head:
    """The types of the columns that the job keeps or filters by; raises SpecError for one that no row has."""
    names = list(dict.fromkeys([*job.output.keep_columns, *sorted(job.input.filter_columns)]))
    present = sorted({name for row in rows for name in row})
    for name in names:
        if rows and name not in present:
            key = "output.keep_columns" if name in job.output.keep_columns else "input.where"
            raise SpecError(
                f"{key}: none of the first {len(rows)} samples of {where_from} has a column {name!r}; "
                f"they have {', '.join(present) or 'none'}."
            )
    head = Head(pa.schema([_infer(name, [row.get(name) for row in rows]) for name in names]), tuple(rows))
    check_filter(job, where_from, head.schema)
    return head


def _infer(name: str, values: Sequence[Any]) -> pa.Field:
    try:
        clean = [_clean(value) for value in values]
        array = pa.array(clean)
    except UNFIT:
        return pa.field(name, pa.string(), metadata=JSON_TEXT)
    if pa.types.is_null(array.type):
        return pa.field(name, pa.string())
    if not _is_whole(array.type) or not _is_same(clean, array.to_pylist()):
        return pa.field(name, pa.string(), metadata=JSON_TEXT)
    return pa.field(name, array.type)


UNFIT = (pa.ArrowException, OverflowError, RecursionError)
"""Types that differ, an integer of more than 64 bits, lists in lists without end."""


def _is_whole(kind: pa.DataType, levels: int = 16) -> bool:
    """Whether a type is known through all its levels, as that of empty lists is not, and Parquet has so many."""
    fields = (kind.field(n).type for n in range(kind.num_fields))
    return levels > 0 and not pa.types.is_null(kind) and all(_is_whole(one, levels - 1) for one in fields)


def _is_same(value: Any, kept: Any) -> bool:
    """Whether Arrow kept a value whole: of 2.5 it makes 2, of "ab" a list, of true 1.0, and it drops unknown fields."""
    if isinstance(value, dict) and isinstance(kept, dict):
        return value.keys() <= kept.keys() and all(_is_same(one, kept[name]) for name, one in value.items())
    if isinstance(value, list) and isinstance(kept, list):
        return all(map(_is_same, value, kept))
    return (value == kept or value != value) and isinstance(value, bool) == isinstance(kept, bool)


def _clean(value: Any) -> Any:
    """Arrow takes no lone surrogates; empty objects have no Parquet type."""
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, list):
        return [_clean(one) for one in value]
    if isinstance(value, dict):
        return {valid_text(key): _clean(one) for key, one in value.items()} or None
    return value


def keep_row(columns: Mapping[str, Any], names: Sequence[str], schema: pa.Schema) -> pa.Table:
    """The named columns as one Arrow row of the head's types; raises SampleError for a value that does not fit."""
    arrays = [_keep_value(columns.get(name), schema.field(name)) for name in names]
    return pa.table(arrays, pa.schema([schema.field(name) for name in names])) if names else one_empty_row()


def _keep_value(value: Any, field: pa.Field) -> pa.Array:
    shown = "nested too deeply"
    try:
        value, shown = _clean(value), f"{value!r:.80}"
        if field.metadata == JSON_TEXT and value is not None:
            value = json.dumps(value, ensure_ascii=False)
        array = pa.array([value], field.type)
        if _is_same(value, array[0].as_py()):
            return array
    except UNFIT:
        pass  # said below, as for a value that Arrow changed
    message = f"The column {field.name!r} is {shown}, which is no {field.type}, as the first samples have it."
    raise SampleError("column_type", message)


def one_empty_row() -> pa.Table:
    """A row without columns."""
    return pa.table({"": [None]}).select([])


def row_passes(job: JobSpec, columns: Mapping[str, Any], schema: pa.Schema) -> bool:
    """Whether `input.where` holds for this row; raises SampleError for a value that does not fit."""
    if job.input.filter is None:
        return True
    names = sorted(job.input.filter_columns)
    return bool(keep_row(columns, names, schema).filter(job.input.filter).num_rows)
