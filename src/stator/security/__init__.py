"""Closed doors: TLS between processes, and what is counted when they stay closed."""

from stator.security.config import TlsConfig
from stator.security.entrance import Entrance, connecting, is_tls
from stator.security.layer import ALERT, TlsLayer, TlsTransport
from stator.security.refusals import Refusals, Side
from stator.security.tls import Alpn, Tls

__all__ = [
    "ALERT",
    "Alpn",
    "Entrance",
    "Refusals",
    "Side",
    "Tls",
    "TlsConfig",
    "TlsLayer",
    "TlsTransport",
    "connecting",
    "is_tls",
]
