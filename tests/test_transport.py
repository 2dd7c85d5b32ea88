"""How chunks travel: what goes in comes out, images are not copied on arrival, and nothing stays behind."""

import psutil
import pyarrow as pa
import pytest

from pipeline.records import EncodedImage, Task
from pipeline.transport import from_batch, from_batches, to_batch


def make_task(name: str, *images: bytes) -> Task:
    return Task(name, "p", "auto", tuple(EncodedImage(2, 3, data) for data in images), ({"role": "user"},))


@pytest.mark.parametrize("images", [(), (b"one",), (b"one", b"", b"three" * 1000)])
def test_from_batch_gives_what_to_batch_took(images: tuple[bytes, ...]) -> None:
    task = from_batch(to_batch(make_task("a", *images)))
    assert (task.sample_id, task.messages) == ("a", ({"role": "user"},))
    assert [bytes(image.data) for image in task.images] == list(images)


def test_from_batches_of_several_rows_gives_each_its_own_images() -> None:
    batch = pa.concat_tables(
        [to_batch(make_task("a", b"1", b"2")), to_batch(make_task("b")), to_batch(make_task("c", b"3"))]
    )
    for whole in (batch, batch.combine_chunks()):
        found = {task.sample_id: [bytes(image.data) for image in task.images] for task in from_batches(whole)}
        assert found == {"a": [b"1", b"2"], "b": [], "c": [b"3"]}
        for row, name in enumerate("abc"):
            task = from_batch(whole.slice(row, 1))
            assert (task.sample_id, [bytes(image.data) for image in task.images]) == (name, found[name])


def test_to_batch_one_image_shared_by_prompts_travels_once() -> None:
    image = EncodedImage(2, 3, b"x" * 1_000_000)
    tasks = [Task("a", name, "auto", (image,)) for name in "pqrst"]
    assert to_batch(tasks).nbytes < 1_100_000


def test_from_batch_images_stay_in_the_batch() -> None:
    batch = to_batch(make_task("a", b"x" * 1000))
    (held,) = (buffer for buffer in batch.column("beside").chunk(0).values.buffers() if buffer and buffer.size >= 1000)
    (image,) = from_batch(batch).images
    assert pa.py_buffer(image.data).address == held.address


def test_to_batch_leaves_nothing_behind() -> None:
    """pyarrow keeps every memoryview that `pa.array` was given; a reader would grow by each chunk."""
    process = psutil.Process()
    data = [bytes([n]) * 20_000_000 for n in range(2)]
    del data
    before = process.memory_info().rss
    for n in range(20):
        to_batch(make_task("a", bytes([n]) * 20_000_000))
    assert process.memory_info().rss - before < 120_000_000
