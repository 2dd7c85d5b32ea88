"""The official `openai` client against `r4b serve`, unchanged but for base URL and key.

Scenes have known answers and known thoughts, so it is seen on which side of a response a text is.
Not covered: that batch answers the same (test_online_parity.py), and what is refused (test_hostile_requests.py).
"""

import asyncio
import base64
import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import openai
import pydantic
import pytest
from prometheus_client.parser import text_string_to_metric_families as read_metrics

from tests.engines import scene_image
from tests.serving import Served

COUNT, DESCRIBE = "How many shapes are there?", "Describe this image."
SCENE = 34
"""Its six shapes the model counts by thinking in auto mode, and describes without."""
LISTING = (
    "Row 1: orange circle, red triangle. Row 2: red circle, orange square. Row 3: red square. Row 4: orange square."
)
COUNTING = (
    "Row 1: orange circle 1, red triangle 2. Row 2: red circle 3, orange square 4. Row 3: red square 5. "
    "Row 4: orange square 6. So 6."
)
MODES = ("auto", "long", "short")


@dataclass(frozen=True)
class Reply:
    """One choice; a stream's is put together from its deltas."""

    reasoning: str | None
    content: str | None
    finish_reason: str | None


def scene_url(seed: int = SCENE) -> str:
    """A held-out scene as a data: URL."""
    return f"data:image/png;base64,{base64.b64encode(scene_image(seed).data).decode()}"


def user(text: str, *seeds: int) -> dict[str, Any]:
    """A message about scenes, which stand before the text."""
    images = [{"type": "image_url", "image_url": {"url": scene_url(seed)}} for seed in seeds]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def greedy(text: str = COUNT, mode: str | None = None, **more: Any) -> dict[str, Any]:
    """Arguments of `create`: a question about SCENE."""
    extra = {**({"chat_template_kwargs": {"thinking_mode": mode}} if mode else {}), **more.pop("extra_body", {})}
    body = {"model": "r4b", "messages": [user(text, SCENE)], "temperature": 0, "max_tokens": 256, "extra_body": extra}
    return {**body, **more}


def reasoning_of(message: Any) -> str | None:
    """vLLM's field, which the client keeps without knowing it."""
    reasoning: str | None = getattr(message, "reasoning", None)
    return reasoning


def read(completion: Any) -> list[Reply]:
    """All choices, each without tags."""
    replies = [Reply(reasoning_of(c.message), c.message.content, c.finish_reason) for c in completion.choices]
    for reply in replies:
        assert "think>" not in f"{reply.reasoning}{reply.content}"
    return replies


def read_stream(events: Iterable[Any]) -> tuple[Reply, Any]:
    """The only choice of a stream and its usage; no part of the thought may come after the answer has begun."""
    reasoning = content = ""
    finish_reason = usage = None
    for event in events:
        assert event.usage is None or event.choices == []
        usage = event.usage or usage
        for choice in event.choices:
            if thought := reasoning_of(choice.delta):
                assert content == ""
                reasoning += thought
            content += choice.delta.content or ""
            finish_reason = choice.finish_reason or finish_reason
    assert "think>" not in reasoning + content
    return Reply(reasoning or None, content or None, finish_reason), usage


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.base_url}/v1", api_key=served.key)


# text, mode -> thought, answer
SIDES = [
    (COUNT, "auto", COUNTING, "6"),
    (COUNT, "long", COUNTING, "6"),
    (COUNT, "short", None, "6"),
    (DESCRIBE, "auto", None, LISTING),
    (DESCRIBE, "long", f"Let me look at each row. {LISTING}", LISTING),
    (DESCRIBE, "short", None, LISTING),
]


@pytest.mark.parametrize(("text", "mode", "thought", "answer"), SIDES)
def test_chat_in_each_mode_puts_thought_and_answer_on_their_sides(
    client: openai.OpenAI, text: str, mode: str, thought: str | None, answer: str
) -> None:
    completion = client.chat.completions.create(**greedy(text, mode))
    assert read(completion) == [Reply(thought, answer, "stop")]
    events = client.chat.completions.create(**greedy(text, mode, stream=True, stream_options={"include_usage": True}))
    reply, usage = read_stream(events)
    assert reply == Reply(thought, answer, "stop")
    assert usage == completion.usage
    assert (usage.completion_tokens_details.reasoning_tokens > 1) == (thought is not None)


