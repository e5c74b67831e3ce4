"""Settings of the HTTP/2 plane."""

from typing import Annotated, ClassVar

from stator.config import Config, Setting
from stator.errors import ConfigError

__all__ = ["Http2Config"]


class Http2Config(Config, frozen=True, kw_only=True):
    """Where to listen, how much to take, how long to wait. The reference's variables are those of its HTTP plane (`spec/10 §7`)."""

    section: ClassVar[str] = "http2"

    # -- the worker
    host: Annotated[
        str, Setting(doc="address on which a worker takes requests; empty: the runtime's", dyn="DYN_HTTP_RPC_HOST")
    ] = ""
    port: Annotated[int, Setting(doc="its port; 0: any free one", ge=0, le=65_535, dyn="DYN_HTTP_RPC_PORT")] = 0
    root_path: Annotated[
        str,
        Setting(doc="what the paths of all endpoints begin with; a slash, and none at its end", dyn="DYN_HTTP_RPC_ROOT_PATH"),
    ] = "/v1/rpc"
    connections: Annotated[int, Setting(doc="connections a worker holds; more are closed at once", ge=1)] = 16_384
    greeting: Annotated[
        int, Setting(doc="connections that may be silent since they were made; one more closes the oldest of them", ge=1)
    ] = 1024
    request_budget: Annotated[
        int, Setting(doc="what all requests that are arriving may hold; more are refused as overload", unit="bytes", ge=2**20)
    ] = 256 * 2**20
    arrival_timeout: Annotated[
        float, Setting(doc="longest time from a request's header fields to the end of its body", unit="s", gt=0)
    ] = 30.0

    # -- the caller
    connect_timeout: Annotated[
        float,
        Setting(
            doc="longest wait for a connection and its settings; a worker's wait for a client's first bytes", unit="s", gt=0
        ),
    ] = 3.0
    request_timeout: Annotated[
        float,
        Setting(
            doc="longest wait for the status of a request whose answer calls home",
            unit="s",
            gt=0,
            dyn="DYN_HTTP_REQUEST_TIMEOUT",
        ),
    ] = 5.0
    pool_size: Annotated[int, Setting(doc="connections per address", ge=1, dyn="DYN_HTTP2_POOL_MAX_IDLE_PER_HOST")] = 100
    idle_timeout: Annotated[
        float,
        Setting(
            doc="time without streams before a connection is closed", unit="s", gt=0, dyn="DYN_HTTP2_POOL_IDLE_TIMEOUT_SECS"
        ),
    ] = 90.0

    # -- both sides
    window: Annotated[int, Setting(doc="what one stream may hold unread", unit="bytes", ge=65_535, le=2**30)] = 256 * 2**10
    max_streams: Annotated[
        int, Setting(doc="streams open at once on a connection", ge=1, le=2**20, dyn="DYN_HTTP2_MAX_CONCURRENT_STREAMS")
    ] = 1000
    max_frame: Annotated[
        int, Setting(doc="largest frame accepted", unit="bytes", ge=16_384, le=2**24 - 1, dyn="DYN_HTTP2_MAX_FRAME_SIZE")
    ] = 1_048_576
    max_headers: Annotated[int, Setting(doc="largest list of header fields accepted", unit="bytes", ge=8192, le=2**20)] = 65_536
    max_item: Annotated[int, Setting(doc="largest item a caller accepts", unit="bytes", ge=2**16, le=2**31)] = 128 * 2**20
    max_request: Annotated[
        int, Setting(doc="largest request, and largest input", unit="bytes", ge=2**16, le=2**31, dyn="DYN_TCP_MAX_MESSAGE_SIZE")
    ] = 32 * 2**20
    keep_alive_interval: Annotated[
        float, Setting(doc="silence with streams open before a PING", unit="s", gt=0, dyn="DYN_HTTP2_KEEP_ALIVE_INTERVAL_SECS")
    ] = 30.0
    keep_alive_timeout: Annotated[
        float,
        Setting(doc="unanswered PING before a connection is dead", unit="s", gt=0, dyn="DYN_HTTP2_KEEP_ALIVE_TIMEOUT_SECS"),
    ] = 10.0
    linger: Annotated[
        float, Setting(doc="how long a stream that has ended here waits for its end over there", unit="s", gt=0)
    ] = 10.0

    def check(self) -> None:
        """The root is a path."""
        root = self.root_path
        if (
            not root.startswith("/")
            or root.endswith("/")
            or not root.isascii()
            or not root.isprintable()
            or set(root) & set("?# %")
        ):
            raise ConfigError(
                f"http2.root_path = {root!r}: expected a path like /v1/rpc, without a slash at its end, '?', '#' or '%'"
            )
