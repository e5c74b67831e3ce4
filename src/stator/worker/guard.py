"""Between the runtime and an engine: what an engine's author may forget, once for all engines."""

import logging
from collections.abc import AsyncIterator

from stator.errors import EngineError
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.runtime.context import Context
from stator.tasks import Scope
from stator.worker.closing import close_stream
from stator.worker.engine import LLMEngine

__all__ = ["Guard"]

logger = logging.getLogger(__name__)


class Guard:
    """Runs an engine's `generate` so that the stream keeps its promises (`spec/45 §4–5`).

    Ends it after the last choice's finish reason, whatever the engine still has to say; refuses items that are no
    `EngineOutput`; contains `SystemExit`; calls `abort` in `scope`, once, when the request is stopped or killed before its
    end.
    """

    def __init__(self, engine: LLMEngine, scope: Scope) -> None:
        self._engine = engine
        self._scope = scope
        self._aborts = type(engine).abort is not LLMEngine.abort

    def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        """Not a generator itself, so that an engine that refuses at once does so before the request counts as accepted."""
        stream = self._engine.generate(request, context)
        choices = request.sampling_options.n or 1 if self._engine.native_choices else 1
        return self._follow(stream, context, choices)

    async def _follow(self, stream: AsyncIterator[EngineOutput], context: Context, choices: int) -> AsyncIterator[EngineOutput]:
        # Token path: per item one type check and one comparison, no await of our own.
        def on_stop(killed: bool) -> None:
            nonlocal aborting
            if not aborting and not self._scope.closed:
                aborting = True
                self._scope.spawn(self._abort(context), name=f"abort {context.id}")

        aborting = not self._aborts
        if not aborting:
            context.subscribe(on_stop)
        try:
            async for output in stream:
                if not isinstance(output, EngineOutput):  # pyright: ignore[reportUnnecessaryIsInstance]  # engines are other people's code
                    raise _misshapen(output)
                yield output
                if output.finish_reason is not None:
                    choices -= 1
                    if not choices:
                        return
        except SystemExit as error:
            raise EngineError(f"SystemExit: {error}") from error
        finally:
            context.unsubscribe(on_stop)
            await close_stream(stream)

    async def _abort(self, context: Context) -> None:
        try:
            await self._engine.abort(context)
        except Exception:
            logger.exception("engine failed to abort request %s", context.id)


def _misshapen(output: object) -> EngineError:
    return EngineError(
        f"invalid chunk shape: the engine yielded {type(output).__name__}, expected EngineOutput", kind="InvalidArgument"
    )
