"""Engines: one vLLM instance with R-4B (`vllm_engine`), or a simulation of it (`simulated`), behind one contract.

`contract.py` says what an engine takes and gives; `models.py` what a model is; `open_engine` picks the engine. Only
`vllm_engine.py` imports vllm.
"""

from pipeline.engine.contract import Engine, EngineRequest
from pipeline.spec import EngineSpec

__all__ = ["Engine", "EngineRequest", "open_engine"]


async def open_engine(spec: EngineSpec) -> Engine:
    """Start the engine that the spec names; raises JobError when it does not start."""
    if spec.kind == "simulated":
        from pipeline.engine.simulated import SimulatedEngine

        return SimulatedEngine(spec)
    from pipeline.engine.vllm_engine import VLLMEngine

    return await VLLMEngine.start(spec)
