"""The contract of engines, case by case (`spec/45 §1, §14`). Each case has a rule, which a failure names.

Calls go through `Guard`, as in a worker, so that stop and kill reach `abort`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from stator.errors import EngineError, UsageError
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest, read_request
from stator.runtime.context import Context
from stator.testing.engine_kit import (
    INSTANCE,
    SOON,
    ConformanceFailure,
    EngineKit,
    LoopWatch,
    RunningEngine,
    check_answer,
    collect,
    happens,
    require,
    tasks_and_threads,
)
from stator.worker.closing import close_stream
from stator.worker.health_payload import health_payload

__all__ = ["CASES", "Case"]

_TRIES = 3
"""an event loop may be late because the machine is; an engine that blocks it does so each time"""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One rule, and how to see that an engine keeps it."""

    rule: str
    check: Callable[[EngineKit], Awaitable[None]]

    async def hold(self, kit: EngineKit) -> None:
        """Raises `ConformanceFailure` if the engine breaks the rule."""
        try:
            await self.check(kit)
        except ConformanceFailure:
            raise
        except AssertionError as error:
            raise ConformanceFailure(self.rule, str(error)) from error
        except TimeoutError as error:
            raise ConformanceFailure(self.rule, "it takes too long") from error
        except Exception as error:
            raise ConformanceFailure(self.rule, f"{type(error).__name__}: {error}") from error


# -- start and hooks --------------------------------------------------------------------------------------------------------


async def _start(kit: EngineKit) -> None:
    reports: list[str] = []
    engine = kit.make()
    engine.follow_progress(reports.append)
    try:
        async with asyncio.timeout(kit.time_limit):
            config = await engine.start(INSTANCE)
    finally:
        await engine.cleanup()
    require(config.model, "EngineConfig.model is empty")
    require(config.card.display_name, "the card has no display_name")
    require(all(reports), "a progress report must say something")


async def _ranks(kit: EngineKit) -> None:
    async with kit.started() as running:
        engine = running.engine
        first, second = list(engine.snapshot_ranks()), list(engine.snapshot_ranks())
        require(first == second, f"snapshot_ranks said {first}, then {second}")
        sources = [source.dp_rank for source in engine.kv_event_sources()]
        again = [source.dp_rank for source in engine.kv_event_sources()]
        require(sources == again, f"kv_event_sources has the ranks {sources}, then {again}")
        if sources:
            require(running.config.kv_cache_block_size, "KV events without EngineConfig.kv_cache_block_size are not published")


async def _metrics(kit: EngineKit) -> None:
    async with kit.started() as running:
        check_answer(await running.answer(kit.request(2)))
        for text in running.metrics.texts:
            require(type(text()) is str, "what is added to a scrape must be text")
        running.page.exposition()


async def _snapshots(kit: EngineKit) -> None:
    async with kit.started() as running:
        check_answer(await running.answer(kit.request(4)))
        if not running.snapshots.dp_ranks:
            return
        require(await happens(lambda: bool(running.snapshots.seen)), f"no snapshot within {SOON:g} s after an answer")
        for rank, snapshot in running.snapshots.seen:
            require(rank in running.snapshots.dp_ranks, f"a snapshot of rank {rank}, which was not declared")
            require(0 <= snapshot.gpu_cache_usage <= 1, f"a cache usage of {snapshot.gpu_cache_usage}")
            require(0 <= snapshot.kv_used_blocks <= snapshot.kv_total_blocks, f"more blocks used than there are: {snapshot}")
            rate = snapshot.kv_cache_hit_rate
            require(rate is None or 0 <= rate <= 1, f"a hit rate of {rate}")


async def _commands(kit: EngineKit) -> None:
    async with kit.started() as running:
        for commands in (running.engine.controls, running.engine.updates):
            found: Mapping[str, object] = commands()
            require(list(found) == list(commands()), f"{commands.__name__} must have the same names at each call")
            require(all(found) and all(map(callable, found.values())), f"{commands.__name__} must map names to functions")


# -- answers ----------------------------------------------------------------------------------------------------------------


async def _shape(kit: EngineKit) -> None:
    async with kit.started() as running:
        check_answer(await running.answer(kit.request(4)))


async def _max_tokens(kit: EngineKit) -> None:
    async with kit.started() as running:
        for limit in (1, 3):
            items = await running.answer(kit.request(limit))
            check_answer(items)
            count = sum(len(item.token_ids) for item in items)
            require(count == limit, f"{count} tokens came where max_tokens is {limit}")
            reason = items[-1].finish_reason
            require(reason == "length", f"the finish reason at max_tokens is {reason!r}, not 'length'")


