"""HELLO and GOAWAY: what the two ends of a native connection tell each other about themselves (`docs/native-plane.md §4, §9`)."""

from typing import Annotated, Literal

import msgspec

from stator.errors import ConnectFailed, PeerProtocolError
from stator.protocol.native.frames import MAX_PAYLOAD
from stator.protocol.native.problem import sendable

__all__ = ["PROVES", "VERSION", "Goaway", "Hello", "Limits", "read_goaway", "read_hello"]

VERSION = 1

PROVES = 0x01
"""feature: I have a cluster secret, prove it, and demand the proof of the other side"""

_MAX_HELLO = 4096
_MAX_REASON = 500

_Amount = Annotated[int, msgspec.Meta(ge=1)]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the sender of a HELLO accepts: bytes of a frame's payload (in version 1 not less than 65 536), of one item, of one request;
    streams open at once.
    """

    frame: Annotated[int, msgspec.Meta(ge=MAX_PAYLOAD)] = MAX_PAYLOAD
    item: _Amount = 128 * 1024 * 1024
    request: _Amount = 32 * 1024 * 1024
    streams: _Amount = 65536


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """The first frame of each side."""

    versions: tuple[int, int] = (VERSION, VERSION)
    features: int = 0
    codecs: tuple[str, ...] = ("json",)
    process: str
    role: Literal["client", "worker"]
    nonce: str = ""
    limits: Limits = Limits()

    @property
    def proves(self) -> bool:
        """Whether its sender has a cluster secret."""
        return bool(self.features & PROVES)

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    def agree(self, peer: "Hello") -> int:
        """The version both speak; `ConnectFailed` when there is none, or no common codec."""
        version = min(self.versions[1], peer.versions[1])
        if version < max(self.versions[0], peer.versions[0]):
            raise ConnectFailed(
                f"no common version of the native plane: ours {self.versions}, the peer's {peer.versions}", phase="connect"
            )
        if not set(self.codecs) & set(peer.codecs):
            raise ConnectFailed(
                f"no common codec on the native plane: ours {self.codecs}, the peer's {peer.codecs}", phase="connect"
            )
        return version


class Goaway(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing new on this connection: the last stream taken, and why. Code `unavailable` is a worker that drains; any other code means
    that the connection ends now, `not_trusted` for want of trust.
    """

    last: int = 0
    code: str = "unavailable"
    reason: str = ""

    @property
    def drains(self) -> bool:
        """Whether open streams may still finish."""
        return self.code == "unavailable"

    def encode(self) -> bytes:
        """As JSON; the reason is cut at 500 characters."""
        return msgspec.json.encode(msgspec.structs.replace(self, reason=sendable(self.reason, _MAX_REASON)))


_hello = msgspec.json.Decoder(Hello)
_goaway = msgspec.json.Decoder(Goaway)


def read_hello(payload: bytes) -> Hello:
    """Decode a HELLO; `PeerProtocolError` if it is none."""
    if len(payload) > _MAX_HELLO:
        raise PeerProtocolError(f"HELLO of {len(payload)} bytes, allowed are {_MAX_HELLO}")
    try:
        return _hello.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PeerProtocolError(f"HELLO cannot be read: {error}") from error


def read_goaway(payload: bytes) -> Goaway:
    """Decode a GOAWAY; one that cannot be read still means that the peer goes away."""
    try:
        return _goaway.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return Goaway(code="protocol", reason="the peer's GOAWAY cannot be read")
