"""The small checkpoint through real vLLM: it chooses its mode, answers well, and its tokens are the training code's.

A sample of what `checkpoints/evaluate_shapes.py` measures in full; the bounds are the same.
"""

import json
from pathlib import Path

import pytest

from checkpoints.evaluate_shapes import (
    FIRST_SEED,
    answer_all,
    as_trained,
    count_equal_prompts,
    make_request,
    share,
)
from jobs.demo import CHECKPOINT
from pipeline.scenes import KINDS, THINKING_KINDS
from tests.engines import RunningEngine, question, scene_image

MANY_SEEDS = range(FIRST_SEED, FIRST_SEED + 250)
"""Half of the evaluation's: a gap of some points between two rates needs more rows than a high rate."""
SEEDS = range(FIRST_SEED + 5000, FIRST_SEED + 5060)


def test_checkpoint_is_small_and_names_its_architecture() -> None:
    files = [path for path in CHECKPOINT.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 << 20
    assert not [path for path in files if path.suffix == ".py"]
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["RForConditionalGeneration"]


def test_auto_picks_the_mode_it_was_trained_to_pick(real_engine: RunningEngine) -> None:
    answers = real_engine.run(answer_all(real_engine.engine, SEEDS, "auto"))
    assert share([as_trained(q, g) for rows in answers.values() for q, g in rows]) >= 0.98
    for kind in KINDS:
        assert share([g.answer == q.answer for q, g in answers[kind]]) >= 0.95, kind


@pytest.mark.slow
def test_thinking_pays_on_counts_and_comparisons(real_engine: RunningEngine) -> None:
    rates = {}
    for mode in ("long", "short"):
        answers = real_engine.run(answer_all(real_engine.engine, MANY_SEEDS, mode, sorted(THINKING_KINDS)))
        rates[mode] = share([g.answer == q.answer for rows in answers.values() for q, g in rows])
    assert rates["long"] >= 0.95
    assert rates["short"] <= rates["long"] - 0.08


@pytest.mark.parametrize("num_seeds", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_vllm_tokens_equal_the_training_codes(real_engine: RunningEngine, num_seeds: int) -> None:
    seeds = range(FIRST_SEED + 6000, FIRST_SEED + 6000 + num_seeds)
    assert real_engine.run(count_equal_prompts(real_engine.engine, CHECKPOINT, seeds)) >= 0.98 * num_seeds


@pytest.mark.parametrize("mode", ["auto", "long", "short"])
@pytest.mark.parametrize("kind", ["caption", "count"])
def test_wire_forms_are_r4bs(real_engine: RunningEngine, mode: str, kind: str) -> None:
    """FACTS of R-4B: how the generation prompt ends, and how the completion begins."""
    _, request = make_request(FIRST_SEED, kind, mode)
    output, _ = real_engine.run(real_engine.engine.complete(request))
    tokenizer = real_engine.engine.llm.renderer.get_tokenizer()
    prompt, completion = tokenizer.decode(output.prompt_token_ids), tokenizer.decode(output.outputs[0].token_ids)
    assert prompt.endswith({"auto": "<think>", "long": "<think>\n", "short": "<think>\n\n</think>"}[mode])
    assert not completion.startswith("<think>")
    if mode == "short":
        assert "think>" not in completion
    elif mode == "auto" and kind == "caption":
        assert completion.startswith("\n\n</think>\n\nRow 1:")
    else:
        assert completion.count("</think>\n\n") == 1
        assert completion.startswith("\n") == (mode == "auto")
    assert tokenizer.encode("<think></think>", add_special_tokens=False) == [
        tokenizer.convert_tokens_to_ids("<think>"),
        tokenizer.convert_tokens_to_ids("</think>"),
    ]


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7), (56, 56), (500, 375), (1600, 1200), (3000, 1000)])
def test_images_of_any_size_are_counted_exactly(real_engine: RunningEngine, size: tuple[int, int]) -> None:
    request = question("Describe this image.", scene_image(2, size), mode="short", max_tokens=2)
    output, image_tokens = real_engine.run(real_engine.engine.complete(request))
    image_id = real_engine.engine.llm.renderer.get_tokenizer().convert_tokens_to_ids("<image>")
    assert output.prompt_token_ids.count(image_id) == image_tokens
    (generation,) = real_engine.generate(request)
    assert generation.prompt_tokens == len(output.prompt_token_ids)
    assert generation.image_tokens == image_tokens >= 16  # the base tile; of a sliver, all else is padding


def test_bad_thinking_mode_is_the_requests_error(real_engine: RunningEngine) -> None:
    from pipeline.errors import SampleError

    with pytest.raises(SampleError, match="thinking_mode must be auto, long or short"):
        real_engine.generate(question("Hello", scene_image(1), mode="sometimes"))


def test_checkpoint_loads_nothing_from_the_hub(real_engine: RunningEngine) -> None:
    assert Path(real_engine.engine.llm.model_config.model) == CHECKPOINT
    assert not real_engine.engine.llm.model_config.trust_remote_code
