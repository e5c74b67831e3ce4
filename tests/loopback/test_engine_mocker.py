"""The simulated engine keeps the contract of engines."""

from stator.mocker.engine import MockerEngine, MockerOptions
from stator.testing.engine_suite import EngineSuite
from stator.worker.engine import LLMEngine


class TestMockerEngine(EngineSuite):
    """The defaults, a little faster."""

    def make(self) -> LLMEngine:
        return MockerEngine(MockerOptions(speedup_ratio=20, max_num_seqs=64))


class TestFastMockerEngine(EngineSuite):
    """Several tokens per item, two ranks, and blocks so scarce that requests are preempted."""

    def make(self) -> LLMEngine:
        return MockerEngine(
            MockerOptions(
                speedup_ratio=100,
                max_num_seqs=8,
                max_num_batched_tokens=64,
                data_parallel_size=2,
                num_gpu_blocks=2600,
                block_size=4,
            )
        )
