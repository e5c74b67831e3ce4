"""How long the two halves of preparing a prompt took: filling in the template, and tokenising."""

from collections.abc import Callable

__all__ = ["UNTIMED", "PromptTiming"]


def _always_zero() -> float:
    return 0.0


class PromptTiming:
    """Times one request by `now`: `template` and `tokenize` are in seconds, None if there was nothing of the kind to do."""

    __slots__ = ("now", "template", "tokenize")

    def __init__(self, now: Callable[[], float] = _always_zero) -> None:
        self.now = now
        self.template: float | None = None
        self.tokenize: float | None = None

    def rendered(self, began: float) -> None:
        """The template was filled in, from `began` until now."""
        self.template = (self.template or 0.0) + self.now() - began

    def encoded(self, began: float) -> None:
        """A text was tokenised, from `began` until now."""
        self.tokenize = (self.tokenize or 0.0) + self.now() - began


UNTIMED = PromptTiming()
"""for those who do not want to know"""
