"""TLS between two protocols, however its bytes are cut: what arrives is what was written, and each side hears of the end once."""

import asyncio
import tempfile
from functools import cache
from pathlib import Path
from typing import Self, cast

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from stator.errors import NotTrusted
from stator.security import Refusals, Tls
from stator.security.layer import TlsLayer
from stator.testing.certificates import Authority, tls_of
from stator.testing.manual_loop import ManualLoop
from stator.testing.pipe import Pipe

pytestmark = pytest.mark.timeout(120)

PATIENCE = 3.0


@cache
def certificates() -> tuple[tempfile.TemporaryDirectory[str], Tls]:
    directory = tempfile.TemporaryDirectory(prefix="stator-test-tls-")
    return directory, tls_of(Authority(Path(directory.name)))


class Above(asyncio.Protocol):
    """What TLS is for. `stays`: it writes on when the other side has ended."""

    def __init__(self, *, stays: bool) -> None:
        self.transport: asyncio.Transport | None = None
        self.received = bytearray()
        self.written = bytearray()
        self.made = self.ended = self.lost = 0
        self.reason: Exception | None = None
        self._stays = stays
        self.shut = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.made += 1

    def data_received(self, data: bytes) -> None:
        assert data and self.made == 1 and not self.lost and not self.ended
        self.received += data

    def eof_received(self) -> bool:
        self.ended += 1
        return self._stays

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost += 1
        self.reason = exc

    def write(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing() and not self.shut:
            self.written += data
            self.transport.write(data)

    def write_eof(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.shut = True
            self.transport.write_eof()

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()


class Conversation:
    """Both sides on a network that the test moves."""

    def __init__(self, *, stays: bool) -> None:
        _, tls = certificates()
        self.loop = ManualLoop()
        self.refusals = Refusals()
        self.dialler, self.listener = Above(stays=stays), Above(stays=stays)
        self.shaken: asyncio.Future[None] = self.loop.create_future()
        options = {"refusals": self.refusals, "patience": PATIENCE}
        self.below = [
            TlsLayer(self.dialler, tls.client_context(), dials="stator", shaken=self.shaken, **options),  # type: ignore[arg-type]
            TlsLayer(self.listener, tls.server_context(), **options),  # type: ignore[arg-type]
        ]
        self.pipe = Pipe(self.loop, *self.below, lose=lambda: False, reset_on_close=False)
        for end in self.pipe.ends:
            end.made()
        self.loop.turn()

    def carry(self, most: int | None) -> None:
        self.loop.act(lambda: self.pipe.carry(most))
        self.loop.turn()

    def act(self, what: str, side: int, size: int) -> None:
        above = (self.dialler, self.listener)[side]
        match what:
            case "write":
                self.loop.act(lambda: above.write(bytes(index % 251 for index in range(size))))
            case "end":
                self.loop.act(above.write_eof)
            case "close":
                self.loop.act(above.close)
            case "garbage":
                self.pipe.ends[side].write(b"\x17\x03\x03\x00\x05hello" * (size % 5 + 1))
            case "reset":
                self.pipe.ends[side].reset(lose=False)
            case _:
                self.carry(size or None)

    def settle(self) -> None:
        self.loop.connections = [self.pipe]
        self.loop.settle()

    def check(self) -> None:
        for one, other in ((self.dialler, self.listener), (self.listener, self.dialler)):
            assert one.received == other.written[: len(one.received)]
            assert one.made <= 1 and one.lost <= 1 and one.ended <= 1

    def end(self) -> None:
        """Both close; whoever was told of a connection is told of its end."""
        self.settle()
        for above in (self.dialler, self.listener):
            self.loop.act(above.close)
        self.settle()
        self.loop.pass_time(PATIENCE + 1.0)
        self.settle()
        self.check()
        assert self.loop.failures == []
        assert self.dialler.lost == self.dialler.made
        assert self.listener.lost == 1
        assert self.shaken.done()
        self.shaken.exception()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.close()


SIZES = st.sampled_from([1, 5, 100, 16_383, 16_384, 16_385, 70_000])
CHUNKS = st.sampled_from([1, 5, 90, 1000, 16_384, 0])
QUIET = st.tuples(st.sampled_from(["write", "write", "carry"]), st.integers(0, 1), SIZES)
ROUGH = st.tuples(
    st.sampled_from(["write", "write", "carry", "carry", "carry", "end", "close", "garbage", "reset"]), st.integers(0, 1), SIZES
)
OPTIONS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@OPTIONS
@given(chunk=CHUNKS, steps=st.lists(QUIET, max_size=12))
def test_everything_arrives_in_order_however_it_is_cut(chunk: int, steps: list[tuple[str, int, int]]) -> None:
    with Conversation(stays=True) as talk:
        while talk.dialler.made + talk.listener.made < 2:
            talk.carry(chunk or None)
        for what, side, size in steps:
            talk.act(what, side, size)
            talk.check()
        talk.act("end", 0, 0)
        talk.act("end", 1, 0)
        talk.settle()
        assert talk.dialler.received == talk.listener.written and talk.listener.received == talk.dialler.written
        assert talk.dialler.ended == talk.listener.ended == 1
        assert talk.refusals.counts == {}
        talk.end()
        assert talk.dialler.reason is None and talk.listener.reason is None


@OPTIONS
@given(stays=st.booleans(), steps=st.lists(ROUGH, max_size=25))
def test_each_side_hears_of_the_end_once_whatever_happens(stays: bool, steps: list[tuple[str, int, int]]) -> None:
    with Conversation(stays=stays) as talk:
        for what, side, size in steps:
            if what == "garbage" and talk.pipe.ends[side]._fin:  # pyright: ignore[reportPrivateUsage] (nothing is written behind the end)
                continue
            talk.act(what, side, size)
            talk.check()
        talk.end()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(side=st.integers(0, 1), first=st.binary(min_size=1, max_size=600))
def test_whatever_is_said_first_is_answered_or_refused(side: int, first: bytes) -> None:
    """By somebody who is no TLS at all, or starts like it."""
    with Conversation(stays=False) as talk:
        stranger = talk.pipe.ends[side]
        stranger._pending[:] = first  # pyright: ignore[reportPrivateUsage] (in place of what TLS said)
        talk.settle()
        talk.loop.pass_time(PATIENCE + 1.0)
        talk.settle()
        told = (talk.listener, talk.dialler)[side]
        assert told.received == b""
        error = talk.shaken.exception() if side else talk.listener.reason
        if not told.made:  # a few records may stand before a handshake and mean nothing
            assert isinstance(error, NotTrusted), error
            assert sum(talk.refusals.counts.values()) >= 1
        talk.end()


def test_a_silent_other_side_is_left_in_time() -> None:
    with Conversation(stays=False) as talk:
        talk.loop.pass_time(PATIENCE + 1.0)
        assert isinstance(talk.shaken.exception(), NotTrusted)
        talk.end()
