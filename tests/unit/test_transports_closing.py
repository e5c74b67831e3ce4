"""How what a listener accepted comes to its end."""

import asyncio

import pytest

from stator.errors import ConnectFailed, StatorError
from stator.transports import closing
from stator.transports.closing import close_all, closed

pytestmark = pytest.mark.timeout(10)

REASON = ConnectFailed("the plane closes")


class Connections:
    """Those that are open, and when the last one has ended."""

    def __init__(self) -> None:
        self.open: dict[Connection, None] = {}
        self.empty = asyncio.Event()

    def end(self, connection: "Connection") -> None:
        self.open.pop(connection, None)
        if not self.open:
            self.empty.set()

    async def close(self) -> None:
        await close_all(self.open, REASON, empty=self.empty)


class Connection:
    """`leaves`: its client takes what is queued, a tick later."""

    def __init__(self, among: Connections, *, leaves: bool) -> None:
        self.among = among
        self.leaves = leaves
        self.heard: list[tuple[str, StatorError]] = []
        among.open[self] = None

    def close(self, reason: StatorError) -> None:
        self.heard.append(("close", reason))
        if self.leaves:
            asyncio.get_running_loop().call_soon(self.among.end, self)

    def abort(self, reason: StatorError) -> None:
        self.heard.append(("abort", reason))
        self.among.end(self)


async def test_connections_end_by_themselves_when_their_clients_read() -> None:
    connections = Connections()
    both = [Connection(connections, leaves=True) for _ in range(2)]
    await connections.close()
    assert [each.heard for each in both] == [[("close", REASON)]] * 2
    assert not connections.open


async def test_who_does_not_read_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closing, "_LEAVE_LIMIT", 0.05)
    connections = Connections()
    connections.empty.set()  # as it was before these came
    reads, stuck = Connection(connections, leaves=True), Connection(connections, leaves=False)
    await connections.close()
    assert reads.heard == [("close", REASON)]
    assert stuck.heard == [("close", REASON), ("abort", REASON)]


async def test_with_no_connections_there_is_nothing_to_wait_for() -> None:
    async with asyncio.timeout(0.5):
        await Connections().close()


async def test_connections_that_stay_are_named(caplog: pytest.LogCaptureFixture) -> None:
    await closed(None, lambda: 3)
    assert caplog.messages == ["3 connections did not close"]


async def test_connections_have_some_ticks_to_hear_of_their_end(caplog: pytest.LogCaptureFixture) -> None:
    left = iter((2, 1, 0, 0))
    await closed(None, lambda: next(left))
    assert caplog.messages == []
