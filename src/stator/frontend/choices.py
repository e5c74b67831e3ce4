"""The engine calls behind one HTTP request: n choices for each prompt, all at once, each with its own text state."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress

import msgspec

from stator.errors import Overloaded, StatorError
from stator.frontend.chunks import Usage
from stator.frontend.gate import Admission
from stator.frontend.limit import Limit
from stator.frontend.metrics import RequestMeter
from stator.llm.output import EngineOutput
from stator.llm.postprocess import Postprocessor, TextDelta
from stator.llm.request import PreprocessedRequest
from stator.llm.served import ServedModel, TokenStream
from stator.tasks import DeadlineWheel, Scope

__all__ = ["Calls", "Choice", "Emit", "make_choices", "run", "total_usage"]

_SENTINEL_GRACE = 1.0
"""seconds that a worker has to end its stream after the item that said so"""
_SEEDS = 2**63


class Choice:
    """One engine call. `index` is the choice's in the answer, `prompt` the number of its prompt."""

    __slots__ = ("answered", "counted", "index", "kind", "post", "prompt", "request", "request_id")

    def __init__(self, served: ServedModel, request: PreprocessedRequest, *, index: int, prompt: int, request_id: str) -> None:
        self.index = index
        self.prompt = prompt
        self.request = request
        self.request_id = request_id
        self.kind = served.card.worker_type
        self.post = Postprocessor(served.preprocessor.tokenizer, request)
        self.answered = False
        """whether an item has come"""
        self.counted = 0

    def new_tokens(self) -> int:
        """Tokens received since the last call."""
        count = self.post.completion_tokens
        new, self.counted = count - self.counted, count
        return new


Emit = Callable[[Choice, list[TextDelta]], Awaitable[None]]
"""Takes what is ready of one choice; waits while the client is behind."""


def make_choices(served: ServedModel, prompts: Sequence[PreprocessedRequest], *, n: int, request_id: str) -> list[Choice]:
    """`n` choices per prompt, numbered prompt by prompt. Each is a call of its own; a seed counts up from choice to choice.

    A single call keeps the request's id; several are `<id>-0`, `<id>-1`, … (`spec/50 §3`).
    """
    single = len(prompts) * n == 1
    return [
        Choice(
            served,
            _nth(prompt, i) if n > 1 else prompt,
            index=number * n + i,
            prompt=number,
            request_id=request_id if single else f"{request_id}-{number * n + i}",
        )
        for number, prompt in enumerate(prompts)
        for i in range(n)
    ]


def _nth(request: PreprocessedRequest, i: int) -> PreprocessedRequest:
    sampling = request.sampling_options
    seed = None if sampling.seed is None else (sampling.seed + i + _SEEDS) % (2 * _SEEDS) - _SEEDS
    return msgspec.structs.replace(request, sampling_options=msgspec.structs.replace(sampling, n=None, best_of=None, seed=seed))


class Calls(msgspec.Struct, frozen=True, kw_only=True):
    """What the calls of one request have in common."""

    open_stream: Callable[[Choice], TokenStream]
    emit: Emit
    meter: RequestMeter
    admission: Admission
    wheel: DeadlineWheel
    scope: Scope
    """where the task of a single call lives"""
    now: Callable[[], float]


async def run(choices: Sequence[Choice], calls: Calls) -> None:
    """Generate all choices to their end. The first failure or cancellation ends all: calls are killed at the worker.

    Each call has a task, a single one too: each token resumes all coroutines from the task down to the stream, and a request's handler
    is a dozen deep.
    """
    single = len(choices) == 1
    error = await (calls.scope.spawn(_run_one(choices[0], calls)) if single else _run_all(choices, calls))
    try:
        if error is not None:
            raise error
    finally:
        del error  # its traceback has this frame: together they would keep the request until the garbage collector comes


async def _run_all(choices: Sequence[Choice], calls: Calls) -> Exception | None:
    """Make all calls at once. The first failure, when all others have ended."""
    async with Scope("choices") as scope:
        tasks = [scope.spawn(_run_one(choice, calls)) for choice in choices]
        for task in asyncio.as_completed(tasks):
            if (error := await task) is not None:
                return error
    return None


async def _run_one(choice: Choice, calls: Calls) -> Exception | None:
    """Make the call when it is its turn. Refused by a worker before anything was delivered, it waits for another one, a few times.

    A failure is returned: it is the request's, not the scope's, which would log it as a crash.
    """
    admission = calls.admission
    try:
        while True:
            await admission.turn(choice.index)
            try:
                await _call(choice, calls)
            except Overloaded as error:
                if choice.answered:
                    return error
                if not admission.returned(choice.index):
                    return _because(admission.refused_by_worker(), error)
            else:
                return None
    except Exception as error:
        return error
    finally:
        admission.ended(choice.index)


def _because(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


async def _call(choice: Choice, calls: Calls) -> None:
    """Token path: one step per batch of items, whatever their number."""
    post, emit, now = choice.post, calls.emit, calls.now
    sent, in_text = now(), 0.0
    opening = calls.open_stream(choice)
    calls.admission.sending(choice.index, opening)
    try:
        async with opening as stream:
            calls.admission.routed(choice.index)
            batches = stream.batches()
            async for batch in batches:
                begin = now()
                if not choice.answered:
                    choice.answered = True
                    # Which worker it is, is not part of every stream; fakes have none.
                    calls.meter.answered(getattr(stream, "instance_id", 0), choice.kind, begin - sent)
                deltas = post.push_many(batch)
                in_text += now() - begin
                await emit(choice, deltas)
                if post.done:
                    if batch[-1].finish_reason is not None:
                        await _await_end(batches, calls.wheel)
                    return  # killed if it goes on
        if (last := post.finish()) is not None:
            await emit(choice, [last])
    finally:
        if choice.answered:
            calls.meter.detokenized(post.completion_tokens, in_text)


async def _await_end(batches: AsyncIterator[list[EngineOutput]], wheel: DeadlineWheel) -> None:
    """Let a worker that said its last word end its stream itself: no kill for every request that went well."""
    until = wheel.now() + _SENTINEL_GRACE
    # Whatever happens here: the answer is complete.
    with suppress(StatorError, TimeoutError), Limit(wheel, lambda: until):
        async for _ in batches:
            continue


def total_usage(choices: Sequence[Choice]) -> Usage:
    """Prompts counted once each, completions all. The worker's own count of a prompt wins over ours (`spec/50 §12`)."""
    prompt_tokens = 0
    details: dict[str, int | None] = {}
    seen: set[int] = set()
    for choice in choices:
        if choice.prompt in seen:
            continue
        seen.add(choice.prompt)
        own = choice.post.usage
        prompt_tokens += own.prompt_tokens if own and own.prompt_tokens else len(choice.request.token_ids)
        for name, count in ((own and own.prompt_tokens_details) or {}).items():
            details[name] = (details.get(name) or 0) + (count or 0)
    completion_tokens = sum(choice.post.completion_tokens for choice in choices)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=details or None,
    )
