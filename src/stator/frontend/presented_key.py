"""The API key of a request, wherever its client put it."""

from collections.abc import Mapping

__all__ = ["presented_key"]

_HEADERS = ("Authorization", "api-key", "x-api-key")
"""where clients put their key: OpenAI's, Azure's, Anthropic's"""
_SCHEME = "bearer "


def presented_key(headers: Mapping[str, str]) -> str:
    """The key without `Bearer`; "" if there is none. Keep it no longer than it takes to hash it."""
    for header in _HEADERS:
        key = headers.get(header)
        if key:
            if key[: len(_SCHEME)].lower() == _SCHEME:
                key = key[len(_SCHEME) :]
            return key.strip()
    return ""
