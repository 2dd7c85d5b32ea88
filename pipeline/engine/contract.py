"""What every engine takes and gives.

The contract, tested on each engine by the same suite: a request gives one generation or raises; the same greedy
request gives the same generation; a request that cannot be answered raises SampleError and harms no other; after
EngineDiedError every request raises EngineDiedError.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.records import DecodedImage, Generation, Task
from pipeline.spec import SamplingSpec

MAX_IMAGES = 5
"""Images in one prompt, as R-4B's authors serve it."""


@dataclass(frozen=True)
class EngineRequest:
    """One prompt: messages as OpenAI writes them, whose `{"type": "image"}` parts take `images` in order."""

    messages: Sequence[Mapping[str, Any]]
    images: Sequence[DecodedImage] = ()
    thinking_mode: str = "auto"
    sampling: SamplingSpec = field(default_factory=SamplingSpec)
    priority: int = 0


class Engine(Protocol):
    """One engine, used from one event loop; requests run concurrently and are batched inside."""

    async def generate(self, request: EngineRequest) -> Generation:
        """Answer one request; raises SampleError for this request alone, EngineDiedError for good."""
        ...

    def shutdown(self) -> None:
        """End the engine's processes."""
        ...


def task_to_request(task: Task, sampling: SamplingSpec) -> EngineRequest:
    """A batch row as a request: an optional system message, then the images and the text as the user's."""
    content = [*({"type": "image"} for _ in task.images), {"type": "text", "text": task.text}]
    messages: list[Mapping[str, Any]] = [{"role": "user", "content": content}]
    if task.system is not None:
        messages.insert(0, {"role": "system", "content": task.system})
    return EngineRequest(messages, task.images, task.mode_requested, sampling)
