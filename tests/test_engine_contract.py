"""One contract, two engines: vLLM with the small checkpoint, and the simulation.

What only a model can show (its answers, its tokens) is in test_checkpoint.py.
"""

import asyncio
import contextlib
import dataclasses
import typing
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.engine.contract import MAX_IMAGES, EngineRequest, task_to_request
from pipeline.engine.models import read_engine_arg_names
from pipeline.errors import EngineDiedError, SampleError
from pipeline.records import OUTPUT_SCHEMA, EncodedImage, Generation, Task
from pipeline.spec import SamplingSpec
from tests.engines import REAL_SPEC, SIMULATED_SPEC, RunningEngine, question, running_engine, scene_image

COUNT = "How many shapes are there?"


@pytest.fixture(params=["real", "simulated"])
def engine(request: pytest.FixtureRequest) -> Any:
    if request.param == "real":
        yield request.getfixturevalue("real_engine")
    else:
        with running_engine(SIMULATED_SPEC) as simulated:
            yield simulated


def without_latency(generation: Generation) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(generation).items() if name != "latency_s"}


def check_sense(generation: Generation) -> None:
    """What holds for every generation."""
    assert generation.mode_chosen in ("thinking", "non-thinking")
    assert (generation.reasoning is None) == (generation.mode_chosen == "non-thinking")
    if generation.answer is None:
        assert generation.finish_reason == "length"
    else:
        assert not generation.thinking_truncated
    assert generation.finish_reason in ("stop", "length")
    assert generation.completion_tokens >= generation.reasoning_tokens + generation.answer_tokens
    assert 0 <= generation.image_tokens < generation.prompt_tokens
    assert generation.latency_s >= 0
    for text in (generation.reasoning, generation.answer):
        assert text is None or not ("<think>" in text or "</think>" in text)


def test_generation_has_a_field_for_each_engine_column() -> None:
    engine_columns = {"sample_id", "prompt_id", "shard", "mode_requested", "error_type", "error_message"}
    assert set(typing.get_type_hints(Generation)) == set(OUTPUT_SCHEMA.names) - engine_columns


def test_engine_arguments_read_from_source_are_vllms_own() -> None:
    from pipeline.engine.vllm_engine import engine_arg_names

    assert read_engine_arg_names() == engine_arg_names()


def test_engine_on_a_cpu_is_one_process_unless_the_spec_says_otherwise() -> None:
    from pipeline.engine.vllm_engine import IN_ENGINE_CORE, spec_to_args

    assert spec_to_args(REAL_SPEC).distributed_executor_backend == IN_ENGINE_CORE
    args = {**REAL_SPEC.args, "distributed_executor_backend": "mp"}
    assert spec_to_args(REAL_SPEC.model_copy(update={"args": args})).distributed_executor_backend == "mp"


@pytest.mark.parametrize(("mode", "chosen"), [("long", "thinking"), ("short", "non-thinking")])
def test_generate_forced_mode_is_kept(engine: RunningEngine, mode: str, chosen: str) -> None:
    (generation,) = engine.generate(question(COUNT, scene_image(1), mode=mode))
    check_sense(generation)
    assert generation.mode_chosen == chosen
    assert generation.finish_reason == "stop"
    assert generation.answer


def test_generate_many_at_once_equals_one_by_one(engine: RunningEngine) -> None:
    requests = [
        question(text, scene_image(seed), mode=mode)
        for seed, text, mode in [
            (1, COUNT, "auto"),
            (2, "Describe this image.", "auto"),
            (3, COUNT, "short"),
            (4, COUNT, "long"),
        ]
    ]
    together = engine.generate(*requests)
    alone = [engine.generate(request)[0] for request in requests]
    assert [without_latency(generation) for generation in together] == [without_latency(g) for g in alone]
    for generation in together:
        check_sense(generation)


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 12])
def test_generate_cut_thought_has_no_answer(engine: RunningEngine, max_tokens: int) -> None:
    (generation,) = engine.generate(question(COUNT, scene_image(3), mode="long", max_tokens=max_tokens))
    check_sense(generation)
    assert generation.answer is None
    assert generation.thinking_truncated
    assert generation.finish_reason == "length"
    assert generation.completion_tokens == generation.reasoning_tokens == max_tokens


