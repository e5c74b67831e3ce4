"""Why a call to etcd failed: it said no (`Refused`), a member could not serve (`Trouble`), or none could (`Unreachable`)."""

import os
import ssl

import aiohttp
import msgspec

from stator.discovery.etcd_messages import Problem

__all__ = [
    "ALREADY_THERE",
    "NOT_FOUND",
    "REFUSED_USER",
    "STALE_TOKEN",
    "Refused",
    "Trouble",
    "Unreachable",
    "check_answer",
    "text_of",
    "trouble_of",
]

_INVALID = 3
NOT_FOUND = 5
_PERMISSION_DENIED = 7
ALREADY_THERE = 9
"""gRPC's FAILED_PRECONDITION: of a lease that is granted twice, and of a log-in where etcd has no users"""
_UNAUTHENTICATED = 16
REFUSED_USER = frozenset({_INVALID, _PERMISSION_DENIED, _UNAUTHENTICATED})
"""of calls that somebody else might be allowed to make"""
STALE_TOKEN = frozenset({_INVALID, _UNAUTHENTICATED})
"""of calls that a fresh log-in may help"""
_FINAL = frozenset({_INVALID, NOT_FOUND, 6, _PERMISSION_DENIED, ALREADY_THERE, 11, _UNAUTHENTICATED})
"""gRPC codes that another member, or a later try, will not change"""


class Refused(Exception):
    """etcd answered and said no; the text names the member and has etcd's reason."""

    def __init__(self, text: str, *, code: int) -> None:
        super().__init__(text)
        self.code = code


class Unreachable(Exception):
    """No member could serve. `hopeless`: for reasons that time will not change, such as a certificate that is not trusted."""

    def __init__(self, text: str, *, hopeless: bool = False) -> None:
        super().__init__(text)
        self.hopeless = hopeless


class Trouble(Exception):
    """A member could not serve."""

    def __init__(self, text: str, *, hopeless: bool = False) -> None:
        super().__init__(text)
        self.hopeless = hopeless


def check_answer(endpoint: str, status: int, answer: bytes) -> None:
    """Raise what an answer that is no success means."""
    if status == 200:
        return
    try:
        problem = msgspec.json.decode(answer, type=Problem, strict=False)
        if not isinstance(problem.error, str | None):  # what should have been a stream
            problem = msgspec.convert(problem.error, Problem, strict=False)
    except msgspec.MsgspecError:
        problem = Problem(message=answer[:200].decode(errors="replace").strip())
    text = text_of(problem) or "no reason"
    if problem.number in _FINAL:
        raise Refused(f"{endpoint} says {text!r}", code=problem.number)
    raise Trouble(f"HTTP {status}, {text!r}")


def text_of(problem: Problem) -> str:
    return problem.message or (problem.error if isinstance(problem.error, str) else "")


def trouble_of(error: Exception, endpoint: str) -> Trouble:
    """`error` of aiohttp, the operating system or a decoder, for people."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        found = error.certificate_error
        reason = getattr(found, "verify_message", "") or found
        return Trouble(f"its certificate is not trusted ({reason}); look at etcd.ca_path (ETCD_AUTH_CA)", hopeless=True)
    if isinstance(error, aiohttp.ClientConnectorError):
        plain = endpoint.startswith("https://") and isinstance(error.os_error, ConnectionResetError)
        return Trouble(f"no connection ({_reason(error.os_error)}){'; if it speaks no TLS, write http://' if plain else ''}")
    if isinstance(error, aiohttp.ServerDisconnectedError):
        hint = "; if it speaks TLS, write https://" if endpoint.startswith("http://") else ""
        return Trouble(f"it closed the connection without an answer{hint}")
    if isinstance(error, OSError):
        return Trouble(f"the connection broke ({_reason(error)})")
    if isinstance(error, msgspec.MsgspecError):
        return Trouble(f"an answer that makes no sense: {error}")
    return Trouble(str(error) or type(error).__name__)


def _reason(error: OSError) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    if isinstance(cause, ssl.SSLError):
        return str(cause)
    return os.strerror(cause.errno) if cause.errno else str(cause)
