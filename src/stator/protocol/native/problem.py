"""Errors on the native plane: the error tree's own codes (`docs/native-plane.md §7`)."""

import msgspec

from stator import errors
from stator.errors import EngineError, StatorError

__all__ = ["decode_error", "encode_error"]


class _Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    code: str = "internal"
    message: str = ""
    kind: str = ""
    phase: str = ""


_decoder = msgspec.json.Decoder(_Problem)
_CLASSES: dict[str, type[StatorError]] = {
    kind.code: kind for kind in (getattr(errors, name) for name in errors.__all__) if kind is not EngineError
}
_MAX_MESSAGE = 8192


def encode_error(error: StatorError) -> bytes:
    """The error as JSON; messages are cut at 8 192 characters so that they fit in a frame."""
    kind = error.kind if isinstance(error, EngineError) else ""
    return msgspec.json.encode(_Problem(code=error.code, message=error.message[:_MAX_MESSAGE], kind=kind, phase=error.phase))


def decode_error(payload: bytes, *, instance: int = 0) -> StatorError:
    """The error a peer sent. Never raises: what cannot be read is a plain `StatorError` (code `internal`)."""
    try:
        problem = _decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return StatorError("the peer sent an error that cannot be read", instance=instance)
    if problem.code == EngineError.code:
        return EngineError(problem.message, kind=problem.kind or "Unknown", instance=instance, phase=problem.phase)
    return _CLASSES.get(problem.code, StatorError)(problem.message, instance=instance, phase=problem.phase)
