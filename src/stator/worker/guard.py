"""Between the runtime and an engine: what an engine's author may forget, once for all engines."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from stator.errors import EngineError, Unavailable
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.runtime.context import Context
from stator.tasks import Scope
from stator.worker.closing import close_stream
from stator.worker.engine import LLMEngine
from stator.worker.interruption import Interruption

__all__ = ["ENGINE_SHUTDOWN", "Guard"]

logger = logging.getLogger(__name__)

ENGINE_SHUTDOWN = "EngineShutdown"
"""kind of the error that says: not the request, the engine is at its end (`spec/45 §4.2`)"""


class Guard:
    """Runs an engine's `generate` so that the stream keeps its promises (`spec/45 §4–5`).

    Ends it after the last choice's finish reason, whatever the engine still has to say; refuses items that are no
    `EngineOutput`; contains `SystemExit`; calls `abort` in `scope`, once, when the request is stopped or killed before its
    end. `died` is told what an engine says that raises `EngineShutdown`; after `fail` nothing runs any more.
    """

    def __init__(self, engine: LLMEngine, scope: Scope, *, died: Callable[[str], None] | None = None) -> None:
        self._engine = engine
        self._scope = scope
        self._aborts = type(engine).abort is not LLMEngine.abort
        self._died = died
        self._failure = ""
        self._running: set[Interruption] = set()

    def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        """Not a generator itself, so that an engine that refuses at once does so before the request counts as accepted."""
        if self._failure:
            raise Unavailable(f"the engine has failed: {self._failure}")
        stream = self._engine.generate(request, context)
        choices = request.sampling_options.n or 1 if self._engine.native_choices else 1
        interruption = Interruption()
        answer = self._follow(stream, context, choices, interruption)
        interruption.of(answer)
        return answer

    def fail(self, reason: str) -> None:
        """The engine can generate no more: every running answer ends with an `EngineShutdown` error at once, further ones are refused.

        Idempotent. In the event loop's thread.
        """
        self._failure = self._failure or reason or "it does not say why"
        for interruption in tuple(self._running):
            interruption.interrupt()

    async def _follow(
        self, stream: AsyncIterator[EngineOutput], context: Context, choices: int, interruption: Interruption
    ) -> AsyncGenerator[EngineOutput]:
        # Token path: per item one type check and two comparisons, no await of our own.
        def on_stop(killed: bool) -> None:
            nonlocal aborting
            if not aborting and not self._scope.closed:
                aborting = True
                self._scope.spawn(self._abort(context), name=f"abort {context.id}")

        aborting = not self._aborts
        if not aborting:
            context.subscribe(on_stop)
        interruption.begin()
        self._running.add(interruption)
        try:
            async for output in stream:
                if not isinstance(output, EngineOutput):  # pyright: ignore[reportUnnecessaryIsInstance]  # engines are other people's code
                    raise _misshapen(output)
                yield output
                if output.finish_reason is not None:
                    choices -= 1
                    if not choices:
                        return
                if self._failure:
                    raise self._shutdown()
        except SystemExit as error:
            raise EngineError(f"SystemExit: {error}") from error
        except EngineError as error:
            self._running.discard(interruption)  # it ends by itself
            if error.kind == ENGINE_SHUTDOWN and self._died is not None:
                self._died(error.message)
            raise
        except asyncio.CancelledError:
            if not interruption.ends():
                raise
            raise self._shutdown() from None
        finally:
            self._running.discard(interruption)
            interruption.close()
            context.unsubscribe(on_stop)
            await close_stream(stream)

    def _shutdown(self) -> EngineError:
        return EngineError(f"the engine has failed: {self._failure}", kind=ENGINE_SHUTDOWN)

    async def _abort(self, context: Context) -> None:
        try:
            await self._engine.abort(context)
        except Exception:
            logger.exception("engine failed to abort request %s", context.id)


def _misshapen(output: object) -> EngineError:
    return EngineError(
        f"invalid chunk shape: the engine yielded {type(output).__name__}, expected EngineOutput", kind="InvalidArgument"
    )
