"""Errors on the native plane: the error tree's own codes (`docs/native-plane.md §7`)."""

import msgspec

from stator import errors
from stator.errors import EngineError, StatorError

__all__ = ["MAX_MESSAGE", "decode_error", "encode_error", "sendable"]


class _Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    code: str = "internal"
    message: str = ""
    kind: str = ""
    phase: str = ""


_decoder = msgspec.json.Decoder(_Problem)
_CLASSES: dict[str, type[StatorError]] = {
    kind.code: kind for kind in (getattr(errors, name) for name in errors.__all__) if kind is not EngineError
}
MAX_MESSAGE = 8192
"""characters of a message that travel; six bytes each at worst, so that an error fits in a frame"""
_MAX_WORD = 64


def sendable(text: str, most: int = MAX_MESSAGE) -> str:
    """At most `most` characters of `text`, without the lone surrogates that UTF-8 has no bytes for."""
    return text[:most].encode("utf-8", "replace").decode("utf-8")


def encode_error(error: StatorError) -> bytes:
    """The error as JSON. Never raises; messages are cut at 8 192 characters, `kind` and `phase` at 64."""
    kind = sendable(error.kind, _MAX_WORD) if isinstance(error, EngineError) else ""
    phase = sendable(error.phase, _MAX_WORD)
    return msgspec.json.encode(_Problem(code=error.code, message=sendable(error.message), kind=kind, phase=phase))


def decode_error(payload: bytes, *, instance: int = 0) -> StatorError:
    """The error a peer sent. Never raises: what cannot be read is a plain `StatorError` (code `internal`)."""
    try:
        problem = _decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return StatorError("the peer sent an error that cannot be read", instance=instance)
    if problem.code == EngineError.code:
        return EngineError(problem.message, kind=problem.kind or "Unknown", instance=instance, phase=problem.phase)
    return _CLASSES.get(problem.code, StatorError)(problem.message, instance=instance, phase=problem.phase)
