"""`POST /v1/chat/completions` and `/v1/completions`: a body in, engine calls, a stream or one object out."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
from aiohttp import web

from stator.clock import Clock
from stator.errors import StatorError
from stator.frontend.boundary import describe_logged
from stator.frontend.caller import caller_of
from stator.frontend.choices import Calls, Choice, Emit, make_choices, run, total_usage
from stator.frontend.chunks import CHAT_SHAPE, TEXT_SHAPE, ChunkWriter, FinishedChoice, Shape
from stator.frontend.errors import Failure, Rejected, model_not_found, render
from stator.frontend.metrics import RequestMeter
from stator.frontend.sse import DONE, EventStream
from stator.frontend.state import SERVER, TICKET, FrontendState
from stator.frontend.ticket import Ticket, propagated_headers, request_metadata
from stator.llm.card import ModelType
from stator.llm.openai import ChatRequest, CompletionRequest, InvalidRequest, parse_chat, parse_completion
from stator.llm.postprocess import TextDelta
from stator.llm.preprocess import Preprocessor
from stator.llm.prompt_timing import PromptTiming
from stator.llm.request import PreprocessedRequest
from stator.llm.served import ServedModel, TokenStream

__all__ = ["CHAT", "COMPLETIONS", "Api", "Generation"]

Request = ChatRequest | CompletionRequest

_LARGE = 32 * 1024
"""bodies from this many bytes are tokenised in a thread: a tokenizer reads about 1 MB/s, and streams must go on meanwhile"""


class Api(msgspec.Struct, frozen=True, kw_only=True):
    """What differs between the two routes. `endpoint` is their label in metrics and log."""

    endpoint: str
    model_type: ModelType
    shape: Shape
    parse: Callable[[bytes], Request]


CHAT = Api(endpoint="chat_completions", model_type=ModelType.CHAT, shape=CHAT_SHAPE, parse=parse_chat)
COMPLETIONS = Api(endpoint="completions", model_type=ModelType.COMPLETIONS, shape=TEXT_SHAPE, parse=parse_completion)


class Generation:
    """Handler of one route."""

    def __init__(self, state: FrontendState, api: Api) -> None:
        self._state = state
        self._api = api

    async def handle(self, http: web.Request) -> web.StreamResponse:
        """Answer one request. `boundary` answers what it raises; a client that leaves cancels it, which kills the calls."""
        ticket = http[TICKET]
        ticket.endpoint = self._api.endpoint
        ticket.trace = self._state.log.trace_of(http.headers)
        if ticket.account is not None:
            ticket.grant = ticket.account.begin(self._state.clock.monotonic())
        self._state.admit(ticket)
        try:
            await self._state.turnstile.enter()
            return await self._answer(http, ticket)
        except asyncio.CancelledError as cancelled:
            error = ticket.recover(cancelled)
            raise error from None
        finally:
            self._state.release(ticket)

    async def _answer(self, http: web.Request, ticket: Ticket) -> web.StreamResponse:
        state, api = self._state, self._api
        with state.bodies.reading(http, state.wheel) as body:
            data = await body.read()
            try:
                request = api.parse(data)
            except InvalidRequest:
                self._note_invalid(data, ticket)
                raise
            served = self._note(ticket, request.model, stream=bool(request.stream))
            if ticket.account is not None:
                ticket.account.check_model(request.model)
            if served is None or ticket.meter is None:
                raise Rejected(model_not_found(request.model))
            calls = self._check(served, request)
            caller = caller_of(
                http.headers,
                request.service_tier if isinstance(request, ChatRequest) else None,
                salt=state.tenant_salt,
                priorities=state.config.queue_priorities,
                account=ticket.account,
            )
            admission = ticket.admission = state.admissions.enter(served, caller, calls=calls)
            choices = await self._prepare(served, request, ticket, large=len(data) >= _LARGE)
            del data
        await admission.turn(0)
        writer = ChunkWriter(
            api.shape,
            id=ticket.id,
            created=int(state.clock.wall()),
            model=request.model,
            choices=len(choices),
            include_usage=bool(request.stream_options and request.stream_options.include_usage),
        )
        metadata = request_metadata(http.headers)
        headers = propagated_headers(http.headers, ticket.trace)

        def open_stream(choice: Choice) -> TokenStream:
            return served.engine.generate(choice.request, request_id=choice.request_id, metadata=metadata, headers=headers)

        if not ticket.stream:
            collected = _Collected(choices, ticket.meter, state.clock)
            await run(choices, self._calls(ticket, open_stream, collected.emit))
            _count_cached(choices, ticket.meter)
            return web.Response(body=collected.answer(writer), content_type="application/json")
        return await self._stream(http, ticket, _Streamed(request, choices, writer, ticket.meter, state.clock), open_stream)

    def _note(self, ticket: Ticket, model: str, *, stream: bool) -> ServedModel | None:
        """Count a request from now on, as one for `model`; which that is."""
        state = self._state
        ticket.model, ticket.stream = model, stream
        served = state.source.get(model)
        name = served.name if served else ""
        ticket.meter = state.metrics.begin(model=name, endpoint=self._api.endpoint, stream=stream, now=ticket.began)
        return served

    def _note_invalid(self, data: bytes, ticket: Ticket) -> None:
        """A request that breaks a rule is counted if one can tell for which model it is; other bodies are not (`spec/30 §8.1`)."""
        with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            seen = msgspec.json.decode(data, type=_Glance)
            if isinstance(seen.model, str):
                self._note(ticket, seen.model, stream=seen.stream is True)

    def _calls(self, ticket: Ticket, open_stream: Callable[[Choice], TokenStream], emit: Emit) -> Calls:
        meter, admission = ticket.meter, ticket.admission
        assert meter is not None
        assert admission is not None
        return Calls(
            open_stream=open_stream,
            emit=emit,
            meter=meter,
            admission=admission,
            wheel=self._state.wheel,
            scope=self._state.scope,
            now=self._state.clock.monotonic,
        )

    def _check(self, served: ServedModel, request: Request) -> int:
        """Check what only the model and the settings can tell; how many engine calls the request is."""
        api, state = self._api, self._state
        if api.model_type not in served.card.model_types:
            raise Rejected(_not_for(api, request.model))
        count = (request.n or 1) * (len(request.prompts()) if isinstance(request, CompletionRequest) else 1)
        if count > state.config.max_choices:
            text = f"The request asks for {count} choices; {state.config.max_choices} are allowed."
            raise Rejected(Failure(status=400, message=text, param="n", code="too_many_choices"))
        return count

    async def _prepare(self, served: ServedModel, request: Request, ticket: Ticket, *, large: bool) -> list[Choice]:
        """Tokenise, and number the choices. Happens while the request may be waiting for its turn."""
        meter, now = ticket.meter, self._state.clock.monotonic
        assert meter is not None
        timing = PromptTiming(now)
        begin = now()
        with meter.preparing():
            if large:
                prompts = await asyncio.to_thread(_preprocess, served.preprocessor, request, timing)
            else:
                prompts = _preprocess(served.preprocessor, request, timing)
        tokens = sum(len(prompt.token_ids) for prompt in prompts)
        meter.prompt(tokens, now() - begin, timing)
        if ticket.grant is not None:
            ticket.grant.prompt(tokens, now())
            meter.on_tokens = ticket.grant.generated
        return make_choices(served, prompts, n=request.n or 1, request_id=ticket.id)

    async def _stream(
        self, http: web.Request, ticket: Ticket, streamed: "_Streamed", open_stream: Callable[[Choice], TokenStream]
    ) -> web.StreamResponse:
        """Errors before the first event are raised; later ones become an event that ends the stream."""
        state, silence = self._state, self._state.config.silence
        headers = {"x-request-id": ticket.shown_id, "Server": SERVER}
        if ticket.account is not None:
            headers |= ticket.account.headers(state.clock.monotonic())
        async with EventStream(http, headers=headers, scope=state.scope, wheel=state.wheel, silence=silence) as events:
            streamed.events = events
            error: Exception | None = None
            try:
                await run(streamed.choices, self._calls(ticket, open_stream, streamed.emit))
            except asyncio.CancelledError as cancelled:
                error = ticket.recover(cancelled)
            except Exception as failed:
                if isinstance(failed, ConnectionError) and not isinstance(failed, StatorError):
                    raise  # the client is gone
                error = failed
            try:
                if error is None:
                    _count_cached(streamed.choices, streamed.meter)
                    await events.finish(streamed.end())
                elif events.started:
                    ticket.failure = describe_logged(error, state, ticket)
                    await events.finish(b"data: %b\n\n%b" % (render(ticket.failure), DONE))
                else:
                    raise error
            finally:
                del (
                    error
                )  # its traceback has this frame: together they would keep the request until the garbage collector comes
        return events.response


class _Glance(msgspec.Struct):
    """As much of a request as its count needs."""

    model: Any = None
    stream: Any = None


class _Streamed:
    """Deltas to events. Token path: one write for all that is ready of a choice."""

    __slots__ = ("_clock", "_continuous", "_usage", "_writer", "choices", "events", "meter")

    events: EventStream

    def __init__(self, request: Request, choices: list[Choice], writer: ChunkWriter, meter: RequestMeter, clock: Clock) -> None:
        options = request.stream_options
        self._usage = bool(options and options.include_usage)
        self._continuous = bool(options and options.continuous_usage_stats)
        self._writer = writer
        self._clock = clock
        self.choices = choices
        self.meter = meter

    async def emit(self, choice: Choice, deltas: list[TextDelta]) -> None:
        self.meter.flush(choice.new_tokens(), self._clock.monotonic())
        if not deltas:
            return
        out: list[bytes] = []
        running = total_usage(self.choices) if self._continuous else None
        self._writer.write(out, choice.index, deltas, running)
        await self.events.send(b"".join(out))

    def end(self) -> bytes:
        """The last events."""
        return self._writer.usage_event(total_usage(self.choices)) + DONE if self._usage else DONE


class _Collected:
    """Deltas to one object."""

    def __init__(self, choices: list[Choice], meter: RequestMeter, clock: Clock) -> None:
        self._choices = choices
        self._meter = meter
        self._clock = clock
        self._deltas: list[list[TextDelta]] = [[] for _ in choices]

    async def emit(self, choice: Choice, deltas: list[TextDelta]) -> None:
        self._meter.flush(choice.new_tokens(), self._clock.monotonic())
        self._deltas[choice.index] += deltas

    def answer(self, writer: ChunkWriter) -> bytes:
        """The whole answer as JSON."""
        finished = [
            FinishedChoice(
                index=index,
                text="".join(delta.text for delta in deltas),
                finish_reason=deltas[-1].finish_reason if deltas else None,
                logprobs=[entry for delta in deltas for entry in delta.logprobs or ()] or None,
            )
            for index, deltas in enumerate(self._deltas)
        ]
        return writer.whole(finished, total_usage(self._choices))


def _preprocess(preprocessor: Preprocessor, request: Request, timing: PromptTiming) -> list[PreprocessedRequest]:
    if isinstance(request, ChatRequest):
        return [preprocessor.chat(request, timing)]
    return [preprocessor.completion(request, prompt, timing) for prompt in request.prompts()]


def _count_cached(choices: list[Choice], meter: RequestMeter) -> None:
    for choice in choices:
        details = choice.post.usage and choice.post.usage.prompt_tokens_details
        if details and (cached := details.get("cached_tokens")) is not None:
            meter.cached(cached)


def _not_for(api: Api, model: str) -> Failure:
    text = f"The model `{model}` does not support {api.endpoint.replace('_', ' ')}."
    return Failure(status=404, message=text, param="model", code="unsupported_model", label="not_found")
