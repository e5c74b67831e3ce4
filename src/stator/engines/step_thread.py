"""The thread that steps a model: admits waiting sequences, advances the running ones, hands the tokens to the event loop."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from stator.engines.block_ledger import BlockLedger
from stator.engines.sequence import Finish, Sequence, TokenChoice

__all__ = ["StepResult", "StepThread", "TokenModel"]

logger = logging.getLogger(__name__)

_SUSPICIOUS = 3
"""failures in a row, with nothing that worked between them, after which the model is tried"""


class TokenModel(Protocol):
    """What is stepped. All calls come from one thread."""

    def prefill(self, sequence: Sequence, most: int) -> TokenChoice | None:
        """Read the next tokens of a sequence, about `most` of them; `sequence.read` counts them. None: there are more.

        After the last one the next token is chosen and the sequence is held for `decode`. On an error nothing is kept.
        """
        ...

    def decode(self) -> list[tuple[Sequence, TokenChoice | Exception]]:
        """The next token of every sequence held, or why there is none."""
        ...

    def evict(self, sequence: Sequence) -> None:
        """Let go of what was read of a sequence: it will be read again from the start, and go on as if nothing had been."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence. Harmless if nothing is known of it."""
        ...

    def check(self) -> None:
        """Raise if the model cannot be stepped at all, whatever the sequence."""
        ...


class StepResult(msgspec.Struct, frozen=True):
    """What a step did to one sequence: `choice` with or without `finish`, or `error`."""

    sequence: Sequence
    choice: TokenChoice | None = None
    finish: Finish | None = None
    error: Exception | None = None


