"""The settings of the plane as a session takes them."""

from stator.protocol.http2_library import SessionLimits
from stator.transports.http2.config import Http2Config

__all__ = ["look_every", "session_limits"]

_SERVER_IDLES_LONGER = 2.0
"""the caller closes an idle connection first, so that it does not send into one that is being closed"""


def session_limits(config: Http2Config, *, worker: bool) -> SessionLimits:
    """What one connection may hold, and how long it may be silent."""
    return SessionLimits(
        window=config.window,
        streams=config.max_streams,
        frame=config.max_frame,
        header_list=config.max_headers,
        interval=config.keep_alive_interval,
        answer=config.keep_alive_timeout,
        idle=config.idle_timeout * (_SERVER_IDLES_LONGER if worker else 1.0),
        arrival=config.arrival_timeout,
        linger=config.linger,
    )


def look_every(limits: SessionLimits) -> float:
    """Seconds between looks at a connection, so that none of its deadlines is noticed much later than it is."""
    return min(1.0, limits.interval / 3, limits.answer / 3, limits.idle / 3, limits.arrival / 3, limits.linger / 3)