async def _together(kit: EngineKit) -> None:
    async with kit.started() as running:
        answers = await asyncio.gather(*(running.answer(kit.request(5)) for _ in range(8)))
    for items in answers:
        check_answer(items)
    tokens = [[token for item in items for token in item.token_ids] for items in answers]
    require(all(answer == tokens[0] for answer in tokens), "the same greedy request must have the same answer")


async def _slow_reader(kit: EngineKit) -> None:
    async with kit.started() as running:
        if running.config.max_num_seqs == 1:
            return
        unread = running.generate(kit.request(10_000))
        async with asyncio.timeout(kit.time_limit):
            await anext(unread)
        check_answer(await running.answer(kit.request(5)))
        await close_stream(unread)


async def _invalid(kit: EngineKit) -> None:
    async with kit.started() as running:
        try:
            items = await running.answer(PreprocessedRequest(token_ids=[]))
        except (UsageError, ValueError):
            pass
        except EngineError as error:
            require(
                error.kind == "InvalidArgument", f"a prompt without tokens: expected kind InvalidArgument, got {error.kind}"
            )
        else:
            raise AssertionError(f"a prompt without tokens was answered with {items}")
        check_answer(await running.answer(kit.request(2)))


async def _probe(kit: EngineKit) -> None:
    async with kit.started() as running:
        payload = await health_payload(running.engine, "")
        if payload is not None:
            check_answer(await running.answer(read_request(payload)))


async def _loop(kit: EngineKit) -> None:
    worst = 0.0
    async with kit.started() as running:
        for _ in range(_TRIES):
            watch = LoopWatch()
            looking = running.scope.spawn(watch.look())
            for items in await asyncio.gather(*(running.answer(kit.request(8)) for _ in range(4))):
                check_answer(items)
            await asyncio.sleep(0)
            looking.cancel()
            worst = watch.worst
            if worst <= kit.loop_limit:
                return
    raise AssertionError(f"the event loop did not get its turn for {worst:.2f} s while the engine generated: use a thread")


async def _healthy(kit: EngineKit) -> None:
    async with kit.started() as running:
        failed = running.scope.spawn(running.engine.failed())
        check_answer(await running.answer(kit.request(4)))
        require(not failed.done(), "failed() has returned although the engine generates")
        failed.cancel()
        await asyncio.wait({failed}, timeout=SOON)
        require(failed.cancelled(), "failed() must end when it is cancelled")


# -- the end of requests ----------------------------------------------------------------------------------------------------


async def _stopped_early(kit: EngineKit) -> None:
    async with kit.started() as running:
        context = Context("stopped early")
        context.stop()
        async with asyncio.timeout(SOON):
            items = await collect(running.generate(kit.request(10_000), context))
    _check_cancelled(items)


async def _stopped(kit: EngineKit) -> None:
    async with kit.started() as running:
        context = Context("stopped")
        stream = running.generate(kit.request(10_000), context)
        async with asyncio.timeout(kit.time_limit):
            first = await anext(stream)
        require(first.finish_reason is None, _TOO_SHORT)
        context.stop()
        async with asyncio.timeout(SOON):
            rest = await collect(stream)
    _check_cancelled(rest)


def _check_cancelled(items: list[EngineOutput]) -> None:
    require(items, "a stopped request needs a last item")
    reason = items[-1].finish_reason
    require(reason == "cancelled", f"the finish reason of a stopped request is {reason!r}, not 'cancelled'")


async def _cancelled(kit: EngineKit) -> None:
    """Cancel the wait for an item; without `Guard`, which would hide what the engine does then."""
    async with kit.started() as running:
        context = Context("killed")
        stream = aiter(running.engine.generate(kit.request(10_000), context))
        while True:
            waiting = running.scope.spawn(_next(stream))
            await asyncio.sleep(0)
            if not waiting.done():
                break
            if waiting.result() is None:
                return  # it never waits
        context.kill()
        await running.engine.abort(context)
        waiting.cancel()
        await asyncio.wait({waiting}, timeout=SOON)
        require(waiting.done(), f"a killed request did not end within {SOON:g} s")
        require(
            waiting.cancelled() or waiting.exception() or waiting.result() is None, "an item came after the request was killed"
        )


async def _next(stream: object) -> EngineOutput | None:
    """The next item; None at the end."""
    return await anext(stream, None)  # pyright: ignore[reportArgumentType]


async def _killed(kit: EngineKit) -> None:
    async with kit.started() as running:
        await _fill_and_empty(kit, running, _kill)


async def _abandoned(kit: EngineKit) -> None:
    async with kit.started() as running:
        await _fill_and_empty(kit, running, _cancel)


