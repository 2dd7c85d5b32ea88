"""R-4B on vLLM: one `AsyncLLM`, the same for batch and online. The one module that imports vllm.

Prompts are rendered by vLLM's own renderer with the checkpoint's chat template, exactly as its OpenAI server does.
Not covered: HTTP, and restarting: an engine that died stays dead.
"""

import asyncio
import copy
import dataclasses
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

# Read by vLLM when it is imported. Several engines on one machine must not be bound to the same core, and Ray
# limits an engine's threads already. Logs below warnings would drown the job's own.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# FlashInfer's sampler is compiled when an engine starts, with nvcc, which a machine that has only the driver lacks.
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.renderers.params import ChatParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from pipeline.engine.contract import MAX_IMAGES, EngineRequest
from pipeline.engine.online_llm import EngineGoneError
from pipeline.engine.thought_text import Reading, prompt_to_tail, read_whole
from pipeline.errors import EngineDiedError, JobError, SampleError
from pipeline.images import open_fitted
from pipeline.records import Generation, Mode
from pipeline.spec import EngineSpec, SamplingSpec
from pipeline.thinking import CLOSE_TAG, OPEN_TAG, Tags, Thought, mode_of, split_thought
from pipeline.tiling import tiling_of_config

DEFAULT_ARGS: dict[str, Any] = {
    "limit_mm_per_prompt": {"image": MAX_IMAGES},
    "generation_config": "vllm",  # sampling is the job's, never the checkpoint's
    "disable_log_stats": True,
    # vLLM's 4 GiB default is held twice, in this process and in the engine core's.
    "mm_processor_cache_gb": 1,
}

IN_ENGINE_CORE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""vLLM's executor for one device, by its class: on a CPU the name `uni` is taken for `mp`, a second process, which vLLM
needs for binding threads to cores. The two spin while they wait for each other: 70 ms of processor time for an answer
of 40 tokens of the small checkpoint, 45 in one process, which also starts 15 s sooner (two cores).
"""


def engine_arg_names() -> frozenset[str]:
    """What `engine.args` may hold."""
    return frozenset(field.name for field in dataclasses.fields(AsyncEngineArgs))


def spec_to_args(spec: EngineSpec) -> AsyncEngineArgs:
    """vLLM's arguments for a spec; raises JobError for one that vLLM does not know."""
    if unknown := sorted(set(spec.args) - engine_arg_names()):
        raise JobError(f"engine.args.{unknown[0]}: vLLM's AsyncEngineArgs has no argument of this name.")
    own = {
        "model": spec.model,
        "revision": spec.revision,
        "tensor_parallel_size": spec.tensor_parallel_size,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_num_seqs,
    }
    by_platform = {}
    if current_platform.is_cpu() and spec.tensor_parallel_size == spec.args.get("pipeline_parallel_size", 1) == 1:
        by_platform["distributed_executor_backend"] = IN_ENGINE_CORE
    return AsyncEngineArgs(**{**DEFAULT_ARGS, **by_platform, **spec.args, **own})


