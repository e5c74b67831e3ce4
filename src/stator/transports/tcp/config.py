"""Settings of the compatible TCP plane."""

from typing import Annotated, ClassVar, Literal

from stator.config import Config, Setting
from stator.transports.address import interface_address

__all__ = ["TcpConfig"]


class TcpConfig(Config, frozen=True, kw_only=True):
    """Where to listen, how much to take, how long to wait. The reference's variables are in `spec/10 §1.7`."""

    section: ClassVar[str] = "tcp"

    # -- both sides
    max_message_size: Annotated[
        int,
        Setting(
            doc="largest request frame, all of its fields; a worker refuses larger ones, a client does not send them",
            unit="bytes",
            ge=1024,
            dyn="DYN_TCP_MAX_MESSAGE_SIZE",
        ),
    ] = 33_554_432
    max_item_size: Annotated[int, Setting(doc="largest frame a client takes from a worker", unit="bytes", ge=65_536)] = 2**27

    # -- the worker
    port: Annotated[
        int,
        Setting(
            doc="port on which a worker takes requests; 0: any free one",
            ge=0,
            le=65_535,
            dyn="DYN_TCP_RPC_PORT",
            on_bad_dyn="default",
        ),
    ] = 0
    linger: Annotated[
        float, Setting(doc="how long a finished answer's connection waits for its client to close it", unit="s", gt=0)
    ] = 10.0

    # -- the client
    call_home_host: Annotated[
        str,
        Setting(
            doc="address on which a client waits for answers; empty: the runtime's (the reference names a network interface)",
            dyn="DYN_TCP_RESPONSE_STREAM_HOST",
            dyn_read=interface_address,
            on_bad_dyn="error",
        ),
    ] = ""
    call_home_port: Annotated[
        int,
        Setting(doc="its port; 0: any free one", ge=0, le=65_535, dyn="DYN_TCP_RESPONSE_STREAM_PORT", on_bad_dyn="default"),
    ] = 0
    codec: Annotated[
        Literal["json", "msgpack"],
        Setting(
            doc="codec of requests and answers where the instance's record does not name one",
            dyn="DYN_REQUEST_PLANE_CODEC",
            on_bad_dyn="default",
        ),
    ] = "json"
    connect_timeout: Annotated[
        float, Setting(doc="longest wait for a connection, in either direction", unit="s", gt=0, dyn="DYN_TCP_CONNECT_TIMEOUT")
    ] = 3.0
    request_timeout: Annotated[
        float,
        Setting(
            doc="longest wait for an acknowledgement; a request connection that is slower is closed",
            unit="s",
            gt=0,
            dyn="DYN_TCP_REQUEST_TIMEOUT",
        ),
    ] = 5.0
    pool_size: Annotated[int, Setting(doc="request connections per worker process", ge=1, dyn="DYN_TCP_POOL_SIZE")] = 100
    pipeline: Annotated[int, Setting(doc="unacknowledged requests per connection", ge=1, dyn="DYN_TCP_CHANNEL_BUFFER")] = 1024
    idle_timeout: Annotated[
        float,
        Setting(doc="idle time after which a request connection is closed", unit="s", gt=0, dyn="DYN_TCP_HOST_IDLE_TTL_SECS"),
    ] = 300.0
    concurrent_connects: Annotated[
        int, Setting(doc="connections being made at once, over all workers", ge=1, dyn="DYN_TCP_GLOBAL_CONNECT_LIMIT")
    ] = 64
    handshake_timeout: Annotated[float, Setting(doc="longest silence of a new call-home connection", unit="s", gt=0)] = 10.0
    max_silent: Annotated[
        int, Setting(doc="call-home connections that may be silent at once; the oldest is closed for the next", ge=1)
    ] = 8192
