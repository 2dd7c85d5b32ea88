"""Engines for tests: the real one on the small checkpoint, started once, and the simulated one, both in one loop."""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from jobs.demo import CHECKPOINT, CPU_ENGINE_ARGS
from pipeline.engine import Engine, EngineRequest, open_engine
from pipeline.records import EncodedImage, Generation
from pipeline.scenes import draw_scene, make_scene
from pipeline.spec import EngineSpec, SamplingSpec, SimulationSpec
from tests.builders import encode

T = TypeVar("T")

REAL_SPEC = EngineSpec(model=str(CHECKPOINT), num_gpus=0, max_num_seqs=64, args=CPU_ENGINE_ARGS)
SIMULATED_SPEC = EngineSpec(
    kind="simulated", model="sim", num_gpus=0, simulation=SimulationSpec(thinking_tokens=30, max_model_len=4096)
)


@dataclass
class RunningEngine:
    """An engine and the event loop that it lives in."""

    engine: Any
    loop: asyncio.AbstractEventLoop

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(coroutine)

    def generate(self, *requests: EngineRequest) -> list[Generation]:
        """All requests at once."""

        async def generate_all() -> list[Generation]:
            return list(await asyncio.gather(*(self.engine.generate(request) for request in requests)))

        return self.run(generate_all())


@contextmanager
def running_engine(spec: EngineSpec) -> Iterator[RunningEngine]:
    """Start an engine; end it afterwards."""
    loop = asyncio.new_event_loop()
    engine: Engine = loop.run_until_complete(open_engine(spec))
    try:
        yield RunningEngine(engine, loop)
    finally:
        engine.shutdown()
        loop.run_until_complete(asyncio.sleep(0.1))
        loop.close()


def scene_image(seed: int, size: tuple[int, int] = (112, 112)) -> EncodedImage:
    """A held-out scene as an engine takes it."""
    picture = draw_scene(make_scene(seed), size)
    return EncodedImage(picture.width, picture.height, encode(picture))


def question(
    text: str, *images: EncodedImage, mode: str = "auto", max_tokens: int = 256, system: str | None = None, **more: Any
) -> EngineRequest:
    """A request with the images before the text."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return EngineRequest(messages, images, mode, SamplingSpec(max_tokens=max_tokens, **more))
