"""Where connections are accepted, and made: with TLS where it is set, without where it is not."""

import asyncio

from stator.security.layer import ALERT, TlsLayer
from stator.security.refusals import Refusals
from stator.security.tls import Alpn, Tls

__all__ = ["Entrance", "connecting", "is_tls"]

_MOST_SHAKING = 1024
"""handshakes under way at one listener; one more ends the oldest"""


class Entrance:
    """One listener's way in: `create_server(lambda: entrance(MyProtocol()), …)`. Close it with the listener.

    Without `tls` a protocol passes as it is. Else its `connection_made` comes after the handshake, with a transport that knows
    `ssl_object`, `peercert` and `cipher`, and its `connection_lost` in any case, with `NotTrusted` when the handshake failed, which was
    counted then. `plain_answer` is told to those who do not speak TLS before they are cut. Each connection gets the certificates that are
    current when it is made. Raises `ConfigError` when this process has none to show.
    """

    def __init__(self, *, tls: Tls | None, refusals: Refusals, alpn: Alpn = (), plain_answer: bytes = ALERT) -> None:
        if tls is not None:
            tls.server_context(alpn)
        self._tls = tls
        self._refusals = refusals
        self._alpn = alpn
        self._plain_answer = plain_answer
        self._shaking: dict[TlsLayer, None] = {}

    def __call__(self, protocol: asyncio.Protocol) -> asyncio.Protocol:
        """What has the socket."""
        tls = self._tls
        if tls is None:
            return protocol
        layer = TlsLayer(
            protocol,
            tls.server_context(self._alpn),
            refusals=self._refusals,
            patience=tls.config.handshake_timeout,
            plain_answer=self._plain_answer,
            settled=self._settled,
        )
        self._shaking[layer] = None
        if len(self._shaking) > _MOST_SHAKING:
            next(iter(self._shaking)).abort()
        return layer

    def _settled(self, layer: TlsLayer) -> None:
        self._shaking.pop(layer, None)

    def close(self) -> None:
        """Cut those whose handshake is not done. Idempotent."""
        for layer in tuple(self._shaking):
            layer.abort()


async def connecting(
    protocol: asyncio.Protocol, host: str, port: int, *, tls: Tls | None, refusals: Refusals, alpn: Alpn = ()
) -> None:
    """Connect `protocol` to `host`, and return when TCP and TLS are done. The caller sets the deadline, besides that of the handshake.

    Raises `OSError` (`NotTrusted` is one, and counted); `protocol` has heard nothing then, nor when cancelled.
    """
    loop = asyncio.get_running_loop()
    if tls is None:
        await loop.create_connection(lambda: protocol, host, port)
        return
    shaken: asyncio.Future[None] = loop.create_future()
    layer = TlsLayer(
        protocol,
        tls.client_context(alpn),
        refusals=refusals,
        patience=tls.config.handshake_timeout,
        dials=tls.server_name or host,
        shaken=shaken,
    )
    try:
        await loop.create_connection(lambda: layer, host, port)
        await shaken
    except BaseException:
        layer.abort()
        raise


def is_tls(first: bytes) -> bool:
    """Whether a connection that begins with these bytes speaks TLS: a handshake, or an alert."""
    return first[:2] in (b"\x16\x03", b"\x15\x03")
