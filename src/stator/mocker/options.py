"""Settings of the simulated engine, and the parts they describe."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from stator.config import Config, Setting
from stator.errors import ConfigError
from stator.mocker.blocks import BlockPool
from stator.mocker.profile import load_profile
from stator.mocker.scheduler import Limits, Scheduler
from stator.mocker.timing import FormulaTiming, PassTiming

__all__ = ["MockerOptions"]


class MockerOptions(Config, frozen=True, kw_only=True):
    """Settings of the simulated engine; those of the reference's mocker have its names and defaults (`spec/50 §23`)."""

    section: ClassVar[str] = "mocker"

    model: Annotated[str, Setting(doc="directory of a model whose tokenizer is used; empty: the built-in byte tokenizer")] = ""
    name: Annotated[str, Setting(doc="model name to serve when no directory is given")] = "mocker"
    num_gpu_blocks: Annotated[int, Setting(doc="KV blocks of each rank", unit="blocks", ge=1, le=2**31)] = 16384
    block_size: Annotated[int, Setting(doc="tokens per KV block", unit="tokens", ge=1, le=65536)] = 64
    max_num_seqs: Annotated[int, Setting(doc="requests that generate at once, per rank", ge=1)] = 256
    max_num_batched_tokens: Annotated[
        int,
        Setting(doc="tokens of one forward pass: prompt tokens, and one for each request that generates", unit="tokens", ge=1),
    ] = 8192
    enable_prefix_caching: Annotated[bool, Setting(doc="whether blocks of equal beginnings are used again")] = True
    enable_chunked_prefill: Annotated[bool, Setting(doc="whether a prompt may be computed in several passes")] = True
    preemption_mode: Annotated[
        Literal["lifo", "fifo"],
        Setting(doc="who gives up its blocks when there are none left: the newest request or the oldest"),
    ] = "lifo"
    watermark: Annotated[
        float, Setting(doc="share of the blocks that admitting a request must leave free while others run", ge=0, lt=1)
    ] = 0.0
    speedup_ratio: Annotated[float, Setting(doc="all times are divided by this", ge=0)] = 1.0
    decode_speedup_ratio: Annotated[float, Setting(doc="the decoding part of a pass is divided by this as well", ge=0)] = 1.0
    planner_profile_data: Annotated[
        Path | None, Setting(doc="NPZ file with measured times of prefill and decoding; none: the reference's formulas")
    ] = None
    data_parallel_size: Annotated[int, Setting(doc="ranks, each with blocks and a scheduler of its own", ge=1, le=1024)] = 1
    startup_time: Annotated[float, Setting(doc="time the start takes", unit="s", ge=0, le=86400)] = 0.0
    context_length: Annotated[
        int | None,
        Setting(doc="longest prompt and answer together; none: as long as the blocks of a rank reach", unit="tokens", ge=2),
    ] = None
    default_max_tokens: Annotated[
        int, Setting(doc="length of an answer when the request does not say", unit="tokens", ge=1)
    ] = 128
    max_waiting: Annotated[int, Setting(doc="requests per rank that may wait for a slot before others are refused", ge=0)] = (
        4096
    )
    vocabulary: Annotated[
        Literal["auto", "letters", "reference"],
        Setting(doc="tokens of the answers: letters and spaces, or ids 1000 to 1999; auto: letters with the byte tokenizer"),
    ] = "auto"
    seed: Annotated[int, Setting(doc="the same seed and request give the same answer", ge=0)] = 0
    fail_after: Annotated[
        float | None,
        Setting(doc="time after the start at which the engine dies, for tests of what follows; none: never", unit="s", gt=0),
    ] = None

    def check(self) -> None:
        for name in ("speedup_ratio", "decode_speedup_ratio"):
            if not getattr(self, name):
                raise ConfigError(
                    f"MockerOptions.{name} = 0: a pass without duration cannot be simulated in real time (the reference takes 0 for 1); "
                    "for an engine that hardly waits give a large value such as 1000"
                )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"MockerOptions.max_num_batched_tokens = {self.max_num_batched_tokens} is less than max_num_seqs = {self.max_num_seqs}: "
                "a pass must have room for one token of each request that generates"
            )
        if self.context_length is not None and self.context_length > self.longest:
            raise ConfigError(f"MockerOptions.context_length = {self.context_length}: {self._reach()}")
        if self.longest < 2:
            raise ConfigError(f"MockerOptions: {self._reach()}, and the shortest prompt with an answer has 2")

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence a rank can compute."""
        reach = self.num_gpu_blocks * self.block_size
        return reach if self.enable_chunked_prefill else min(reach, self.max_num_batched_tokens)

    @property
    def context(self) -> int:
        """The effective limit of prompt and answer together, in tokens."""
        return self.context_length or self.longest

    def _reach(self) -> str:
        text = f"{self.num_gpu_blocks} blocks of {self.block_size} hold {self.num_gpu_blocks * self.block_size} tokens"
        if not self.enable_chunked_prefill:
            text += f", and without chunked prefill a pass of {self.max_num_batched_tokens} is the limit"
        return text

    def timing(self) -> PassTiming:
        """How long passes take. Blocks if there is a profile to read; raises `ConfigError` if it cannot be."""
        if self.planner_profile_data is None:
            return FormulaTiming(
                capacity=self.num_gpu_blocks, speedup=self.speedup_ratio, decode_speedup=self.decode_speedup_ratio
            )
        return load_profile(
            self.planner_profile_data,
            block_size=self.block_size,
            speedup=self.speedup_ratio,
            decode_speedup=self.decode_speedup_ratio,
        )

    def scheduler(self, timing: PassTiming, *, record: bool = False) -> Scheduler:
        """One rank; with `record` its pool keeps the changes of the cache."""
        limits = Limits(
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            prefix_caching=self.enable_prefix_caching,
            chunked_prefill=self.enable_chunked_prefill,
            oldest_first=self.preemption_mode == "fifo",
            reserve=int(self.watermark * self.num_gpu_blocks),
        )
        return Scheduler(BlockPool(self.num_gpu_blocks, record=record and self.enable_prefix_caching), timing, limits)
