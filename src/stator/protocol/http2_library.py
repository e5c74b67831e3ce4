"""The library `h2` as it is used here: its settings, and its exceptions in one place."""

import msgspec
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.exceptions import H2Error, ProtocolError
from h2.settings import SettingCodes, Settings

from stator.errors import PeerProtocolError
from stator.protocol.http2_frames import ErrorCode, FrameViolation

__all__ = ["BROKEN", "SessionLimits", "library_connection", "violation"]

_INITIAL_WINDOW = 65_535
"""of a connection, before anything was said"""

BROKEN = (H2Error, ValueError, KeyError, IndexError, AssertionError, AttributeError, TypeError)
"""what the library and its parts raise for bytes that are not HTTP/2"""


class SessionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one connection may hold and how long it may be silent; bytes and seconds."""

    window: int = 262_144
    """unread bytes of one stream"""
    connection_window: int = 16_777_216
    """bytes on their way at once, over all streams; given back on arrival, so that one slow reader stops nobody else"""
    streams: int = 1000
    frame: int = 1_048_576
    header_list: int = 65_536
    idle_rate: float = 1000.0
    """frames that carry nothing, per second"""
    idle_burst: float = 5000.0
    interval: float = 30.0
    """silence with streams open before a PING"""
    answer: float = 10.0
    """silence after a PING before the connection counts as dead"""
    idle: float = 90.0
    """without streams before the connection is closed"""
    arrival: float = 30.0
    """from a request's fields to the end of its first frame"""
    linger: float = 10.0
    """from the end of this side of a stream to that of the other"""


def library_connection(limits: SessionLimits, *, client: bool) -> H2Connection:
    """The library's connection with our settings, its first bytes ready to be sent."""
    config = H2Configuration(
        client_side=client, header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
    )
    connection = H2Connection(config)
    values = {
        SettingCodes.MAX_CONCURRENT_STREAMS: limits.streams,
        SettingCodes.INITIAL_WINDOW_SIZE: limits.window,
        SettingCodes.MAX_FRAME_SIZE: limits.frame,
        SettingCodes.MAX_HEADER_LIST_SIZE: limits.header_list,
        SettingCodes.ENABLE_PUSH: 0,
    }
    connection.local_settings = Settings(client=client, initial_values=values)
    connection.max_inbound_frame_size = limits.frame
    connection.decoder.max_header_list_size = limits.header_list
    connection.initiate_connection()
    connection.increment_flow_control_window(max(limits.connection_window - _INITIAL_WINDOW, 1))
    return connection


def violation(error: Exception) -> FrameViolation:
    """What the library found wrong, as ours."""
    if isinstance(error, PeerProtocolError):
        return FrameViolation(error.message)
    code = int(error.error_code) if isinstance(error, ProtocolError) else ErrorCode.PROTOCOL_ERROR
    return FrameViolation(f"not HTTP/2: {error or type(error).__name__}", wire_code=code)
