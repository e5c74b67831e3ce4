"""Settings of the native plane."""

from typing import Annotated

from stator.config import Config, Setting

__all__ = ["NativeConfig"]


class NativeConfig(Config, frozen=True, kw_only=True):
    """Where a worker listens, and how much streams may hold."""

    section = "native"

    port: Annotated[int, Setting(doc="port to listen on; 0: any free one", ge=0, le=65535)] = 0
    unix: Annotated[bool, Setting(doc="also listen on a Unix socket, for clients of the same user and host")] = True
    pulse: Annotated[bool, Setting(doc="run the pulse thread, which tells a blocked process from a dead one")] = True
    connect_timeout: Annotated[
        float, Setting(doc="longest wait for a connection and its HELLO; a worker's wait for a client's HELLO", unit="s", gt=0)
    ] = 3.0
    connections: Annotated[int, Setting(doc="connections a worker holds; more are refused", ge=1)] = 16384
    greeting: Annotated[
        int, Setting(doc="connections that may wait for their client's HELLO; one more closes the oldest of them", ge=1)
    ] = 1024
    credit_budget: Annotated[
        int, Setting(doc="what all streams of the process may hold unread, and arriving requests", unit="bytes", ge=2**20)
    ] = 256 * 2**20
    window: Annotated[int, Setting(doc="what one stream may hold unread", unit="bytes", ge=16 * 2**10, le=2**30)] = 256 * 2**10
    max_item: Annotated[int, Setting(doc="largest item accepted", unit="bytes", ge=2**16, le=2**31)] = 128 * 2**20
    max_request: Annotated[
        int, Setting(doc="largest request accepted", unit="bytes", ge=2**16, le=2**31, dyn="DYN_TCP_MAX_MESSAGE_SIZE")
    ] = 32 * 2**20
    silence: Annotated[float, Setting(doc="silence with streams open before a PING", unit="s", ge=0.5)] = 1.0
    suspect_after: Annotated[float, Setting(doc="unanswered PING before an instance is suspect", unit="s", gt=0)] = 1.0
    dead_after: Annotated[float, Setting(doc="silence after which an instance without pulse is dead", unit="s", gt=0)] = 2.5
