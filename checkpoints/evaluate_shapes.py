"""Measure the small checkpoint through the real engine, on scenes that it never saw.

    python -m checkpoints.evaluate_shapes --scenes 500

Prints, for held-out scenes and greedy decoding: how often `auto` picks the mode it was trained to pick, exact
answers by kind of question and mode, and on how many prompts vLLM's tokens are those of the training code.
Not covered: scenes unlike the drawn ones.
"""

import argparse
import asyncio
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

from checkpoints.train_shapes import build_model, build_processor, load_tokenizer, load_weights, speak_greedily
from jobs.demo import CPU_ENGINE_ARGS
from pipeline.engine.contract import EngineRequest
from pipeline.engine.vllm_engine import VLLMEngine
from pipeline.records import EncodedImage, Generation
from pipeline.scenes import KINDS, THINKING_KINDS, Question, ask, draw_scene, make_scene
from pipeline.spec import EngineSpec, SamplingSpec

FIRST_SEED = 10_000
"""Far from the demo's scenes, and below TRAIN_SEEDS as all held-out ones are."""
MODES = ("auto", "long", "short")
MAX_TOKENS = 256


def make_request(seed: int, kind: str, mode: str) -> tuple[Question, EngineRequest]:
    """A question about a held-out scene, and the request that asks it."""
    scene = make_scene(seed)
    question = ask(scene, kind)
    picture, buffer = draw_scene(scene), io.BytesIO()
    picture.save(buffer, "PNG")
    image = EncodedImage(picture.width, picture.height, buffer.getvalue())
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    messages = [{"role": "user", "content": content}]
    return question, EngineRequest(messages, [image], mode, SamplingSpec(max_tokens=MAX_TOKENS))


async def answer_all(
    engine: VLLMEngine, seeds: Iterable[int], mode: str, kinds: Iterable[str] = KINDS
) -> dict[str, list[tuple[Question, Generation]]]:
    """These kinds of questions about every scene, in one mode; grouped by kind."""
    asked = [make_request(seed, kind, mode) for seed, kind in product(seeds, kinds)]
    generations = await asyncio.gather(*(engine.generate(request) for _, request in asked))
    grouped = defaultdict(list)
    for (question, _), generation in zip(asked, generations, strict=True):
        grouped[question.kind].append((question, generation))
    return grouped


def share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def as_trained(question: Question, generation: Generation) -> bool:
    """Whether `auto` chose the mode that this kind of question was trained in."""
    return (generation.mode_chosen == "thinking") == (question.kind in THINKING_KINDS)


async def count_equal_prompts(engine: VLLMEngine, checkpoint: Path, seeds: Sequence[int]) -> int:
    """On how many prompts (kinds and modes in turn) vLLM gives the very tokens of the training code."""
    tokenizer = load_tokenizer(checkpoint)
    model, processor = build_model(tokenizer).eval(), build_processor(tokenizer)
    load_weights(model, checkpoint)
    equal = 0
    for index, seed in enumerate(seeds):
        kind, mode = KINDS[index % len(KINDS)], MODES[index // len(KINDS) % len(MODES)]
        _, request = make_request(seed, kind, mode)
        prompt = tokenizer.apply_chat_template(
            list(request.messages), tokenize=False, add_generation_prompt=True, thinking_mode=mode
        )
        output, _ = await engine.complete(request)
        theirs = output.prompt_token_ids, list(output.outputs[0].token_ids)
        ours = speak_greedily(model, processor, prompt, draw_scene(make_scene(seed)), MAX_TOKENS)
        equal += theirs == ours
    return equal


async def evaluate(checkpoint: Path, num_scenes: int, num_parity: int) -> list[str]:
    """All measurements, as the lines of a Markdown table and two sentences."""
    spec = EngineSpec(model=str(checkpoint), num_gpus=0, max_num_seqs=128, args=CPU_ENGINE_ARGS)
    engine = await VLLMEngine.start(spec)
    try:
        seeds = range(FIRST_SEED, FIRST_SEED + num_scenes)
        results = {mode: await answer_all(engine, seeds, mode) for mode in MODES}
        equal = await count_equal_prompts(engine, checkpoint, range(FIRST_SEED, FIRST_SEED + num_parity))
    finally:
        engine.shutdown()
    lines = ["| question | auto | long | short | thinks in auto |", "| --- | --- | --- | --- | --- |"]
    for kind in KINDS:
        rates = [share([g.answer == q.answer for q, g in results[mode][kind]]) for mode in MODES]
        thinks = share([g.mode_chosen == "thinking" for _, g in results["auto"][kind]])
        lines.append(f"| {kind} | {' | '.join(f'{rate:.1%}' for rate in rates)} | {thinks:.1%} |")
    hard = {
        mode: share([g.answer == q.answer for kind in THINKING_KINDS for q, g in results[mode][kind]]) for mode in MODES
    }
    lines.append(f"| counts and comparisons together | {' | '.join(f'{hard[mode]:.1%}' for mode in MODES)} | |")
    picked = share([as_trained(q, g) for answers in results["auto"].values() for q, g in answers])
    lines.append("")
    lines.append(f"In `auto`, the mode is the one trained for on {picked:.1%} of {num_scenes * len(KINDS)} prompts.")
    lines.append(f"vLLM and the training code give the same greedy tokens on {equal} of {num_parity} prompts.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "r4b-shapes")
    parser.add_argument("--scenes", type=int, default=500, help="held-out scenes (default 500)")
    parser.add_argument("--parity", type=int, default=100, help="prompts to compare token by token (default 100)")
    args = parser.parse_args()
    print("\n".join(asyncio.run(evaluate(args.checkpoint, args.scenes, args.parity))))


if __name__ == "__main__":
    main()