def test_chat_without_a_mode_is_auto(client: openai.OpenAI) -> None:
    assert read(client.chat.completions.create(**greedy())) == [Reply(COUNTING, "6", "stop")]


@pytest.mark.parametrize(
    ("effort", "mode"),
    [
        ("none", "short"),
        ("minimal", "short"),
        ("low", "auto"),
        ("medium", "auto"),
        ("high", "long"),
        ("xhigh", "long"),
    ],
)
def test_reasoning_effort_is_the_mode_it_stands_for(client: openai.OpenAI, effort: Any, mode: str) -> None:
    by_effort = client.chat.completions.create(**greedy(DESCRIBE, reasoning_effort=effort))
    by_mode = client.chat.completions.create(**greedy(DESCRIBE, mode))
    assert (read(by_effort), by_effort.usage) == (read(by_mode), by_mode.usage)


def test_five_images_are_seen_in_their_order(client: openai.OpenAI) -> None:
    seeds = (34, 35, 36, 37, 38)
    one, forth, back = (
        client.chat.completions.create(**greedy(DESCRIBE, "short", messages=[user(DESCRIBE, *order)]))
        for order in (seeds[:1], seeds, seeds[::-1])
    )
    assert one.usage
    assert forth.usage
    assert back.usage
    assert forth.usage.prompt_tokens == back.usage.prompt_tokens > 4 * one.usage.prompt_tokens
    assert read(forth) != read(back)


def test_system_message_and_earlier_turns_are_part_of_the_prompt(client: openai.OpenAI) -> None:
    alone = client.chat.completions.create(**greedy())
    system = {"role": "system", "content": "Answer briefly."}
    with_system = client.chat.completions.create(**greedy(messages=[system, user(COUNT, SCENE)]))
    turns = [user(COUNT, SCENE), {"role": "assistant", "content": "6"}, {"role": "user", "content": DESCRIBE}]
    later = client.chat.completions.create(**greedy(messages=turns))
    assert read(with_system) == [Reply(COUNTING, "6", "stop")]
    assert read(later) == [Reply(None, LISTING, "stop")]
    assert alone.usage
    assert with_system.usage
    assert later.usage
    assert min(with_system.usage.prompt_tokens, later.usage.prompt_tokens) > alone.usage.prompt_tokens


def test_n_with_a_seed_gives_choices_that_come_again(client: openai.OpenAI) -> None:
    asked = greedy(DESCRIBE, "short", n=3, temperature=2, seed=5, max_tokens=40)
    first, again, other = (client.chat.completions.create(**{**asked, "seed": seed}) for seed in (5, 5, 6))
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert read(first) == read(again) != read(other)
    assert len(set(read(first))) > 1


def test_stop_string_ends_the_answer_and_is_not_in_it(client: openai.OpenAI) -> None:
    (reply,) = read(client.chat.completions.create(**greedy(DESCRIBE, "short", stop=[" Row 2"])))
    assert reply == Reply(None, "Row 1: orange circle, red triangle.", "stop")


def test_logprobs_name_each_token_and_its_rivals(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(**greedy(DESCRIBE, "short", logprobs=True, top_logprobs=3))
    logprobs = completion.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert completion.usage
    assert len(logprobs.content) == completion.usage.completion_tokens
    text = b"".join(bytes(one.bytes or ()) for one in logprobs.content).decode()
    assert text.removesuffix("<|im_end|>").strip() == LISTING
    for one in logprobs.content:
        assert len(one.top_logprobs) == 3
        assert one.token == max(one.top_logprobs, key=lambda rival: rival.logprob).token


class Counted(pydantic.BaseModel):
    """What a schema asks for."""

    color: Literal["red", "blue"]
    many: bool


@pytest.mark.parametrize("mode", MODES)
def test_parse_fills_a_pydantic_model_and_leaves_the_thought_alone(client: openai.OpenAI, mode: str) -> None:
    parsed = client.chat.completions.parse(**greedy(COUNT, mode, response_format=Counted))
    assert isinstance(parsed.choices[0].message.parsed, Counted)
    assert read(parsed)[0].reasoning == (None if mode == "short" else COUNTING)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [({"choice": ["seven", "eleven"]}, "seven|eleven"), ({"regex": "[0-9]{2}-[a-c]{3}x"}, "[0-9]{2}-[a-c]{3}x")],
)
def test_structured_outputs_bind_the_answer(
    client: openai.OpenAI, mode: str, constraint: dict[str, Any], pattern: str
) -> None:
    body = greedy(COUNT, mode, extra_body={"structured_outputs": constraint})
    (reply,) = read(client.chat.completions.create(**body))
    assert re.fullmatch(pattern, reply.content or "")
    assert reply.reasoning == (None if mode == "short" else COUNTING)


