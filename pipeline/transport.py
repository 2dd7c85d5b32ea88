"""How chunks travel between Ray Data's stages: a row each, pickled, with their images beside the pickle.

So an engine's actor reads images where Ray holds them, in memory that all processes of a machine share.
"""

import pickle
from collections.abc import Iterator
from typing import Any

import pyarrow as pa


def to_batch(item: Any) -> pa.Table:
    """A Ray Data batch of one row: the pickled `item`, and beside it the images in it."""
    beside: list[pickle.PickleBuffer] = []
    data = pickle.dumps(item, protocol=5, buffer_callback=beside.append)
    buffers = pa.array([[buffer.raw() for buffer in beside]], pa.list_(pa.large_binary()))
    return pa.table({"item": pa.array([data], pa.large_binary()), "beside": buffers})


def from_batch(batch: pa.Table) -> Any:
    """The item of a batch that `to_batch` made; its images stay where Ray holds them."""
    (item,) = from_batches(batch)
    return item


def from_batches(batch: pa.Table) -> Iterator[Any]:
    """The items of any number of such batches in one."""
    for data, beside in zip(batch.column("item"), batch.column("beside"), strict=True):
        yield pickle.loads(data.as_buffer(), buffers=[buffer.as_buffer() for buffer in beside])
