"""The same scenes asked online and in a batch job: the same mode, thought, answer and counts, row by row."""

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import openai
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.demo import CHECKPOINT, CPU_ENGINE_ARGS
from tests.running import r4b, write_scene_shards
from tests.serving import Served

pytestmark = pytest.mark.long

MODES = ("auto", "long", "short")
MAX_TOKENS = 100
COMPARED = ("mode_chosen", "reasoning", "answer", "finish_reason", "prompt_tokens", "completion_tokens")


def run_batch_job(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows of a job over the scenes, by sample id; the modes take turns, by the number in the id."""
    job = {
        "input": {"url": str(folder / "input")},
        "prompts": [
            {
                "template": "{{ question }}",
                "thinking_mode": "{{ ['auto', 'long', 'short'][(id.split('-')[1] | int) % 3] }}",
            }
        ],
        "sampling": {"temperature": 0.0, "max_tokens": MAX_TOKENS},
        "engine": {"model": str(CHECKPOINT), "num_gpus": 0, "max_num_seqs": 32, "args": dict(CPU_ENGINE_ARGS)},
        "output": {"url": str(folder / "output"), "chunk_rows": 50},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    finished = r4b("run", str(folder / "job.yaml"))
    assert finished.code == 0, finished.stderr
    rows = pq.ParquetDataset(str(folder / "output" / "data")).read().to_pylist()
    return {row["sample_id"]: row for row in rows}


def read_scenes(folder: Path) -> list[dict[str, Any]]:
    """The input's rows."""
    rows: list[dict[str, Any]] = pq.ParquetDataset(str(folder / "input")).read().to_pylist()
    return rows


async def ask_all(served: Served, scenes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every scene, sixteen at once, every other one streamed."""
    gate = asyncio.Semaphore(16)
    async with openai.AsyncOpenAI(base_url=f"{served.base_url}/v1", api_key=served.key, max_retries=3) as client:

        async def ask(number: int, scene: dict[str, Any]) -> dict[str, Any]:
            async with gate:
                return await (ask_streamed if number % 2 else ask_whole)(client, request(number, scene))

        answers = await asyncio.gather(*(ask(number, scene) for number, scene in enumerate(scenes)))
    return {scene["id"]: answer for scene, answer in zip(scenes, answers, strict=True)}


def request(number: int, scene: dict[str, Any]) -> dict[str, Any]:
    """What the job asks of the same row."""
    url = f"data:image/png;base64,{base64.b64encode(scene['image']['bytes']).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": scene["question"]}]
    mode = MODES[int(scene["id"].split("-")[1]) % 3]
    return {
        "model": "r4b",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "extra_body": {"chat_template_kwargs": {"thinking_mode": mode}},
    }


async def ask_whole(client: openai.AsyncOpenAI, body: dict[str, Any]) -> dict[str, Any]:
    """One answer in a piece."""
    response = await client.chat.completions.create(**body)
    choice = response.choices[0]
    reasoning = getattr(choice.message, "reasoning", None)
    return to_row(reasoning, choice.message.content, choice.finish_reason, response.usage)


async def ask_streamed(client: openai.AsyncOpenAI, body: dict[str, Any]) -> dict[str, Any]:
    """One answer put together from a stream."""
    stream = await client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
    reasoning, content, finish_reason, usage = io.StringIO(), io.StringIO(), None, None
    async for event in stream:
        usage = event.usage or usage
        for choice in event.choices:
            reasoning.write(getattr(choice.delta, "reasoning", None) or "")
            content.write(choice.delta.content or "")
            finish_reason = choice.finish_reason or finish_reason
    return to_row(reasoning.getvalue() or None, content.getvalue() or None, finish_reason, usage)


def to_row(reasoning: str | None, content: str | None, finish_reason: Any, usage: Any) -> dict[str, Any]:
    """An answer in batch's words."""
    return {
        "mode_chosen": "non-thinking" if reasoning is None else "thinking",
        "reasoning": reasoning,
        "answer": content,
        "finish_reason": finish_reason,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "reasoning_tokens": usage.completion_tokens_details.reasoning_tokens,
    }


@pytest.mark.parametrize("num_scenes", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_online_answers_are_those_of_a_batch_job(served: Served, tmp_path: Path, num_scenes: int) -> None:
    write_scene_shards(tmp_path / "input", num_scenes)
    batch = run_batch_job(tmp_path)
    online = asyncio.run(ask_all(served, read_scenes(tmp_path)))
    assert len(batch) == len(online) == num_scenes
    names = (*COMPARED, "reasoning_tokens")
    differing = {
        key: ({name: row[name] for name in names}, online[key])
        for key, row in batch.items()
        if {name: row[name] for name in names} != online[key]
    }
    assert differing == {}
    assert {row["mode_requested"] for row in batch.values()} == set(MODES)
    assert {row["mode_chosen"] for row in batch.values()} == {"thinking", "non-thinking"}
    assert any(row["thinking_truncated"] for row in batch.values())
    for row in online.values():
        assert "think>" not in f"{row['reasoning']}{row['answer']}"
