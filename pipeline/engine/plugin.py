"""What vLLM must know of R-4B in every process, under the entry point group `vllm.general_plugins` (pyproject.toml).

vLLM calls `register` in the process that serves, in its engine core and in its workers, also where R-4B is not used,
and more than once. So it only leaves names: what stands behind them is imported by the first who asks for it.
Not covered: choosing them. That is `--reasoning-parser r4b`, and `VLLM_MEDIA_CONNECTOR=r4b` in the environment.
"""

from typing import Any

NAME = "r4b"


def register() -> None:
    """Give vLLM the reasoning parser and the media connector `r4b`; safe to call again."""
    from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY
    from vllm.reasoning import ReasoningParserManager

    ReasoningParserManager.register_lazy_module(NAME, "pipeline.engine.reasoning", "R4BReasoningParser")
    MEDIA_CONNECTOR_REGISTRY.register(NAME)(_open_media_connector)


def _open_media_connector(*args: Any, **kwargs: Any) -> Any:
    # vLLM's registry keeps classes and has no lazy form, but it does no more than call what it keeps.
    from pipeline.engine.media import R4BMediaConnector

    return R4BMediaConnector(*args, **kwargs)