class VLLMEngine:
    """The engine contract on a running AsyncLLM. Build it with `start`, inside the event loop that will use it."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.llm = llm
        # A copy: the renderer's threads use theirs at the same time, and fast tokenizers are not thread-safe.
        self._tokenizer: Any = copy.deepcopy(llm.renderer.get_tokenizer())
        self.tags = self._find_tags()
        self._max_model_len = llm.model_config.max_model_len
        self.tiling = tiling_of_config(llm.model_config.hf_config.to_dict())

    @classmethod
    async def start(
        cls, spec: EngineSpec, llm_class: type[AsyncLLM] = AsyncLLM, stat_loggers: Any = None
    ) -> "VLLMEngine":
        """Load the model; raises JobError, with vLLM's own words, when that fails."""
        try:
            return cls(llm_class.from_engine_args(spec_to_args(spec), stat_loggers=stat_loggers))
        except JobError:
            raise
        except Exception as error:  # a model that does not load fails in as many ways as vLLM has code paths
            raise JobError(f"The engine did not start with {spec.model}: {_one_line(error)}") from error

    def _find_tags(self) -> Tags:
        open_id, close_id = (self._tokenizer.convert_tokens_to_ids(tag) for tag in (OPEN_TAG, CLOSE_TAG))
        if None in (open_id, close_id) or self._tokenizer.unk_token_id in (open_id, close_id):
            raise JobError(f"The model has no {OPEN_TAG} and {CLOSE_TAG} tokens: it does not mark its thoughts.")
        end = self.llm.model_config.try_get_generation_config().get("eos_token_id")
        ends = {self._tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])}
        return Tags(open_id, close_id, frozenset(ends - {None}))

    async def generate(self, request: EngineRequest) -> Generation:
        """As the contract says. `latency_s` runs from here, rendering included, to the last token."""
        start = time.monotonic()
        output, image_tokens = await self.complete(request)
        return self._to_generation(output, image_tokens, time.monotonic() - start)

    async def complete(self, request: EngineRequest) -> tuple[RequestOutput, int]:
        """vLLM's own output for a request, with its token ids, and the number of image tokens in its prompt."""
        final, image_tokens = await self._complete_once(request)
        if final.outputs[0].finish_reason == "error":
            # vLLM calls these retryable: an image may have left its cache since it was rendered, for instance.
            final, image_tokens = await self._complete_once(request)
        _check_finished(final)
        return final, image_tokens

    async def _complete_once(self, request: EngineRequest) -> tuple[RequestOutput, int]:
        prompt = await self._render(request)
        params = self._sampling_params(request.sampling, len(prompt["prompt_token_ids"]))
        try:
            outputs = self.llm.generate(prompt, params, uuid.uuid4().hex, priority=request.priority)
            (final,) = [output async for output in outputs]  # FINAL_ONLY: there is one
        except VLLMClientError as error:
            raise _to_sample_error(error) from error
        except (EngineDeadError, EngineGoneError, EngineGenerateError) as error:
            raise EngineDiedError(f"The engine died: {_one_line(error)}") from error
        placeholders = prompt.get("mm_placeholders", {}).get("image", ())
        return final, sum(place.get_num_embeds() for place in placeholders)

    async def _render(self, request: EngineRequest) -> Any:
        """The rendered, tokenized prompt with its images (vLLM's EngineInput); raises SampleError."""
        params = ChatParams(chat_template_kwargs=self._template_kwargs(request))
        # In a thread: decoding would hold up every other request of this event loop.
        pictures = await asyncio.to_thread(lambda: [open_fitted(image, self.tiling) for image in request.images])
        prompt = await self._render_chat(_place_images(request, pictures), params)
        length = len(prompt["prompt_token_ids"])
        if length >= self._max_model_len:
            raise SampleError(
                "prompt_too_long", f"The prompt has {length} tokens, the model takes {self._max_model_len}."
            )
        return prompt

    async def _render_chat(self, messages: Any, params: ChatParams) -> Any:
        """vLLM's rendering, whose limit of 30 s counts the time that this process was stopped, too: tried twice.

        Raises SampleError, or EngineDiedError for what took too long twice: a template that hangs keeps its thread.
        """
        for is_last in (False, True):
            try:
                _, (prompt,) = await self.llm.renderer.render_chat_async([messages], params)
                return prompt
            except TimeoutError as error:
                if is_last:
                    raise EngineDiedError(f"The engine hangs: {_one_line(error)}") from error
            except (VLLMClientError, ValueError, TypeError) as error:
                raise _to_sample_error(error) from error
            except Exception as error:  # vLLM and Jinja have plain ones for what is wrong with one prompt
                raise SampleError("engine_error", f"vLLM cannot render the prompt: {_one_line(error)}") from error
        raise AssertionError("never here")

    def _template_kwargs(self, request: EngineRequest) -> dict[str, Any]:
        return {"thinking_mode": request.thinking_mode, "add_generation_prompt": True}

    def _sampling_params(self, sampling: SamplingSpec, prompt_tokens: int) -> SamplingParams:
        values = sampling.model_dump()
        values["max_tokens"] = min(sampling.max_tokens, self._max_model_len - prompt_tokens)
        values["stop"] = list(sampling.stop)
        return SamplingParams(**values, output_kind=RequestOutputKind.FINAL_ONLY, detokenize=bool(sampling.stop))

    def _to_generation(self, output: RequestOutput, image_tokens: int, latency_s: float) -> Generation:
        completion = output.outputs[0]
        prompt_ids = output.prompt_token_ids or []
        thought, mode = self.split(prompt_ids, completion.token_ids)
        # vLLM's text ends before a stop string, which its tokens hold
        num_chars = len(completion.text) if isinstance(completion.stop_reason, str) else math.inf
        reasoning, answer = read_whole(self._reading(prompt_ids), completion.token_ids, num_chars)
        return Generation(
            mode_chosen=mode,
            reasoning=reasoning,
            answer=answer,
            finish_reason=str(completion.finish_reason),
            thinking_truncated=thought.answer_ids is None,
            prompt_tokens=len(prompt_ids),
            image_tokens=image_tokens,
            completion_tokens=len(completion.token_ids),
            reasoning_tokens=len(thought.reasoning_ids),
            answer_tokens=len(thought.answer_ids or ()),
            latency_s=latency_s,
        )

    def split(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> tuple[Thought, Mode]:
        """A completion's thought and answer as tokens, and the mode that this makes."""
        thought = split_thought(prompt_to_tail(prompt_ids, self.tags), token_ids, self.tags)
        return thought, mode_of(thought, self._decode(thought.reasoning_ids))

    def _reading(self, prompt_ids: Sequence[int]) -> Reading:
        return Reading(self.tags, self._decode, prompt_to_tail(prompt_ids, self.tags))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    async def check_health(self) -> None:
        """Raise EngineDiedError once the engine's processes are gone."""
        try:
            await self.llm.check_health()
        except EngineDeadError as error:
            raise EngineDiedError(f"The engine died: {_one_line(error)}") from error

    async def check(self) -> None:
        """As the contract says: the engine core answers such questions between two steps."""
        try:
            await self.llm.is_sleeping()
        except EngineDeadError as error:
            raise EngineDiedError(f"The engine died: {_one_line(error)}") from error

    def shutdown(self) -> None:
        """As the contract says."""
        self.llm.shutdown()


def _check_finished(output: RequestOutput) -> None:
    """vLLM gives requests that it gave up as outputs like any other; raises SampleError, or EngineDiedError."""
    reason = output.outputs[0].finish_reason
    if reason == "abort":  # nobody here aborts one: the engine is being stopped from outside
        raise EngineDiedError("The engine gave up its requests: it is being stopped.")
    if reason not in ("stop", "length"):
        raise SampleError("engine_error", f"vLLM ended the request with {reason!r}.")


def _place_images(request: EngineRequest, pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """The messages with each `{"type": "image"}` part replaced by the next image."""
    images = iter(pictures)
    messages = []
    for message in request.messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [_place(part, images) for part in content]
        messages.append({**message, "content": content})
    return messages


def _place(part: Mapping[str, Any], images: Iterator[Image.Image]) -> Mapping[str, Any]:
    if part["type"] != "image":
        return part
    image = next(images, None)
    if image is None:
        raise SampleError("request_invalid", "The messages name more images than the request holds.")
    return {"type": "image_pil", "image_pil": image}


def _to_sample_error(error: Exception) -> SampleError:
    too_long = isinstance(error, VLLMValidationError) and error.parameter in ("input_text", "input_tokens")
    return SampleError("prompt_too_long" if too_long else "request_invalid", _one_line(error))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
