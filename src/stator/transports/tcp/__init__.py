"""The compatible plane on TCP, as the reference speaks it (`spec/10`): requests are pushed, answers are called home."""

from stator.transports.tcp.client import CompatibleClient
from stator.transports.tcp.config import TcpConfig
from stator.transports.tcp.plane import CompatiblePlane
from stator.transports.tcp.server import CompatibleServer

__all__ = ["CompatibleClient", "CompatiblePlane", "CompatibleServer", "TcpConfig"]