def test_generate_cut_answer_is_kept_with_length(engine: RunningEngine) -> None:
    (generation,) = engine.generate(question("Describe this image.", scene_image(3), mode="short", max_tokens=4))
    assert generation.answer
    assert not generation.thinking_truncated
    assert generation.finish_reason == "length"
    assert generation.answer_tokens == generation.completion_tokens == 4


def test_generate_stop_string_is_in_neither_text(real_engine: RunningEngine) -> None:
    """Also in a thought, which then has no answer. The tokens stay, and vLLM's text alone says where it stopped."""
    (whole,) = real_engine.generate(question(COUNT, scene_image(3), mode="long"))
    assert whole.reasoning is not None
    assert whole.answer is not None
    word = whole.reasoning.split()[3]
    (stopped,) = real_engine.generate(question(COUNT, scene_image(3), mode="long", stop=[word]))
    assert (stopped.reasoning, stopped.answer) == (whole.reasoning.partition(word)[0].rstrip(), None)
    assert (stopped.finish_reason, stopped.thinking_truncated) == ("stop", True)
    (direct,) = real_engine.generate(question("Describe this image.", scene_image(3), mode="short"))
    assert direct.answer is not None
    word = direct.answer.split()[3]
    (stopped,) = real_engine.generate(question("Describe this image.", scene_image(3), mode="short", stop=[word]))
    assert (stopped.reasoning, stopped.answer) == (None, direct.answer.partition(word)[0].rstrip())


def test_generate_image_tokens_grow_with_images(engine: RunningEngine) -> None:
    images = [scene_image(seed) for seed in range(MAX_IMAGES)]
    none, one, five = engine.generate(
        question("Hello", mode="short"), question("Hello", images[0], mode="short"), question("Hello", *images)
    )
    assert none.image_tokens == 0
    assert one.image_tokens > 0
    assert five.image_tokens == 5 * one.image_tokens


@pytest.mark.parametrize(
    ("text", "num_images", "error_type"),
    [("Hello", MAX_IMAGES + 1, "request_invalid"), ("very long " * 20_000, 1, "prompt_too_long")],
)
def test_generate_bad_request_raises_and_harms_no_other(
    engine: RunningEngine, text: str, num_images: int, error_type: str
) -> None:
    async def mixed() -> list[Any]:
        import asyncio

        bad = question(text, *[scene_image(0)] * num_images)
        good = question(COUNT, scene_image(1))
        calls = [engine.engine.generate(request) for request in (good, bad, good)]
        return list(await asyncio.gather(*calls, return_exceptions=True))

    first, error, second = engine.run(mixed())
    assert isinstance(error, SampleError)
    assert error.error_type == error_type
    assert "\n" not in error.message
    assert without_latency(first) == without_latency(second)


def test_generate_after_death_always_raises() -> None:
    with running_engine(SIMULATED_SPEC) as simulated:
        simulated.engine.kill()
        for _ in range(2):
            with pytest.raises(EngineDiedError):
                simulated.generate(question(COUNT, scene_image(1)))


def output_that_ended(reason: str) -> Any:
    return SimpleNamespace(outputs=[SimpleNamespace(finish_reason=reason)])


@pytest.mark.parametrize(
    ("reasons", "raises"),
    [
        (["stop"], None),
        (["length"], None),
        (["error", "stop"], None),
        (["error", "error"], SampleError),
        (["repetition"], SampleError),
        (["abort"], EngineDiedError),
        (["error", "abort"], EngineDiedError),
    ],
)
def test_request_that_vllm_gave_up_is_no_answer(
    real_engine: RunningEngine, monkeypatch: pytest.MonkeyPatch, reasons: list[str], raises: type[Exception] | None
) -> None:
    """vLLM gives such requests as outputs like any other."""
    left = iter(reasons)

    async def end(request: EngineRequest) -> tuple[Any, int]:
        return output_that_ended(next(left)), 0

    monkeypatch.setattr(real_engine.engine, "_complete_once", end)
    with contextlib.nullcontext() if raises is None else pytest.raises(raises):
        real_engine.run(real_engine.engine.complete(question("Anything?")))
    assert next(left, None) is None


