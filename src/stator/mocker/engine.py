"""A simulated engine for workers: it has no model, but blocks, batches and delays like one that has (`spec/50 §23`)."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path

from msgspec import UNSET

from stator.clock import Clock
from stator.errors import ConfigError, EngineError, Overloaded
from stator.kv.sources import KvEventSource, PushSource
from stator.llm.card import ModelCard, byte_card, card_from_directory
from stator.llm.output import CompletionUsage, EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.mocker.answer import LETTERS, REFERENCE, Answer
from stator.mocker.options import MockerOptions
from stator.mocker.rank import Rank
from stator.mocker.sequence import Phase
from stator.runtime.context import Context
from stator.tasks import SystemClock
from stator.worker.engine import EngineConfig, LLMEngine
from stator.worker.snapshot import SnapshotSink

__all__ = ["MockerEngine", "MockerOptions"]


class MockerEngine(LLMEngine):
    """Answers have `max_tokens` made-up tokens, the same for the same request and seed, and end with `length`.

    Each data-parallel rank has blocks and a scheduler of its own; `routing.dp_rank` chooses one, otherwise it is the one with the
    fewest requests. A request that is stopped, killed or abandoned gives up its slot and blocks at once, a pass that has begun is not
    shortened. Sampling options but `seed`, stop conditions but `max_tokens`, and end-of-sequence ids are ignored, as by the reference:
    frontends apply stop conditions themselves.
    """

    options_type = MockerOptions

    def __init__(self, options: MockerOptions | None = None, *, clock: Clock | None = None) -> None:
        """`clock`: what passes are timed by; the event loop's timers must go by it as well. Default: the system's."""
        self.options = options or MockerOptions()
        self._clock = clock or SystemClock()
        self._report: Callable[[str], None] = lambda text: None
        self._vocabulary = LETTERS
        self._ranks: list[Rank] = []
        self._last_rank = -1
        self._of_context: dict[Context, tuple[Rank, Answer]] = {}
        self._death: asyncio.TimerHandle | None = None
        self._failure = ""
        self._failed = asyncio.Event()

    @property
    def ranks(self) -> Sequence[Rank]:
        """The ranks, once it has started; none after `cleanup`."""
        return self._ranks

    def follow_progress(self, report: Callable[[str], None]) -> None:
        self._report = report

    async def start(self, instance_id: int) -> EngineConfig:
        """Raises `ConfigError` if the model directory or the profile cannot be used."""
        options = self.options
        if options.startup_time:
            self._report(f"simulating a start of {options.startup_time:g} s")
            await asyncio.sleep(options.startup_time)
        card, timing = await asyncio.to_thread(lambda: (self._card(), options.timing()))
        self._vocabulary = self._tokens()
        ranks = range(options.data_parallel_size)
        self._ranks = [Rank(rank, options.scheduler(timing, record=True), self._clock, broken=self._die) for rank in ranks]
        if options.fail_after is not None:
            reason = f"the simulated engine died {options.fail_after:g} s after its start, as fail_after says"
            self._death = asyncio.get_running_loop().call_later(options.fail_after, self._die, reason)
        return EngineConfig(
            model=options.model or options.name or "mocker",
            card=card,
            served_name=options.name or None,
            context_length=options.context,
            kv_cache_block_size=options.block_size,
            total_kv_blocks=options.num_gpu_blocks,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            data_parallel_size=options.data_parallel_size,
        )

    def _card(self) -> ModelCard:
        options = self.options
        if not options.model:
            return byte_card(options.name or "mocker", context_length=options.context, kv_cache_block_size=options.block_size)
        directory = Path(options.model)
        if not directory.is_dir():
            raise ConfigError(f"the mocker needs a directory with a tokenizer, and {options.model!r} is none")
        return card_from_directory(directory, name=options.name or None, kv_cache_block_size=options.block_size)

    def _tokens(self) -> Sequence[int]:
        chosen = self.options.vocabulary
        if chosen == "auto":
            chosen = "reference" if self.options.model else "letters"
        return LETTERS if chosen == "letters" else REFERENCE

    # -- requests

    def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        """Raises `Overloaded` at once when all slots and places in the queue are taken."""
        if self._ranks:
            self._check_room(min(self._ranks, key=_load))
        return self._answer(request, context)

    async def _answer(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        if not self._ranks or self._failure:
            raise EngineError(self._failure or "the engine is not running", kind="EngineShutdown")
        rank = self._rank_for(request)
        answer = self._answer_for(request)
        if not answer.max_tokens or context.is_stopped:
            yield self._final(answer, [], 0, "cancelled" if context.is_stopped else "length")
            return
        self._check_room(rank)
        scheduler = rank.scheduler
        self._of_context[context] = rank, answer
        rank.submit(answer)
        sent = 0
        try:
            while True:  # token path
                made = scheduler.made(answer)
                if answer.phase >= Phase.FINISHED or context.is_stopped or answer.error is not None:
                    break
                if made == sent:
                    await rank.more(answer)
                    continue
                token_ids = answer.read(sent, made)
                sent = made
                yield EngineOutput(token_ids=token_ids)
            if answer.error is not None:
                raise answer.error
            if answer.phase is Phase.REJECTED:
                raise EngineError(f"{len(answer.prompt)} prompt tokens do not fit into the cache", kind="InvalidArgument")
            reason = "length" if made == answer.max_tokens else "cancelled"
            yield self._final(answer, answer.read(sent, made), made, reason)
        finally:
            rank.withdraw(answer)
            self._of_context.pop(context, None)

    def _check_room(self, rank: Rank) -> None:
        capacity = self.options.max_num_seqs + self.options.max_waiting
        if rank.load >= capacity:
            raise Overloaded(f"{capacity} requests are running or waiting already", phase="accept")

    def _rank_for(self, request: PreprocessedRequest) -> Rank:
        """The rank that was asked for, or the one with the fewest requests; of equal ones the next."""
        count = len(self._ranks)
        asked = request.routing.dp_rank if request.routing is not UNSET and request.routing is not None else None
        if asked is not None:
            if not 0 <= asked < count:
                raise EngineError(f"dp_rank must be from 0 to {count - 1}, got {asked}", kind="InvalidArgument")
            return self._ranks[asked]
        turn = self._last_rank + 1
        self._last_rank = min(range(turn, turn + count), key=lambda place: self._ranks[place % count].load) % count
        return self._ranks[self._last_rank]

    def _answer_for(self, request: PreprocessedRequest) -> Answer:
        options, prompt, asked = self.options, request.token_ids, request.stop_conditions.max_tokens
        if not prompt:
            raise EngineError("token_ids must not be empty", kind="InvalidArgument")
        left = options.context - len(prompt)
        if left < 1:
            raise EngineError(
                f"the prompt has {len(prompt)} tokens; the context of {options.context} leaves no room for an answer",
                kind="InvalidArgument",
            )
        routing = request.routing
        return Answer(
            prompt,
            max_tokens=min(options.default_max_tokens if asked is None else max(asked, 0), left),
            block_size=options.block_size,
            prefix_caching=options.enable_prefix_caching,
            vocabulary=self._vocabulary,
            engine_seed=options.seed,
            request_seed=request.sampling_options.seed,
            lora_name=routing.lora_name if routing is not UNSET and routing is not None else None,
        )

    def _final(self, answer: Answer, token_ids: list[int], completion: int, reason: str) -> EngineOutput:
        prompt = answer.prompt_length
        usage = CompletionUsage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details={"cached_tokens": answer.cached} if self.options.enable_prefix_caching else None,
        )
        return EngineOutput(token_ids=token_ids, finish_reason=reason, completion_usage=usage)

    async def abort(self, context: Context) -> None:
        """Frees slot and blocks now, and wakes the reader, who gets an end with the reason `cancelled`."""
        found = self._of_context.get(context)
        if found is not None:
            rank, answer = found
            rank.withdraw(answer)
            answer.wake()

    # -- what a worker asks for

    def snapshot_ranks(self) -> Sequence[int]:
        return range(self.options.data_parallel_size)

    def attach_snapshots(self, sink: SnapshotSink) -> None:
        for rank in self._ranks:
            rank.attach(sink)

    def kv_event_sources(self) -> Sequence[KvEventSource]:
        """One per rank; none without prefix caching."""
        if not self.options.enable_prefix_caching:
            return ()
        return [PushSource(on_ready=rank.attach_kv, dp_rank=rank.dp_rank) for rank in self._ranks]

    async def failed(self) -> str:
        await self._failed.wait()
        return self._failure

    def _die(self, reason: str) -> None:
        """The engine generates no more."""
        self._failure = self._failure or reason
        self._failed.set()
        self._end(reason)

    async def cleanup(self) -> None:
        """Ends all passes; requests still running get an error."""
        if self._death is not None:
            self._death.cancel()
            self._death = None
        self._end("the engine is shutting down")
        self._ranks = []

    def _end(self, reason: str) -> None:
        for rank in self._ranks:
            rank.close(partial(EngineError, reason, kind="EngineShutdown"))


def _load(rank: Rank) -> int:
    return rank.load
