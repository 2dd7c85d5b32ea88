"""`input`: where the samples come from, and which of them are taken."""

from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pydantic
from pydantic import Field

from pipeline.spec.base import NonEmpty, Section

InputFormat = Literal["parquet", "webdataset", "jsonl", "images"]


class Columns(Section):
    """Names of the input's columns. `id: null` numbers the samples `<shard>#<index>`; a list is several images."""

    id: NonEmpty | None = "id"
    image: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)] = "image"

    @property
    def images(self) -> list[str]:
        return [self.image] if isinstance(self.image, str) else list(self.image)


class SampleSpec(Section):
    """A fraction of the samples, drawn by a hash of the seed and of each sample's id."""

    fraction: Annotated[float, Field(gt=0, le=1)]
    seed: int = 0


class InputSpec(Section):
    """Where the samples come from."""

    url: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
    format: Literal["auto", InputFormat] = "auto"
    columns: Columns = Columns()
    limit: Annotated[int, Field(ge=1)] | None = None
    sample: SampleSpec | None = None
    where: list[Any] | None = None

    @pydantic.field_validator("sample", mode="before")
    @classmethod
    def _fraction_alone(cls, value: Any) -> Any:
        return {"fraction": float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @pydantic.field_validator("where")
    @classmethod
    def _must_be_filter(cls, where: list[Any] | None) -> list[Any] | None:
        if where is not None:
            _conditions(where)
        return where

    @property
    def urls(self) -> list[str]:
        return [self.url] if isinstance(self.url, str) else list(self.url)

    @property
    def filter(self) -> pc.Expression | None:
        """`where` as an Arrow expression."""
        if self.where is None:
            return None
        return pq.filters_to_expression([[tuple(one) for one in group] for group in _conditions(self.where)])

    @property
    def filter_columns(self) -> frozenset[str]:
        return frozenset(one[0] for group in _conditions(self.where) for one in group) if self.where else frozenset()

    @property
    def selects(self) -> bool:
        """Whether samples of the input are left out on purpose."""
        return not (self.limit is None and self.sample is None and self.where is None)


OPERATORS = ("=", "==", "!=", "<", ">", "<=", ">=", "in", "not in")


def _conditions(where: list[Any]) -> list[list[list[Any]]]:
    """A filter in pyarrow's form: a list of conditions that all hold, or a list of such lists of which one holds."""
    groups = (
        [where] if where and all(isinstance(one, list) and one and isinstance(one[0], str) for one in where) else where
    )
    if where == []:
        raise ValueError("has no condition; leave the key out, or write [[column, operator, value], ...]")
    for group in groups:
        for one in group if isinstance(group, list) and group else [group]:
            if not (isinstance(one, list) and len(one) == 3 and isinstance(one[0], str)):
                raise ValueError('must be a list of [column, operator, value], such as [[width, ">", 200]]')
            if one[1] not in OPERATORS:
                raise ValueError(f"{one[1]!r} is no operator; allowed are {', '.join(OPERATORS)}")
            if isinstance(one[2], list) != (one[1] in ("in", "not in")) or isinstance(one[2], dict):
                raise ValueError(f"{one[0]} {one[1]}: in and not in take a list, the others one value")
            if one[2] is None:
                raise ValueError(f"{one[0]} {one[1]} null: a comparison with null holds for no sample")
            try:
                pa.scalar(one[2])
            except (pa.ArrowException, OverflowError) as error:
                raise ValueError(
                    f"{one[0]} {one[1]}: the values must be of one type, whole numbers of 64 bits"
                ) from error
    return groups
