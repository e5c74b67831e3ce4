"""When a choice ends, as far as text and tokens tell (`spec/50 §13`); and how no text behind the end is ever shown.

Unlike the reference, text that may be the beginning of a stop string is held back until it is certain (OpenAI's semantics),
and a worker that ignores `max_tokens` is cut.
"""

import msgspec

from stator.llm.request import PreprocessedRequest

__all__ = ["StopMatch", "StopRules", "StopScanner"]


class StopRules(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of one request; the three sets of token ids are disjoint."""

    strings: tuple[str, ...] = ()
    include_string: bool = False
    """whether the stop string that matched is shown"""
    silent: frozenset[int] = frozenset()
    """end-of-sequence ids: not shown, not reported"""
    reported: frozenset[int] = frozenset()
    """the client's stop ids: not shown, reported as `stop_reason`"""
    visible: frozenset[int] = frozenset()
    """stop ids that are shown, and reported"""
    min_tokens: int = 0
    """the first tokens, this many, end nothing"""
    max_tokens: int | None = None

    @classmethod
    def of(cls, request: PreprocessedRequest) -> "StopRules":
        """The rules a request carries. `ignore_eos` switches the end-of-sequence ids off and nothing else."""
        given = request.stop_conditions
        visible = frozenset(given.stop_token_ids_visible or ())
        reported = frozenset(given.stop_token_ids or ()) - visible
        silent = frozenset((*request.eos_token_ids, *(given.stop_token_ids_hidden or ())))
        return cls(
            strings=tuple(given.stop or ()),
            include_string=bool(request.sampling_options.include_stop_str_in_output),
            silent=frozenset() if given.ignore_eos else silent - reported - visible,
            reported=reported,
            visible=visible,
            min_tokens=given.min_tokens or 0,
            max_tokens=given.max_tokens,
        )


class StopMatch(msgspec.Struct, frozen=True, gc=False):
    """A stop string was found: `text` is what may still be shown, `string` is what matched."""

    text: str
    string: str


class StopScanner:
    """Looks for stop strings in a growing text. Each character is looked at once per string (Knuth–Morris–Pratt).

    The match that ends first counts; among those, the one that begins first.
    """

    def __init__(self, strings: tuple[str, ...], *, include: bool = False) -> None:
        self._strings = strings
        self._include = include
        self._fallbacks = [_fallbacks(string) for string in strings]
        self._first = {string[0] for string in strings}
        self._progress = [0] * len(strings)
        """per string: how much of its beginning the text ends with"""
        self._held = ""
        """the end of the text, as long as the greatest progress; not shown yet"""

    def feed(self, text: str, *, armed: bool = True) -> str | StopMatch:
        """Take more text; return what may be shown of it and of what was held back, or the match.

        With `armed` False a match that ends in `text` is ignored, but one that only begins there will count.
        """
        if not self._held and self._first.isdisjoint(text):
            return text
        for place, character in enumerate(text):
            found = self._step(character)
            if found and armed:
                whole = self._held + text[: place + 1]
                return StopMatch(whole if self._include else whole[: len(whole) - len(found)], found)
        whole = self._held + text
        shown = len(whole) - max(self._progress)
        self._held = whole[shown:]
        return whole[:shown]

    def release(self) -> str:
        """The text is at its end: what was held back."""
        held, self._held = self._held, ""
        self._progress = [0] * len(self._strings)
        return held

    def _step(self, character: str) -> str:
        """Advance by one character; the longest stop string that ends here, or ""."""
        found = ""
        for index, string in enumerate(self._strings):
            fallbacks, length = self._fallbacks[index], self._progress[index]
            while length and string[length] != character:
                length = fallbacks[length]
            if string[length] == character:
                length += 1
            if length == len(string):
                found = max(found, string, key=len)
                length = fallbacks[length]
            self._progress[index] = length
        return found


def _fallbacks(string: str) -> list[int]:
    """At n: the length of the longest proper beginning of string[:n] that is also its end."""
    table = [0, 0]
    length = 0
    for character in string[1:]:
        while length and string[length] != character:
            length = table[length]
        length += string[length] == character
        table.append(length)
    return table
