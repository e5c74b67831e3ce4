"""How long the two halves of preparing a prompt took: filling in the template, and tokenising."""

import copy
from collections.abc import Callable
from typing import Any, cast

from stator.llm.preprocess import Preprocessor
from stator.llm.template import ChatTemplate
from stator.llm.tokenizer import Tokenizer

__all__ = ["PromptTiming"]


class PromptTiming:
    """Times one request: `template` and `tokenize` are in seconds, None if there was nothing of the kind to do."""

    __slots__ = ("template", "tokenize")

    def __init__(self) -> None:
        self.template: float | None = None
        self.tokenize: float | None = None

    def of(self, preprocessor: Preprocessor, now: Callable[[], float]) -> Preprocessor:
        """One that does the same and is timed; use it from one thread at a time."""
        timed = copy.copy(preprocessor)
        timed.tokenizer = cast("Tokenizer", _Timed(preprocessor.tokenizer, "encode", self._encoded, now))
        if preprocessor.template is not None:
            timed.template = cast("ChatTemplate", _Timed(preprocessor.template, "render", self._rendered, now))
        return timed

    def _encoded(self, seconds: float) -> None:
        self.tokenize = (self.tokenize or 0.0) + seconds

    def _rendered(self, seconds: float) -> None:
        self.template = (self.template or 0.0) + seconds


class _Timed:
    """An object one of whose methods is timed."""

    __slots__ = ("_method", "_noted", "_now", "_object")

    def __init__(self, object: Any, method: str, noted: Callable[[float], None], now: Callable[[], float]) -> None:
        self._object = object
        self._method = method
        self._noted = noted
        self._now = now

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._object, name)
        return self._call if name == self._method else found

    def _call(self, *arguments: Any, **named: Any) -> Any:
        begin = self._now()
        try:
            return getattr(self._object, self._method)(*arguments, **named)
        finally:
            self._noted(self._now() - begin)
