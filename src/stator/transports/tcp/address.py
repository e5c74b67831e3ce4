"""Where a worker takes requests of the compatible plane, as records say it."""

from functools import lru_cache

import msgspec

from stator.errors import ConnectFailed, PeerProtocolError
from stator.protocol.control_message import parse_address

__all__ = ["InstanceAddress"]


class InstanceAddress(msgspec.Struct, frozen=True):
    """The `tcp` value of a record: `host:port/path` (`spec/10 §1.1`)."""

    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, text: str, *, instance: int) -> "InstanceAddress":
        """Read it, with or without `tcp://`; `ConnectFailed` when it is none."""
        try:
            return _parse(text)
        except PeerProtocolError as error:
            raise ConnectFailed(
                f"the instance has no usable TCP address: {error}", instance=instance, phase="connect"
            ) from error


@lru_cache(maxsize=4096)
def _parse(text: str) -> InstanceAddress:
    address, slash, path = text.removeprefix("tcp://").partition("/")
    host, port = parse_address(address)
    if not slash or not path:
        raise PeerProtocolError(f"{text!r} has no path")
    return InstanceAddress(host, port, path)