async def _fill_and_empty(kit: EngineKit, running: RunningEngine, end: Callable[[Context, "asyncio.Task[None]"], None]) -> None:
    """Occupy all slots, end the requests in mid-stream, and have as many answered as there are slots."""
    slots = min(running.config.max_num_seqs or 8, 64)
    began = [asyncio.Event() for _ in range(slots)]
    contexts = [Context(f"occupant-{index}") for index in range(slots)]

    async def occupy(index: int) -> None:
        async for _ in running.generate(kit.request(10_000), contexts[index]):
            began[index].set()
            await asyncio.sleep(0)

    occupants = [running.scope.spawn(occupy(index)) for index in range(slots)]
    async with asyncio.timeout(kit.time_limit):
        await asyncio.gather(*(event.wait() for event in began))
    for context, occupant in zip(contexts, occupants, strict=True):
        require(not occupant.done(), _TOO_SHORT)
        end(context, occupant)
    _, left = await asyncio.wait(occupants, timeout=SOON)
    require(not left, f"{len(left)} of {slots} requests did not end within {SOON:g} s")
    for items in await asyncio.gather(*(running.answer(kit.request(2)) for _ in range(slots))):
        check_answer(items)


def _kill(context: Context, task: "asyncio.Task[None]") -> None:
    """What the runtime does when a client kills a request."""
    context.kill()
    task.cancel()


def _cancel(context: Context, task: "asyncio.Task[None]") -> None:
    """A caller that goes away without a word."""
    task.cancel()


async def _abort(kit: EngineKit) -> None:
    async with kit.started() as running:
        context = Context("over")
        check_answer(await running.answer(kit.request(2), context))
        await running.engine.abort(context)
        await running.engine.abort(Context("never heard of"))
        check_answer(await running.answer(kit.request(2)))


# -- the engine's end -------------------------------------------------------------------------------------------------------


async def _no_leak(kit: EngineKit) -> None:
    """Two lives: what is made once for the process is there after the first."""
    await _life(kit)
    before = tasks_and_threads()
    await _life(kit)
    if not await happens(lambda: tasks_and_threads().keys() <= before.keys()):
        left = [name for each, name in tasks_and_threads().items() if each not in before]
        require(not left, f"left running after cleanup: {', '.join(left)}")


async def _life(kit: EngineKit) -> None:
    async with kit.started() as running:
        check_answer(await running.answer(kit.request(2)))
        context = Context("left")
        stream = running.generate(kit.request(10_000), context)
        async with asyncio.timeout(kit.time_limit):
            await anext(stream)
        context.stop()
        async with asyncio.timeout(SOON):
            await collect(stream)
        await running.engine.drain()


async def _cleanup_twice(kit: EngineKit) -> None:
    engine = kit.make()
    await engine.start(INSTANCE)
    await engine.drain()
    await engine.cleanup()
    await engine.cleanup()


async def _cleanup_alone(kit: EngineKit) -> None:
    await kit.make().cleanup()


_TOO_SHORT = "the answer ended before it could be ended: the prompt is too short for this suite, set `prompt`"

CASES: Mapping[str, Case] = {
    case.rule: case
    for case in (
        Case(rule="start describes the model", check=_start),
        Case(rule="an answer has items, and the last alone has the finish reason", check=_shape),
        Case(rule="max_tokens ends the answer", check=_max_tokens),
        Case(rule="the event loop is never blocked", check=_loop),
        Case(rule="ranks are the same at each call", check=_ranks),
        Case(rule="the metrics hook leaves a page that can be read", check=_metrics),
        Case(rule="snapshots are of declared ranks and possible", check=_snapshots),
        Case(rule="commands have names", check=_commands),
        Case(rule="eight answers at once are whole", check=_together),
        Case(rule="a reader that pauses delays nobody", check=_slow_reader),
        Case(rule="a request at fault is an invalid argument", check=_invalid),
        Case(rule="the health probe is answered", check=_probe),
        Case(rule="a healthy engine does not say that it failed", check=_healthy),
        Case(rule="a request stopped before its first item ends as cancelled", check=_stopped_early),
        Case(rule="a request stopped in mid-stream ends as cancelled", check=_stopped),
        Case(rule="nothing is yielded after a kill", check=_cancelled),
        Case(rule="killed requests free their slots", check=_killed),
        Case(rule="abandoned requests free their slots", check=_abandoned),
        Case(rule="aborting what is over does no harm", check=_abort),
        Case(rule="cleanup leaves no task and no thread", check=_no_leak),
        Case(rule="a second cleanup does no harm", check=_cleanup_twice),
        Case(rule="cleanup without start does no harm", check=_cleanup_alone),
    )
}
"""by rule, in the order in which they are tried"""
