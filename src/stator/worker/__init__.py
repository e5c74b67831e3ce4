"""The engine kit: what an engine is, and the worker that puts one on the network.

An engine implements `LLMEngine`, or is a function in a `FunctionEngine`; `Worker` starts it, serves it, registers its model, publishes
what it knows (`SnapshotPublisher`, `WorkerMetricsPublisher`, KV events), and ends it in order. `Choices` turns one request for n
answers into n requests for one. `stator.testing.engine_suite` holds any engine to the contract.
"""

from stator.worker.choices import Choices
from stator.worker.config import WorkerConfig
from stator.worker.engine import EngineCommand, EngineConfig, LLMEngine
from stator.worker.engine_metrics import EngineMetrics
from stator.worker.function_engine import FunctionEngine, FunctionOptions
from stator.worker.host import ServedEndpoint, WorkerHost
from stator.worker.load_publisher import WorkerMetricsPublisher
from stator.worker.registration import model_record
from stator.worker.snapshot import ComponentSnapshot, SnapshotSink
from stator.worker.snapshot_publisher import SnapshotPublisher
from stator.worker.worker import EXIT_DEADLINE, EXIT_FAILED, EXIT_OK, Worker

__all__ = [
    "EXIT_DEADLINE",
    "EXIT_FAILED",
    "EXIT_OK",
    "Choices",
    "ComponentSnapshot",
    "EngineCommand",
    "EngineConfig",
    "EngineMetrics",
    "FunctionEngine",
    "FunctionOptions",
    "LLMEngine",
    "ServedEndpoint",
    "SnapshotPublisher",
    "SnapshotSink",
    "Worker",
    "WorkerConfig",
    "WorkerHost",
    "WorkerMetricsPublisher",
    "model_record",
]