def test_json_object_is_json(client: openai.OpenAI) -> None:
    body = greedy(DESCRIBE, "short", response_format={"type": "json_object"}, max_tokens=400)
    (reply,) = read(client.chat.completions.create(**body))
    assert reply.finish_reason == "length" or isinstance(json.loads(reply.content or ""), dict)


def test_thinking_token_budget_ends_the_thought(client: openai.OpenAI) -> None:
    body = greedy(COUNT, "long", extra_body={"thinking_token_budget": 12})
    completion = client.chat.completions.create(**body)
    (reply,) = read(completion)
    assert reply.reasoning
    assert COUNTING.startswith(reply.reasoning)
    assert reply.reasoning != COUNTING
    assert reply.content


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_within_a_thought_leaves_no_answer(client: openai.OpenAI, stream: bool) -> None:
    body = greedy(COUNT, "long", max_tokens=10)
    if stream:
        reply, usage = read_stream(
            client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
        )
    else:
        completion = client.chat.completions.create(**body)
        (reply,), usage = read(completion), completion.usage
    assert reply.reasoning
    assert COUNTING.startswith(reply.reasoning)
    assert (reply.content, reply.finish_reason) == (None, "length")
    assert usage.completion_tokens_details.reasoning_tokens == usage.completion_tokens == 10


def test_metrics_are_vllms_serves_and_of_modes(served: Served, client: openai.OpenAI) -> None:
    cut = {"mode": "thinking", "finish_reason": "length"}
    client.chat.completions.create(**greedy(mode="long", max_tokens=10))
    deadline = time.monotonic() + 60
    while (sums := metric_sums(served, cut)).get("ray_r4b_choices_total", 0) < 1:  # Ray passes them on now and then
        assert time.monotonic() < deadline, sums
        time.sleep(1)
    assert sums["ray_r4b_reasoning_tokens_total"] >= 10
    every = metric_sums(served, {})
    assert every["ray_vllm_request_success_total"] >= sums["ray_r4b_choices_total"]
    assert every["ray_serve_num_http_requests_total"] >= 1
    # one value for each token costs Ray too much (RequestMetrics); this one is of each request
    assert every["ray_vllm_request_time_per_output_token_seconds_count"] >= 1
    assert not any("inter_token" in name for name in every)


def metric_sums(served: Served, labels: dict[str, str]) -> dict[str, float]:
    """Each series of /metrics that has these labels, added up by name."""
    status, _, body = served.request("/metrics")
    assert status == 200
    sums: dict[str, float] = {}
    for family in read_metrics(body.decode()):
        for sample in family.samples:
            if labels.items() <= sample.labels.items():
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


def test_models_names_the_served_model_and_no_path(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "r4b"
    assert "/" not in model.model_dump_json()


def test_eight_at_once_are_answered_as_one_is(served: Served) -> None:
    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{served.base_url}/v1", api_key=served.key) as client:
            return await asyncio.gather(*(client.chat.completions.create(**greedy(mode="long")) for _ in range(8)))

    for completion in asyncio.run(ask_all()):
        assert read(completion) == [Reply(COUNTING, "6", "stop")]


def test_request_id_is_one_and_the_clients_own_where_it_gives_one(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(**greedy(max_tokens=1))
    given = client.chat.completions.create(**greedy(max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}))
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", made._request_id or "")
    assert given._request_id == "mine-1"


def test_errors_are_the_clients_own_classes(served: Served, client: openai.OpenAI) -> None:
    stranger = client.with_options(api_key="not-a-key-of-this-server")
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(**greedy(model="other"))
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="r4b", input="Hello")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(**greedy(max_tokens=100_000))
