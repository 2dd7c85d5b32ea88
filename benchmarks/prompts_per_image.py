"""Five prompts for each image against as many images with one prompt each: the time, and vLLM's cache of images.

Both put the same number of rows, the same questions and images of the same size through the small checkpoint on vLLM,
in alternation and in the order of a job. Hits are those of vLLM's multimodal processor cache; cached tokens are prompt
tokens that its prefix cache spared.
"""

import argparse
import asyncio
import io
import statistics
import time

from jobs.demo import CHECKPOINT, CPU_ENGINE_ARGS
from pipeline.engine.contract import EngineRequest
from pipeline.engine.vllm_engine import VLLMEngine
from pipeline.records import EncodedImage
from pipeline.scenes import KINDS, ask, draw_scene, make_scene
from pipeline.spec import EngineSpec, SamplingSpec

MAX_TOKENS = 16


def make_image(seed: int, size: tuple[int, int]) -> EncodedImage:
    buffer = io.BytesIO()
    draw_scene(make_scene(seed), size).save(buffer, "PNG")
    return EncodedImage(*size, buffer.getvalue())


def make_requests(first_seed: int, num_rows: int, shared: bool, size: tuple[int, int]) -> list[EngineRequest]:
    """Rows as a job orders them: all prompts of an image, then the next image."""
    requests: list[EngineRequest] = []
    for row in range(num_rows):
        seed = first_seed + (row // len(KINDS) if shared else row)
        text = ask(make_scene(seed), KINDS[row % len(KINDS)]).text
        content = [{"type": "image"}, {"type": "text", "text": text}]
        image = requests[-1].images[0] if shared and row % len(KINDS) else make_image(seed, size)
        messages = [{"role": "user", "content": content}]
        requests.append(EngineRequest(messages, (image,), "short", SamplingSpec(max_tokens=MAX_TOKENS)))
    return requests


async def run(engine: VLLMEngine, requests: list[EngineRequest], at_once: int) -> tuple[float, int, int, int]:
    """Seconds, hits and look-ups of the image cache, and prompt tokens spared by the prefix cache."""
    cache = engine.llm.renderer.mm_processor_cache
    before, slots = cache.make_stats(), asyncio.Semaphore(at_once)

    async def complete(request: EngineRequest) -> int:
        async with slots:
            output, _ = await engine.complete(request)
            return int(output.num_cached_tokens or 0)

    start = time.monotonic()
    cached = await asyncio.gather(*map(complete, requests))
    seconds, after = time.monotonic() - start, cache.make_stats()
    return seconds, after.hits - before.hits, after.total - before.total, sum(cached)


async def compare(rows: int, pairs: int, size: tuple[int, int]) -> None:
    spec = EngineSpec(model=str(CHECKPOINT), num_gpus=0, max_num_seqs=64, args=CPU_ENGINE_ARGS)
    engine = await VLLMEngine.start(spec)
    ratios = []
    seed = 100_000
    await run(engine, make_requests(seed, 50, False, size), 128)  # the first requests of an engine are slow
    for number in range(pairs):
        seconds = {}
        for shared in (True, False) if number % 2 == 0 else (False, True):
            seed += rows
            requests = make_requests(seed, rows, shared, size)
            seconds[shared], hits, looked_up, cached = await run(engine, requests, 2 * spec.max_num_seqs)
            what = "five prompts an image" if shared else "one prompt an image"
            print(
                f"pair {number}: {what:<22} {rows} rows in {seconds[shared]:5.1f} s, "
                f"{hits} of {looked_up} images in the cache, {cached} prompt tokens spared",
                flush=True,
            )
        ratios.append(seconds[True] / seconds[False])
    print(f"time of five prompts an image to one: {statistics.median(ratios):.2f} (median of {pairs} pairs)")
    engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--size", default="640x480", help="Of each image, in pixels.")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    asyncio.run(compare(args.rows, args.pairs, (width, height)))


if __name__ == "__main__":
    main()
