"""An engine without a model: the contract's lengths, modes and times, made from a hash of the request.

For tests of scale and of faults, where thousands of engines or hundreds of kills are the point. Deterministic: the
same request gives the same generation, apart from `latency_s`.
Not covered: batching effects; every request takes its own tokens' time.
"""

import asyncio
import ctypes
import hashlib
import json
import random
import time

from pipeline.engine.contract import MAX_IMAGES, EngineRequest
from pipeline.errors import EngineDiedError, SampleError
from pipeline.records import Generation
from pipeline.spec import EngineSpec

TOKENS_PER_TILE = 729
WORDS = ("red", "green", "blue", "circle", "square", "triangle", "left", "right", "above", "below", "one", "two")


class SimulatedEngine:
    """Thinks on a set share of `auto` requests, says hashed words, and waits as long as the tokens would take."""

    def __init__(self, spec: EngineSpec) -> None:
        self._simulation = spec.simulation
        self._slots = asyncio.Semaphore(spec.max_num_seqs)
        self._dead = self._hangs = False
        self._never = asyncio.Event()

    async def generate(self, request: EngineRequest) -> Generation:
        """As the contract says."""
        self._check_alive()
        rng = random.Random(_digest(request))
        text = json.dumps(request.messages, ensure_ascii=False)
        await self._suffer(text)
        image_tokens = TOKENS_PER_TILE * len(request.images)
        prompt_tokens = image_tokens + len(text.split()) + 8
        if len(request.images) > MAX_IMAGES:
            raise SampleError("request_invalid", f"At most {MAX_IMAGES} images may be provided in one prompt.")
        if prompt_tokens >= self._simulation.max_model_len:
            raise SampleError(
                "prompt_too_long",
                f"The prompt has {prompt_tokens} tokens, the model takes {self._simulation.max_model_len}.",
            )
        start = time.monotonic()
        generation = self._speak(request, rng, prompt_tokens, image_tokens)
        async with self._slots:
            await asyncio.sleep(generation.completion_tokens * self._simulation.seconds_per_token)
        self._check_alive()
        return Generation(**{**vars(generation), "latency_s": time.monotonic() - start})

    def _speak(self, request: EngineRequest, rng: random.Random, prompt_tokens: int, image_tokens: int) -> Generation:
        share = {"long": 1.0, "short": 0.0}.get(request.thinking_mode, self._simulation.thinking_share)
        thinks = rng.random() < share
        num_thought = max(1, int(rng.gauss(1, 0.2) * self._simulation.thinking_tokens)) if thinks else 0
        num_answer = max(1, int(rng.gauss(1, 0.2) * self._simulation.answer_tokens))
        budget = min(request.sampling.max_tokens, self._simulation.max_model_len - prompt_tokens)
        thought = [rng.choice(WORDS) for _ in range(min(num_thought, budget))]
        cut = thinks and num_thought >= budget
        tags = 1 if thinks and not cut else 0
        room = budget - len(thought) - tags
        answer = [] if cut else [rng.choice(WORDS) for _ in range(min(num_answer, room))]
        ended = not cut and num_answer < room
        return Generation(
            mode_chosen="thinking" if thinks else "non-thinking",
            reasoning=" ".join(thought) if thinks else None,
            answer=None if cut else " ".join(answer),
            finish_reason="stop" if ended else "length",
            thinking_truncated=cut,
            prompt_tokens=prompt_tokens,
            image_tokens=image_tokens,
            completion_tokens=len(thought) + tags + len(answer) + ended,
            reasoning_tokens=len(thought),
            answer_tokens=len(answer),
            latency_s=0.0,
        )

    async def _suffer(self, text: str) -> None:
        """What a prompt does to the engine."""
        simulation = self._simulation
        if simulation.kills_process is not None and simulation.kills_process in text:
            ctypes.string_at(0)
        if simulation.kills_engine is not None and simulation.kills_engine in text:
            self.kill()
        self._check_alive()
        if simulation.hangs_engine is not None and simulation.hangs_engine in text:
            self._hangs = True
        if self._hangs:
            await self._never.wait()

    async def check(self) -> None:
        """As the contract says."""
        self._check_alive()
        if self._hangs:
            await self._never.wait()

    def kill(self) -> None:
        """Die as a real engine does: everything in flight and everything after fails."""
        self._dead = True

    def _check_alive(self) -> None:
        if self._dead:
            raise EngineDiedError("The simulated engine was killed.")

    def shutdown(self) -> None:
        """As the contract says."""
        self._dead = True


def _digest(request: EngineRequest) -> str:
    digest = hashlib.sha256(json.dumps([list(request.messages), request.thinking_mode]).encode())
    digest.update(request.sampling.model_dump_json().encode())
    for image in request.images:
        digest.update(image.data)
    return digest.hexdigest()