class Renderer:
    """vLLM's, which fails as it is told to, one time after another."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    async def render_chat_async(self, conversations: Any, params: Any) -> Any:
        if self.errors:
            raise self.errors.pop(0)
        return None, ("the prompt",)


def render(*errors: Exception) -> Any:
    """The prompt that a VLLMEngine makes with this renderer."""
    from pipeline.engine.vllm_engine import VLLMEngine

    engine: Any = VLLMEngine.__new__(VLLMEngine)
    engine.llm = SimpleNamespace(renderer=Renderer(*errors))
    return asyncio.run(engine._render_chat([], None))


def test_rendering_that_takes_too_long_is_tried_again_and_then_ends_the_engine() -> None:
    assert render() == "the prompt"
    assert render(TimeoutError("after 30 s")) == "the prompt"  # the process was stopped meanwhile
    with pytest.raises(EngineDiedError, match="after 30 s"):
        render(TimeoutError("after 30 s"), TimeoutError("after 30 s"))


@pytest.mark.parametrize(
    ("error", "expected"), [(ValueError("odd"), "request_invalid"), (RuntimeError("odd"), "engine_error")]
)
def test_rendering_that_fails_is_an_error_row(error: Exception, expected: str) -> None:
    with pytest.raises(SampleError, match="odd") as caught:
        render(error)
    assert caught.value.error_type == expected


# From a row of a job to a request, which is the same for both engines.

IMAGE, HELLO = {"type": "image"}, {"type": "text", "text": "Hello"}
PICTURES = tuple(EncodedImage(1, 1, bytes([n])) for n in range(2))


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("messages", "num_images", "placed"),
    [
        ([user("Hello")], 0, [user("Hello")]),
        ([user("Hello")], 2, [user([IMAGE, IMAGE, HELLO])]),
        ([user("Few"), {"role": "assistant", "content": "shots"}, user("Hello")], 1, None),
        ([user([HELLO, IMAGE, HELLO, IMAGE])], 2, [user([HELLO, IMAGE, HELLO, IMAGE])]),
        ([user([IMAGE]), user([HELLO, IMAGE])], 2, [user([IMAGE]), user([HELLO, IMAGE])]),
    ],
)
def test_task_to_request_images_take_their_places_or_come_before_the_last_text(
    messages: list[dict[str, Any]], num_images: int, placed: list[dict[str, Any]] | None
) -> None:
    task = Task("a", "p", "long", PICTURES[:num_images], tuple(messages))
    request = task_to_request(task, SamplingSpec())
    assert list(request.messages) == (placed or [*messages[:-1], user([IMAGE, HELLO])])
    assert (tuple(request.images), request.thinking_mode) == (PICTURES[:num_images], "long")


@pytest.mark.parametrize(("num_places", "num_images"), [(1, 2), (2, 1), (1, 0)])
def test_task_to_request_other_number_of_places_than_images_is_an_error_row(num_places: int, num_images: int) -> None:
    task = Task("a", "p", "auto", PICTURES[:num_images], (user([HELLO, *[IMAGE] * num_places]),))
    with pytest.raises(SampleError, match=f"places for {num_places} images, the sample has {num_images}") as caught:
        task_to_request(task, SamplingSpec())
    assert caught.value.error_type == "images_misplaced"


def test_task_to_request_sampling_of_the_row_overrides_the_jobs_where_it_says_so() -> None:
    task = Task("a", "p", "auto", (), (user("Hello"),), {"max_tokens": 7})
    sampling = task_to_request(task, SamplingSpec(max_tokens=100, temperature=0.5)).sampling
    assert (sampling.max_tokens, sampling.temperature) == (7, 0.5)
