"""Any causal language model of the transformers library, on CPU or GPU, several requests at once."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Annotated, ClassVar

import msgspec

from stator.config import Config, Setting
from stator.engines.arguments import missing_extra
from stator.engines.block_ledger import BlockLedger
from stator.engines.model_options import ContextLength, ModelName, ModelSource, need_model
from stator.engines.sequence import Finish, Sequence, TokenChoice
from stator.engines.step_thread import StepResult, StepThread
from stator.engines.token_inbox import TokenInbox
from stator.engines.translate import ModelLimits, sequence_for
from stator.errors import ConfigError, EngineError, Overloaded
from stator.llm.output import CompletionUsage, EngineOutput, TopLogprob
from stator.llm.request import PreprocessedRequest
from stator.runtime.context import Context
from stator.worker.engine import EngineConfig, LLMEngine
from stator.worker.snapshot import ComponentSnapshot, SnapshotSink

if TYPE_CHECKING:
    from stator.engines.loading import LoadedModel

__all__ = ["TransformersEngine", "TransformersOptions"]

_JOIN_LIMIT = 20.0
"""seconds a last step may take while the engine ends"""


class TransformersOptions(Config, frozen=True, kw_only=True):
    """Settings of the transformers engine."""

    section: ClassVar[str] = "transformers"

    model: ModelSource = ""
    name: ModelName = ""
    device: Annotated[str, Setting(doc="torch device, e.g. cpu or cuda:0; auto: a GPU if there is one")] = "auto"
    dtype: Annotated[
        str, Setting(doc="torch type of the weights, e.g. bfloat16; auto: the checkpoint's own on a GPU, float32 on the CPU")
    ] = "auto"
    context_length: ContextLength = None
    max_num_seqs: Annotated[int, Setting(doc="requests that generate at once", ge=1, le=4096)] = 16
    max_batch_rows: Annotated[
        int | None,
        Setting(
            doc="sequences per forward pass; none: all that generate; 1: each alone, bit for bit what generate() computes for "
            "prompts up to `max_prefill_tokens`",
            ge=1,
        ),
    ] = None
    max_waiting: Annotated[int, Setting(doc="requests that may wait for a slot before others are refused", ge=0)] = 64
    max_prefill_tokens: Annotated[
        int, Setting(doc="prompt tokens read per step before running requests get their turn", unit="tokens", ge=1)
    ] = 2048
    block_size: Annotated[int, Setting(doc="tokens in a KV block", unit="tokens", ge=1, le=4096)] = 16
    total_kv_blocks: Annotated[
        int | None,
        Setting(doc="KV blocks all requests share; none: as many as `max_num_seqs` requests of full length need", ge=1),
    ] = None
    threads: Annotated[int | None, Setting(doc="CPU threads of torch in this process; none: torch decides", ge=1)] = None
    seed: Annotated[int | None, Setting(doc="seed of the seeds that requests without one get; none: unpredictable", ge=0)] = (
        None
    )


class TransformersEngine(LLMEngine):
    """Continuous batching over one model; what a request leaves open, the model's generation config decides.

    With temperature 0, and for most models by default, the tokens are those of `model.generate(do_sample=False)`. In half
    precision, and where two tokens are equally likely to the last digit, batching and prompts read in parts may round differently.
    A request that is stopped, killed or abandoned gives up its slot before the next step, also while its prompt is being read.

    Key-value caches are accounted for in blocks. Requests wait until their prompts fit; when the answers outgrow what is there,
    the youngest request gives way and is read again later. No prefix is kept for other requests: there are no KV events, and the
    hit rate is unknown.
    """

    options_type = TransformersOptions

    def __init__(self, options: TransformersOptions) -> None:
        """Raises `ConfigError` without a model."""
        need_model("transformers", options.model)
        self.options = options
        self._report: Callable[[str], None] = lambda text: None
        self._seeds = random.Random(options.seed)
        self._limits: ModelLimits | None = None
        self._model: LoadedModel | None = None
        self._steps: StepThread | None = None
        self._ledger: BlockLedger | None = None
        self._snapshots: SnapshotSink | None = None
        self._inboxes: dict[Sequence, TokenInbox] = {}
        self._of_context: dict[Context, TokenInbox] = {}
        self._dead = asyncio.Event()
        self._death = ""

    @property
    def running(self) -> int:
        """Slots in use."""
        return self._steps.running if self._steps is not None else 0

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return self._steps.waiting if self._steps is not None else 0

    @property
    def preemptions(self) -> int:
        """How often a request gave its blocks back to be read again."""
        return self._steps.preemptions if self._steps is not None else 0

    def follow_progress(self, report: Callable[[str], None]) -> None:
        self._report = report

    async def start(self, instance_id: int) -> EngineConfig:
        """Loads the model in a thread.

        Raises `ConfigError` for a missing extra, an unknown model or settings it cannot have.
        """
        loop = asyncio.get_running_loop()

        def report(text: str) -> None:
            loop.call_soon_threadsafe(self._report, text)

        self._model = model = await asyncio.to_thread(_load, self.options, report)
        limits = model.limits
        self._ledger = ledger = self._block_ledger(limits.context_length)
        length = ledger.total * ledger.block_size
        if length < limits.context_length:
            limits = msgspec.structs.replace(limits, context_length=length, limited_by="the KV cache")
        self._limits = limits
        self._steps = StepThread(
            model.stepped,
            loop=loop,
            deliver=self._deliver,
            died=self._died,
            after_step=self._publish_snapshot,
            ledger=ledger,
            max_running=self.options.max_num_seqs,
            max_prefill_tokens=self.options.max_prefill_tokens,
        )
        return EngineConfig(
            model=self.options.model,
            card=model.card,
            served_name=self.options.name or None,
            context_length=limits.context_length,
            kv_cache_block_size=ledger.block_size,
            total_kv_blocks=ledger.total,
            max_num_seqs=self.options.max_num_seqs,
            max_num_batched_tokens=self.options.max_prefill_tokens,
        )

    def _block_ledger(self, context_length: int) -> BlockLedger:
        size, total = self.options.block_size, self.options.total_kv_blocks
        if total is None:
            total = self.options.max_num_seqs * -(-context_length // size)
        if total * size < 2:
            raise ConfigError(f"total_kv_blocks {total} of block_size {size} has no room for a prompt and an answer")
        return BlockLedger(total=total, block_size=size)

    def snapshot_ranks(self) -> tuple[int, ...]:
        return (0,)

    def attach_snapshots(self, sink: SnapshotSink) -> None:
        """Publishes after each step, and once now."""
        self._snapshots = sink
        self._publish_snapshot()

    def _publish_snapshot(self) -> None:
        """From the step thread, and once from the loop's."""
        if self._snapshots is None or self._ledger is None:
            return
        used, total = self._ledger.used, self._ledger.total
        self._snapshots.publish(0, ComponentSnapshot(kv_used_blocks=used, kv_total_blocks=total, gpu_cache_usage=used / total))

    async def failed(self) -> str:
        """Returns when the model cannot be stepped any more."""
        await self._dead.wait()
        return self._death

    def _died(self, reason: str) -> None:
        self._death = f"the model cannot be stepped any more: {reason}"
        for inbox in self._inboxes.values():
            inbox.put(None, None, EngineError(self._death, kind="EngineShutdown"))
        self._dead.set()

    def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        """Raises `Overloaded` at once when all slots and places in the queue are taken."""
        self._check_room()
        return self._answer(request, context)

    def _check_room(self) -> None:
        capacity = self.options.max_num_seqs + self.options.max_waiting
        if len(self._inboxes) >= capacity:
            raise Overloaded(f"{capacity} requests are running or waiting already", phase="accept")

    async def _answer(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        if self._steps is None or self._limits is None:
            raise EngineError("the engine is not running", kind="EngineShutdown")
        if self._death:
            raise EngineError(self._death, kind="EngineShutdown")
        sequence = sequence_for(request, self._limits, random_seed=lambda: self._seeds.getrandbits(63))
        if not sequence.max_tokens:
            yield _output(sequence, [], 0, Finish("length"))
            return
        self._check_room()
        steps, inbox = self._steps, TokenInbox()
        self._inboxes[sequence] = self._of_context[context] = inbox
        steps.submit(sequence)
        count = 0
        try:
            while True:
                choices, finish = await inbox.take()
                count += len(choices)
                if finish is None and context.is_stopped:
                    finish = Finish("cancelled")
                yield _output(sequence, choices, count, finish)
                if finish is not None:
                    return
        finally:
            del self._inboxes[sequence]
            self._of_context.pop(context, None)
            steps.withdraw(sequence)

    def _deliver(self, results: list[StepResult]) -> None:
        """One call per step, from the step thread."""
        for result in results:
            inbox = self._inboxes.get(result.sequence)
            if inbox is not None:
                error = result.error
                inbox.put(result.choice, result.finish, None if error is None else _engine_error(error))

    async def abort(self, context: Context) -> None:
        """Wakes the request, which then ends as `cancelled` and gives up its slot."""
        inbox = self._of_context.get(context)
        if inbox is not None:
            inbox.wake()

    async def cleanup(self) -> None:
        """Ends the step thread and lets go of the model; requests still running get an error."""
        for inbox in self._inboxes.values():
            inbox.put(None, None, EngineError("the engine is shutting down", kind="EngineShutdown"))
        steps, self._steps = self._steps, None
        if steps is not None:
            steps.close()
            if not await asyncio.to_thread(steps.join, _JOIN_LIMIT):
                raise EngineError(f"a step of the model took longer than {_JOIN_LIMIT:g} s", kind="EngineShutdown")
        model, self._model = self._model, None
        if model is not None:
            await asyncio.to_thread(model.free)


def _load(options: TransformersOptions, report: Callable[[str], None]) -> "LoadedModel":
    """Import torch, transformers and what uses them, here and nowhere else: it takes seconds, and they are an extra."""
    report("importing torch and transformers")
    try:
        from stator.engines.loading import load
    except ModuleNotFoundError as error:
        raise missing_extra("transformers", error) from error
    return load(
        options.model,
        device=options.device,
        dtype=options.dtype,
        context_length=options.context_length,
        max_rows=options.max_batch_rows or options.max_num_seqs,
        threads=options.threads,
        report=report,
    )


def _engine_error(error: Exception) -> EngineError:
    return error if isinstance(error, EngineError) else EngineError(f"{type(error).__name__}: {error}")


def _output(sequence: Sequence, choices: list[TokenChoice], count: int, finish: Finish | None) -> EngineOutput:
    """The next item: `count` tokens have been generated with these."""
    token_ids = [choice.token_id for choice in choices]
    if finish is None and sequence.sampling.logprobs is None:
        return EngineOutput(token_ids=token_ids)
    log_probs = top = usage = stop_reason = None
    if sequence.sampling.logprobs is not None:
        log_probs = [choice.logprob for choice in choices]
        top = [[TopLogprob(rank=t.rank, token_id=t.token_id, logprob=t.logprob) for t in choice.top] for choice in choices]
    if finish is not None:
        prompt = sequence.prompt_length
        usage = CompletionUsage(prompt_tokens=prompt, completion_tokens=count, total_tokens=prompt + count)
        stop_reason = finish.token_id if finish.reason == "stop" else None
    return EngineOutput(
        token_ids=token_ids,
        log_probs=log_probs,
        top_logprobs=top,
        finish_reason=finish.reason if finish is not None else None,
        stop_reason=stop_reason,
        completion_usage=usage,
    )
