"""Closed doors: TLS between processes, and what is counted when they stay closed."""

from stator.security.config import TlsConfig
from stator.security.layer import TlsLayer, TlsTransport, accepting, connecting
from stator.security.refusals import Refusals
from stator.security.tls import Alpn, Tls

__all__ = ["Alpn", "Refusals", "Tls", "TlsConfig", "TlsLayer", "TlsTransport", "accepting", "connecting"]
