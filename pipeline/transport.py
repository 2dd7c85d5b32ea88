"""How chunks travel between Ray Data's stages: a row each, pickled, with their images beside the pickle.

So an engine's actor reads images where Ray holds them, in memory that all processes of a machine share.
"""

import pickle
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa


def to_batch(item: Any) -> pa.Table:
    """A Ray Data batch of one row: the pickled `item`, and beside it the images in it."""
    beside: list[pickle.PickleBuffer] = []
    data = pickle.dumps(item, protocol=5, buffer_callback=beside.append)
    images = [buffer.raw() for buffer in beside]
    ends = pa.array([0, *accumulate(image.nbytes for image in images)], pa.int64())
    # pa.array() would copy twice, and pyarrow 26.0.1 never frees a memoryview that it was given so.
    joined = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(images), [None, ends.buffers()[1], pa.py_buffer(b"".join(images))]
    )
    column = pa.ListArray.from_arrays(pa.array([0, len(images)], pa.int32()), joined)
    return pa.table({"item": pa.array([data], pa.large_binary()), "beside": column})


def from_batch(batch: pa.Table) -> Any:
    """The item of a batch that `to_batch` made; its images stay where Ray holds them."""
    (item,) = from_batches(batch)
    return item


def from_batches(batch: pa.Table) -> Iterator[Any]:
    """The items of any number of such batches in one."""
    for part in batch.to_batches():
        items, beside = part.column("item"), part.column("beside")
        for row in range(part.num_rows):
            yield pickle.loads(items[row].as_buffer(), buffers=_images_of(beside, row))


def _images_of(beside: pa.ListArray, row: int) -> list[pa.Buffer]:
    """One row's images, as places in the array's own memory: a scalar would be a copy."""
    first, last = beside.offsets[row].as_py(), beside.offsets[row + 1].as_py()
    if first == last:
        return []
    images = beside.values
    _, places, data = images.buffers()
    ends = pa.Array.from_buffers(pa.int64(), images.offset + last + 1, [None, places])[images.offset + first :]
    return [data.slice(start, end - start) for start, end in pairwise(ends.to_pylist())]
