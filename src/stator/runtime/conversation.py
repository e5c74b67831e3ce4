"""A bidirectional request as its caller has it: inputs out, answer in, at the same time."""

import logging
from collections.abc import AsyncIterable
from types import TracebackType
from typing import Any, Self

from stator.errors import EngineError, StatorError, UsageError
from stator.protocol.envelope import RequestEnvelope
from stator.runtime.context import Context
from stator.runtime.response import ResponseStream, Route
from stator.runtime.services import Services
from stator.runtime.view import InstanceView
from stator.tasks import Scope
from stator.transports.inbox import Inbox, Patience
from stator.transports.inputs import DuplexInbox

__all__ = ["Conversation"]

logger = logging.getLogger(__name__)


class Conversation(ResponseStream):
    """The answer to one bidirectional request, and the way in for its inputs.

        async with client.converse() as conversation:
            await conversation.send(first)
            await conversation.end_input()
            async for item in conversation: …

    Entering the block sends the request and waits until an instance accepted it; until then others are tried as for any request, later
    none is, for inputs may have left. Ending the input ends nothing else. The end of the answer ends the conversation: whoever sends is
    told. One task sends, one (the same or another) reads.
    """

    __slots__ = ("_accepted", "_clear", "_given", "_input_ended", "_pump")

    def __init__(
        self,
        services: Services,
        view: InstanceView,
        envelope: RequestEnvelope,
        route: Route,
        *,
        patience: Patience,
        item_type: Any,
        context: Context | None,
        inputs: AsyncIterable[Any] | None = None,
    ) -> None:
        super().__init__(services, view, envelope, route, patience=patience, item_type=item_type, context=context)
        self._given = inputs
        self._pump: Scope | None = None
        self._accepted = False
        self._input_ended = False
        self._clear = False
        """whether the next input may be sent without asking"""

    # -- sending

    async def send(self, item: Any) -> bool:
        """Send one input. False: it was not taken, since the conversation is over or stopped; reading says how it ended.

        Waits while the worker does not take what was sent before, at most `limits.input` seconds: then the conversation ends with
        `Timeout` (phase "input"), which readers get. Cancelled: nothing was sent. Raises `UsageError` for a value without JSON form or too
        large for the instance, and after `end_input`.
        """
        inbox = self._duplex()
        if self._given is not None:
            raise UsageError("this conversation was given its inputs; it takes no others")
        return await self._send(inbox, item)

    async def _send(self, inbox: DuplexInbox, item: Any) -> bool:
        if self._input_ended:
            raise UsageError("the input of this conversation has ended; nothing can be sent behind its end")
        if not self._clear:
            await inbox.ready()
        sender = inbox.sender
        if sender.over:
            return False
        try:
            self._clear = sender.send(item)
        except EngineError as error:
            raise UsageError(f"the input cannot be sent: {error.message}") from error
        return True

    async def end_input(self) -> None:
        """No further inputs: the handler's iteration ends, its answer goes on. Idempotent, harmless at the end."""
        inbox = self._duplex()
        self._input_ended = True
        inbox.sender.end()

    def _duplex(self) -> DuplexInbox:
        inbox = self._inbox
        if not isinstance(inbox, DuplexInbox):
            raise UsageError("enter the conversation first: async with client.converse() as conversation")
        return inbox

    async def _send_given(self, inputs: AsyncIterable[Any]) -> None:
        """Send what an iterable gives. What it raises ends the conversation: readers get it as a `UsageError`."""
        inbox = self._duplex()
        try:
            async for item in inputs:
                if not await self._send(inbox, item):
                    return
            await self.end_input()
        except StatorError as error:
            inbox.fail(error)
        except Exception as error:
            failure = UsageError(f"the inputs of request {self.id} failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            inbox.fail(failure)
        finally:
            await _close(inputs)

    # -- life

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self._accepted = True
        if self._given is not None:
            self._pump = Scope(f"inputs of request {self.id}")
            self._pump.spawn(self._send_given(self._given), name="inputs")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        if self._pump is not None:
            await self._pump.aclose()

    async def _open(self, cause: StatorError | None = None) -> Inbox:
        if not self._entered:
            raise UsageError("enter the conversation first: async with client.converse() as conversation")
        return await super()._open(cause)

    def _new_inbox(self, patience: Patience, instance: int = 0) -> Inbox:
        return DuplexInbox(wheel=self._services.wheel, patience=patience, instance=instance, item_type=self._item_type)

    def _may_retry(self, error: StatorError) -> bool:
        return not self._accepted and super()._may_retry(error)


async def _close(inputs: AsyncIterable[Any]) -> None:
    """Run the clean-up of a generator that was not exhausted."""
    aclose = getattr(inputs, "aclose", None)
    if aclose is not None:
        try:
            await aclose()
        except Exception:
            logger.exception("inputs did not clean up")
