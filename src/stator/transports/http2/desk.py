"""What the streams of a worker's listener have in common."""

from stator.protocol.http2_map import path_of
from stator.protocol.native.budget import ByteBudget
from stator.tasks import DeadlineWheel
from stator.transports.http2.config import Http2Config
from stator.transports.plane import PlaneHost, RequestSink
from stator.transports.tcp.config import TcpConfig
from stator.transports.tcp.reception import Reception

__all__ = ["Desk"]


class Desk:
    """The endpoints of a process, and the space that arriving requests share."""

    def __init__(self, config: Http2Config, host: PlaneHost) -> None:
        self.config = config
        self.wheel: DeadlineWheel = host.wheel
        self.input_timeout = host.input_timeout
        self.sinks: dict[str, RequestSink] = {}
        self.budget = ByteBudget(total=config.request_budget)
        self.reception = Reception(
            config=host.load(TcpConfig),
            wheel=host.wheel,
            input_timeout=host.input_timeout,
            tls=host.tls,
            refusals=host.refusals,
        )
        """for requests whose answers call home"""
        self.counts: dict[str, int] = {}
        """requests that were not taken, by status; connections that were closed, by reason"""

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        return self.reception.draining

    def path(self, target: str) -> str | None:
        """The endpoint that a request asks for, if it is one of ours."""
        path = path_of(self.config.root_path, target)
        return path if path in self.sinks else None

    def count(self, what: str) -> None:
        """One more."""
        self.counts[what] = self.counts.get(what, 0) + 1
