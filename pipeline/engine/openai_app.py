"""vLLM's own OpenAI app over a running VLLMEngine: its protocol models, its errors, its streaming.

What is ours: which of its routes are served, limits on a request (`chat_limits`), the reasoning parser, and that a
request which meets a dead engine is told to come again.
Not covered: keys, sizes, logs (the gate that a deployment puts before this app), and restarting a dead engine.
"""

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from vllm.config import StructuredOutputsConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

from pipeline.engine.chat_limits import ChatLimits, check_json, check_request
from pipeline.engine.media import MediaSettings, configure_media
from pipeline.engine.online_llm import EngineGoneError, OnlineLLM
from pipeline.engine.reasoning import R4BParser
from pipeline.engine.vllm_engine import VLLMEngine
from pipeline.records import Mode
from pipeline.spec import EngineSpec

SERVED_PATHS = ("/v1/chat/completions", "/v1/models", "/health", "/version")
TASKS: Any = ("generate",)

ONLINE_ARGS: dict[str, Any] = {
    "reasoning_parser": "r4b",
    "scheduling_policy": "priority",  # rows of a batch job come after people
    "disable_log_stats": False,
    # JSON that a grammar lets be padded with white space is, by a small model, until max_tokens.
    "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
}
"""vLLM arguments that online serving adds to those of a batch engine; `engine.args` may override them."""


@dataclass(frozen=True)
class OpenAISettings:
    """How the app presents the model, and what it takes."""

    model_name: str
    limits: ChatLimits
    media: MediaSettings


@dataclass(frozen=True)
class FinishedChoice:
    """One completion: `reasoning_tokens` and `answer_tokens` as batch stores them."""

    mode: Mode
    finish_reason: str
    reasoning_tokens: int
    answer_tokens: int


class RequestMetrics(RayPrometheusStatLogger):  # type: ignore[misc]  # vLLM has no types
    """vLLM's figures, in Ray, but for the one that has a value for each token.

    Ray's metrics process writes every value of a histogram anew, 0.1 ms each: ten thousand tokens a second would take
    all of a core. `request_time_per_output_token_seconds` tells of the same, once a request.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        by_engine: dict[int, Any] = self.histogram_inter_token_latency  # type: ignore[has-type]
        self.histogram_inter_token_latency = dict.fromkeys(by_engine, _Unheard())


class _Unheard:
    """Stands for a histogram."""

    def observe(self, _: float) -> None: ...


async def start_online_engine(
    spec: EngineSpec, on_finished: Callable[[FinishedChoice], None], max_prompt_tokens: int | None
) -> VLLMEngine:
    """An engine for `build_openai_app`, whose metrics go to Ray; raises JobError when it does not start."""
    online = spec.model_copy(update={"args": {**ONLINE_ARGS, **spec.args}})
    engine = await VLLMEngine.start(online, OnlineLLM, [RequestMetrics])

    def finish(prompt_ids: Sequence[int], token_ids: Sequence[int], finish_reason: str) -> None:
        thought, mode = engine.split(prompt_ids, token_ids)
        on_finished(FinishedChoice(mode, finish_reason, len(thought.reasoning_ids), len(thought.answer_ids or ())))

    llm: Any = engine.llm
    llm.on_finished, llm.max_prompt_tokens = finish, max_prompt_tokens
    return engine


async def build_openai_app(engine: VLLMEngine, settings: OpenAISettings) -> FastAPI:
    """vLLM's app, ready for requests; its other routes exist but must not be reached (see SERVED_PATHS)."""
    os.environ["VLLM_MEDIA_CONNECTOR"] = "r4b"  # vLLM's own reads files and resolves names without our rules
    configure_media(settings.media)
    args = _arguments(engine, settings)
    app: FastAPI = build_app(args, TASKS)
    await init_app_state(engine.llm, app.state, args, TASKS)
    chat = app.state.openai_serving_chat
    chat.override_max_tokens = settings.limits.max_tokens
    chat.parser_cls = R4BParser.with_tags(engine.tags)
    chat.render_chat_request = check_rendered(chat.render_chat_request, engine.llm.check_length)
    app.state.openai_serving_chat = CheckedChat(chat, settings.limits)
    app.dependency_overrides[validate_json_request] = _check_body
    app.exception_handler(RequestValidationError)(_show_invalid)
    app.middleware_stack = app.build_middleware_stack()  # vLLM built it already, with its own handler
    _trim_openapi(app)
    return app


def check_rendered(render: Callable[[Any], Any], check: Callable[[Any], None]) -> Callable[[Any], Any]:
    """vLLM's `render_chat_request`, which also checks each prompt that it makes: before a stream has begun."""

    async def render_checked(request: ChatCompletionRequest) -> Any:
        result = await render(request)
        if isinstance(result, tuple):  # otherwise it is an error
            for prompt in result[1]:
                check(prompt)
        return result

    return render_checked


async def _check_body(raw_request: Request) -> None:
    """In place of vLLM's check of the media type, which the gate makes: what runs before pydantic reads the body."""
    check_json(await raw_request.json())


async def _show_invalid(_: Request, error: Exception) -> JSONResponse:
    """The first thing that is wrong; vLLM's own handler quotes what the client sent."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    where = ".".join(str(part) for part in first["loc"][1:] if "[" not in str(part))[:100]
    message = f"{where or 'body'}: {cause if first['type'] == 'json_invalid' else first['msg']}"
    body = {"message": message, "type": "BadRequestError", "param": where or None, "code": 400}
    return JSONResponse({"error": body}, 400)


def _arguments(engine: VLLMEngine, settings: OpenAISettings) -> Namespace:
    """vLLM's front-end arguments at their defaults, but for those that name the model or open the server up."""
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    args.model = settings.model_name  # it is shown as the model's `root`, and a path is nobody's business
    args.served_model_name = [settings.model_name]
    args.structured_outputs_config = engine.llm.vllm_config.structured_outputs_config
    args.disable_log_stats = True  # its loop only writes to the log; the metrics do not need it
    args.allowed_origins = []  # vLLM's default lets any web page call the server
    args.disable_fastapi_docs = False
    args.enable_prompt_tokens_details = True
    args.enable_log_requests = False
    return args


class CheckedChat:
    """vLLM's chat serving with our checks before it."""

    def __init__(self, chat: Any, limits: ChatLimits) -> None:
        self._chat = chat
        self._limits = limits

    async def create_chat_completion(self, request: ChatCompletionRequest, raw_request: Any) -> Any:
        """As vLLM's; raises VLLMError, which vLLM's handlers turn into a response."""
        check_request(request, self._limits)
        try:
            return await self._chat.create_chat_completion(request, raw_request)
        except (EngineDeadError, EngineGenerateError) as error:  # for these vLLM's handler would end its own server
            raise EngineGoneError from error
        except GenerationError as error:
            if request.response_format is None and request.structured_outputs is None:
                raise
            # xgrammar takes a schema that nothing can meet, and vLLM finds out at the first token
            raise VLLMValidationError("No answer can keep to what the request asks of it.") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chat, name)


def _trim_openapi(app: FastAPI) -> None:
    """The document names what is served, nothing else."""
    document = app.openapi()
    document["info"] = {"title": "R-4B", "version": document["info"]["version"]}
    document["paths"] = {path: item for path, item in document["paths"].items() if path in SERVED_PATHS}
    app.openapi_schema = document
