"""The baseline of `batch_overhead`: the same rows through a bare AsyncLLM, without Ray, parts or error rows.

    python -m benchmarks.bare_loop JOB.yaml

Prints one JSON line: when the engine was ready, when the last row was answered, how many rows.
"""

import asyncio
import io
import json
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image
from vllm import SamplingParams
from vllm.renderers.params import ChatParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from jobs.spec_file import load_spec
from pipeline.engine.vllm_engine import spec_to_args
from pipeline.spec import JobSpec


def read_rows(job: JobSpec) -> list[tuple[Image.Image, str]]:
    """All rows, decoded beforehand: reading is not part of the baseline's time."""
    shards = sorted(Path(job.input.urls[0]).glob("*.parquet"))
    rows = [row for shard in shards for row in pq.ParquetFile(shard).read(["image", "question"]).to_pylist()]
    return [(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"), row["question"]) for row in rows]


async def answer(llm: AsyncLLM, params: SamplingParams, image: Image.Image, question: str) -> str:
    content: Any = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": question}]
    chat = ChatParams(chat_template_kwargs={"thinking_mode": "auto", "add_generation_prompt": True})
    _, (prompt,) = await llm.renderer.render_chat_async([[{"role": "user", "content": content}]], chat)
    (final,) = [output async for output in llm.generate(prompt, params, uuid.uuid4().hex)]
    return str(final.outputs[0].text)


async def run(job: JobSpec) -> dict[str, Any]:
    rows = read_rows(job)
    llm = AsyncLLM.from_engine_args(spec_to_args(job.engine))
    ready_at = time.time()
    params = SamplingParams(
        temperature=0.0, seed=0, max_tokens=job.sampling.max_tokens, output_kind=RequestOutputKind.FINAL_ONLY
    )
    answers = await asyncio.gather(*(answer(llm, params, image, question) for image, question in rows))
    done_at = time.time()
    llm.shutdown()
    return {"ready_at": ready_at, "done_at": done_at, "rows": len(answers)}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(load_spec(sys.argv[1])))))
