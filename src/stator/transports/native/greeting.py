"""What a process says first on a connection of its own, and what is counted when the other side is not trusted."""

import os

import msgspec

from stator.config import Secret
from stator.errors import NotTrusted, PeerProtocolError, StatorError, Timeout
from stator.protocol.native.hello import PROVES, Hello
from stator.security.refusals import Side
from stator.transports.plane import PlaneHost

__all__ = ["count_refusal", "greeting"]


def greeting(hello: Hello, secret: Secret | None) -> Hello:
    """The HELLO of one connection. With a secret it has a nonce that was never used before: proofs of other connections are worthless."""
    if secret is None:
        return hello
    return msgspec.structs.replace(hello, features=hello.features | PROVES, nonce=os.urandom(16).hex())


def count_refusal(host: PlaneHost, side: Side, error: StatorError) -> None:
    """A connection ended before the other side was known; other reasons than trust are not counted here."""
    if isinstance(error, NotTrusted):
        host.refusals.count(side, error.reason)
    elif host.secret is not None and isinstance(error, Timeout | PeerProtocolError):
        host.refusals.count(side, error.code)
