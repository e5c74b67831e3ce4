"""An engine's own PUB socket, followed (`spec/40 §4.3`)."""

import asyncio

import zmq
import zmq.asyncio

from stator.errors import ConfigError
from stator.kv.engine_events import EngineEvents, EngineStatistics, RankedSink
from stator.kv.sources import ZmqSource

__all__ = ["follow_engine_socket"]

_MOST_WAITING = 100_000
"""messages; the engine's side has as many, and drops what does not fit"""
_LARGEST = 64 * 2**20
"""bytes of one message"""
_RECONNECT_MS = (100, 5000)


async def follow_engine_socket(source: ZmqSource, sink: RankedSink, *, statistics: EngineStatistics | None = None) -> None:
    """Tell `sink` what the engine publishes, until cancelled; then the socket is closed.

    ZMQ connects by itself, now and whenever the engine comes back, so an engine that is not there yet is no error. Batches that are
    missing are counted; a sequence that goes back means an engine that began anew, whose cache is empty. Raises `ConfigError` for
    an endpoint that ZMQ does not understand, or cannot bind.
    """
    counts = statistics if statistics is not None else EngineStatistics()
    events = EngineEvents(sink, dp_rank=source.dp_rank, statistics=counts)
    context = zmq.asyncio.Context()
    try:
        socket = _opened(context, source)
        expected: int | None = None
        while True:
            frames = await socket.recv_multipart()
            if len(frames) != 3 or len(frames[1]) != 8:
                events.malformed(f"a message of {len(frames)} frames came where topic, sequence and batch are expected")
                continue
            sequence = int.from_bytes(frames[1], "big", signed=True)
            if expected is not None and sequence < expected:
                counts.restarts += 1
                events.cleared()
            elif expected is not None:
                counts.gaps += sequence - expected
            expected = sequence + 1
            events.tell(frames[2])
            await asyncio.sleep(0)  # messages that wait are received without suspending
    finally:
        context.destroy(linger=0)


def _opened(context: zmq.asyncio.Context, source: ZmqSource) -> zmq.asyncio.Socket:
    socket = context.socket(zmq.SUB)
    socket.set_hwm(_MOST_WAITING)
    socket.maxmsgsize = _LARGEST
    socket.reconnect_ivl, socket.reconnect_ivl_max = _RECONNECT_MS
    socket.subscribe(source.topic)
    try:
        (socket.bind if source.bind else socket.connect)(source.endpoint)
    except zmq.ZMQError as error:
        raise ConfigError(f"the KV events' endpoint {source.endpoint!r} cannot be used: {error}") from error
    return socket
