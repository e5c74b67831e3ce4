"""The thread that steps a model: admits waiting sequences, advances the running ones, hands the tokens to the event loop."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec

from stator.engines.sequence import Finish, Sequence, TokenChoice

__all__ = ["StepResult", "StepThread", "TokenModel"]

logger = logging.getLogger(__name__)


class TokenModel(Protocol):
    """What is stepped. All calls come from one thread."""

    def prefill(self, sequence: Sequence) -> TokenChoice:
        """Read the prompt and choose the first token; from now on the sequence is held. On an error it is not."""
        ...

    def decode(self) -> list[tuple[Sequence, TokenChoice | Exception]]:
        """The next token of every sequence held, or why there is none."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence. Harmless if it is not held."""
        ...


class StepResult(msgspec.Struct, frozen=True):
    """What a step did to one sequence: `choice` with or without `finish`, or `error`."""

    sequence: Sequence
    choice: TokenChoice | None = None
    finish: Finish | None = None
    error: Exception | None = None


class StepThread:
    """Continuous batching: sequences join and leave between any two steps.

    One step: drop what was cancelled · prefill waiting sequences while there are slots, at most `max_prefill_tokens` prompt
    tokens (but at least one sequence), so that long prompts do not hold up the running ones for more than that · one decode
    for all. Results go to `deliver` in the event loop's thread, one call for the first tokens, which nothing may delay, and
    one for the rest.

    `submit`, `withdraw` and `close` belong to the event loop's thread. An error ends the sequences it concerns; the thread
    goes on.
    """

    def __init__(
        self,
        model: TokenModel,
        *,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[list[StepResult]], None],
        max_running: int,
        max_prefill_tokens: int,
    ) -> None:
        self._model = model
        self._loop = loop
        self._deliver = deliver
        self._max_running = max_running
        self._max_prefill_tokens = max_prefill_tokens
        self._lock = threading.Lock()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="stator-steps", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Slots in use."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. The caller bounds how many."""
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

    def _run(self) -> None:
        while not self._closing:
            if not self._running and not self._waiting:
                self._wake.wait()  # submit and close set it
            self._wake.clear()
            try:
                self._drop_cancelled()
                self._hand_over(self._admit())
                self._hand_over(self._advance())
            except Exception:
                logger.exception("a step failed as a whole")
                self._fail_all()
        for sequence in self._running:
            self._model.release(sequence)
        self._running.clear()

    def _drop_cancelled(self) -> None:
        for sequence in [sequence for sequence in self._running if sequence.cancelled]:
            self._release(sequence)

    def _admit(self) -> list[StepResult]:
        results: list[StepResult] = []
        budget = self._max_prefill_tokens
        while len(self._running) < self._max_running and budget > 0 and (sequence := self._next_waiting()) is not None:
            budget -= sequence.prompt_length
            try:
                choice = self._model.prefill(sequence)
            except Exception as error:
                results.append(StepResult(sequence, error=error))
            else:
                self._running.append(sequence)
                results.append(self._took(sequence, choice))
        return results

    def _next_waiting(self) -> Sequence | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def _advance(self) -> list[StepResult]:
        return [self._took(sequence, outcome) for sequence, outcome in self._model.decode()] if self._running else []

    def _took(self, sequence: Sequence, outcome: TokenChoice | Exception) -> StepResult:
        if isinstance(outcome, Exception):
            self._release(sequence)
            return StepResult(sequence, error=outcome)
        finish = sequence.append(outcome.token_id)
        if finish is not None:
            self._release(sequence)
        return StepResult(sequence, outcome, finish)

    def _release(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._model.release(sequence)

    def _fail_all(self) -> None:
        error = RuntimeError("a step of the model failed")
        results = [StepResult(sequence, error=error) for sequence in self._running]
        for sequence in tuple(self._running):
            self._release(sequence)
        self._hand_over(results)

    def _hand_over(self, results: list[StepResult]) -> None:
        if not results or self._closing:
            return
        try:
            self._loop.call_soon_threadsafe(self._deliver, results)
        except RuntimeError:  # the loop is closed: nobody is left to wait for tokens
            self._closing = True