class StepThread:
    """Continuous batching: sequences join and leave between any two steps.

    One step: drop what was cancelled · admit waiting sequences, in their order, while there are slots and blocks for all their
    tokens · read `max_prefill_tokens` of their prompts, so that long prompts do not hold up the running ones for more than that,
    and may be cancelled in between · one decode for all. When the blocks do not suffice for that, the sequence that was admitted
    last gives its blocks back and waits at the head of the queue; its tokens so far are read again later.

    Results go to `deliver` in the event loop's thread, one call for the first tokens, which nothing may delay, and one for the
    rest. `after_step` is called in this thread. `submit`, `withdraw` and `close` belong to the event loop's thread.

    An error ends the sequences it concerns and the thread goes on, unless the model turns out not to run any more: then, or when
    the thread itself breaks, it ends and `died` is called with the reason, in the event loop's thread. Nothing is delivered
    afterwards: whoever waits for tokens has to be told there.
    """

    def __init__(
        self,
        model: TokenModel,
        *,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[list[StepResult]], None],
        died: Callable[[str], None],
        after_step: Callable[[], None],
        ledger: BlockLedger,
        max_running: int,
        max_prefill_tokens: int,
    ) -> None:
        self._model = model
        self._loop = loop
        self._deliver = deliver
        self._died = died
        self._after_step = after_step
        self._ledger = ledger
        self._max_running = max_running
        self._max_prefill_tokens = max_prefill_tokens
        self._lock = threading.Lock()  # guards _waiting
        self._waiting: deque[Sequence] = deque()
        self._reading: list[Sequence] = []
        """admitted, in that order, and not read to the end"""
        self._running: list[Sequence] = []
        self._failures = 0
        self.preemptions = 0
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._live, name="stator-steps", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Slots in use."""
        return len(self._running) + len(self._reading)

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence, which must fit the ledger when it is alone. The caller bounds how many."""
        with self._lock:
            self._waiting.append(sequence)
        self._wake.set()

    def withdraw(self, sequence: Sequence) -> None:
        """Nobody wants more of this sequence: it leaves the queue now, or its slot before the next step.

        Harmless at any time.
        """
        sequence.cancelled = True
        with self._lock:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
        self._wake.set()

    def close(self) -> None:
        """End after the present step; nothing is delivered any more. Idempotent."""
        self._closing = True
        self._wake.set()

    def join(self, timeout: float) -> bool:
        """Block until the thread has ended, at most `timeout` seconds; False if it has not. Not for the event loop's thread."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _live(self) -> None:
        try:
            self._run()
        except BaseException as error:
            logger.critical("the thread that steps the model has ended", exc_info=error)
            self._call(self._died, f"{type(error).__name__}: {error}")
        finally:
            self._closing = True

    def _run(self) -> None:
        while not self._closing:
            if not self._running and not self._reading and not self._waiting:
                self._wake.wait()  # submit and close set it
            self._wake.clear()
            try:
                self._step()
            except Exception:
                logger.exception("a step failed as a whole")
                self._fail_all()
            if self._failures >= _SUSPICIOUS:
                self._model.check()
                self._failures = 0
            self._after_step()
        for sequence in (*self._reading, *self._running):
            self._release(sequence)

    def _step(self) -> None:
        for sequence in [one for one in (*self._reading, *self._running) if one.cancelled]:
            self._release(sequence)
        self._admit()
        self._hand_over(self._read())
        self._make_room()
        if self._running:
            self._hand_over([self._took(sequence, outcome) for sequence, outcome in self._model.decode()])

    def _admit(self) -> None:
        """Give slots and blocks to those that wait, in their order."""
        with self._lock:
            while self._waiting and self.running < self._max_running:
                sequence = self._waiting[0]
                if sequence.cancelled:  # while it was being preempted
                    self._waiting.popleft()
                    continue
                if not self._ledger.grow(sequence, len(sequence.tokens)):
                    return
                self._reading.append(self._waiting.popleft())

    def _read(self) -> list[StepResult]:
        """Read on in the prompts, the oldest first."""
        results: list[StepResult] = []
        budget = self._max_prefill_tokens
        while self._reading and budget > 0:
            sequence = self._reading[0]
            before = sequence.read
            try:
                choice = self._model.prefill(sequence, budget)
            except Exception as error:
                results.append(self._took(sequence, error))
                continue
            budget -= max(sequence.read - before, 1)
            if choice is not None:
                self._running.append(self._reading.pop(0))
                results.append(self._took(sequence, choice))
        return results

    def _make_room(self) -> None:
        """See that every running sequence has a place for the token it is about to store."""
        for sequence in tuple(self._running):
            while sequence in self._running and not self._ledger.grow(sequence, len(sequence.tokens)):
                self._preempt((self._reading or self._running)[-1])

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._leave(sequence)
        self._model.evict(sequence)
        with self._lock:
            self._waiting.appendleft(sequence)

    def _took(self, sequence: Sequence, outcome: TokenChoice | Exception) -> StepResult:
        if isinstance(outcome, Exception):
            self._failures += 1
            self._release(sequence)
            return StepResult(sequence, error=outcome)
        self._failures = 0
        finish = sequence.append(outcome.token_id)
        if finish is not None:
            self._release(sequence)
        return StepResult(sequence, outcome, finish)

    def _release(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._model.release(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Give slot and blocks back."""
        (self._reading if sequence in self._reading else self._running).remove(sequence)
        self._ledger.free(sequence)

    def _fail_all(self) -> None:
        self._failures += 1
        error = RuntimeError("a step of the model failed")
        held = (*self._reading, *self._running)
        for sequence in held:
            self._release(sequence)
        self._hand_over([StepResult(sequence, error=error) for sequence in held])

    def _hand_over(self, results: list[StepResult]) -> None:
        if results:
            self._call(self._deliver, results)

    def _call(self, receiver: Callable[[Any], None], value: Any) -> None:
        """In the event loop's thread, unless nobody listens any more."""
        if self._closing:
            return
        try:
            self._loop.call_soon_threadsafe(receiver, value)
        except RuntimeError:  # the loop is closed: nobody is left to wait for tokens
            self._closing = True
