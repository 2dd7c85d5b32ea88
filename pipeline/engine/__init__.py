"""Engines: one vLLM instance with R-4B (`vllm_engine`), a simulation of it (`simulated`), or a running deployment to
which rows are sent (`served`), behind one contract.

`contract.py` says what an engine takes and gives; `models.py` what a model is; `open_engine` picks the engine.
`window.py` bounds what is sent. Of what is here for serving: `openai_app.py` is vLLM's HTTP app over an engine,
`online_llm.py`, `chat_limits.py`, `reasoning.py`, `media.py` and `plugin.py` what it needs.
"""

from collections.abc import Mapping

from pipeline.engine.contract import Engine, EngineRequest
from pipeline.spec import EngineSpec

__all__ = ["Engine", "EngineRequest", "open_engine"]


async def open_engine(spec: EngineSpec, made_with: Mapping[str, str] | None = None) -> Engine:
    """Start the engine that the spec names, or find it; raises JobError when there is none.

    `made_with` is the job's fingerprint, by name: a deployment, which may change, answers for no other.
    """
    if spec.pool == "serve":
        from pipeline.engine.served import ServedEngine

        return await ServedEngine.start(spec, made_with or {})
    if spec.kind == "simulated":
        from pipeline.engine.simulated import SimulatedEngine

        return SimulatedEngine(spec)
    from pipeline.engine.vllm_engine import VLLMEngine

    return await VLLMEngine.start(spec)
