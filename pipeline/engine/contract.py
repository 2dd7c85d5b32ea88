"""What every engine takes and gives.

The contract, tested on each engine by the same suite: a request gives one generation or raises; the same greedy
request gives the same generation; a request that cannot be answered raises SampleError and harms no other; after
EngineDiedError every request raises EngineDiedError.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.errors import SampleError
from pipeline.records import EncodedImage, Generation, Task
from pipeline.spec import SamplingSpec

MAX_IMAGES = 5
"""Images in one prompt, as R-4B's authors serve it."""


@dataclass(frozen=True)
class EngineRequest:
    """One prompt: messages as OpenAI writes them, whose `{"type": "image"}` parts take `images` in order."""

    messages: Sequence[Mapping[str, Any]]
    images: Sequence[EncodedImage] = ()
    thinking_mode: str = "auto"
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    priority: int = 0


class Engine(Protocol):
    """One engine, used from one event loop; requests run concurrently and are batched inside."""

    async def generate(self, request: EngineRequest) -> Generation:
        """Answer one request; raises SampleError for this request alone, EngineDiedError for good."""
        ...

    async def check(self) -> None:
        """Return once the engine has shown that it goes on; raises EngineDiedError. Never returns if it hangs."""
        ...

    def shutdown(self) -> None:
        """End the engine's processes."""
        ...


def task_to_request(task: Task, sampling: SamplingSpec) -> EngineRequest:
    """A batch row as a request; raises SampleError when its messages place another number of images than it has."""
    placed = sum(_is_image(part) for message in task.messages for part in _parts_of(message))
    messages = list(task.messages)
    if placed == 0 and task.images:
        last = max(index for index, message in enumerate(messages) if message["role"] == "user")
        content = [*({"type": "image"} for _ in task.images), *_parts_of(messages[last])]
        messages[last] = {**messages[last], "content": content}
    elif placed != len(task.images):
        raise SampleError(
            "images_misplaced", f"The messages have places for {placed} images, the sample has {len(task.images)}."
        )
    if task.sampling:
        sampling = SamplingSpec.model_validate({**sampling.model_dump(), **task.sampling})
    return EngineRequest(messages, task.images, task.mode_requested, sampling)


def _parts_of(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content: Any = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _is_image(part: Mapping[str, Any]) -> bool:
    return bool(part["type"] == "image")
