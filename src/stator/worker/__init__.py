"""The engine kit: what an engine is, and the worker that puts one on the network.

An engine implements `LLMEngine`; `Worker` starts it, serves it, registers its model, and ends it in order. `Choices` turns
one request for n answers into n requests for one. `stator.testing.engine_suite` holds any engine to the contract.
"""

from stator.worker.choices import Choices
from stator.worker.config import WorkerConfig
from stator.worker.engine import EngineConfig, LLMEngine
from stator.worker.registration import model_record
from stator.worker.worker import EXIT_DEADLINE, EXIT_FAILED, EXIT_OK, ServedEndpoint, Worker, WorkerHost

__all__ = [
    "EXIT_DEADLINE",
    "EXIT_FAILED",
    "EXIT_OK",
    "Choices",
    "EngineConfig",
    "LLMEngine",
    "ServedEndpoint",
    "Worker",
    "WorkerConfig",
    "WorkerHost",
    "model_record",
]
