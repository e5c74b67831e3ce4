"""One dial that many wait for."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from stator.errors import ConnectFailed, NotTrusted, PeerProtocolError, StatorError, Timeout, Unavailable
from stator.tasks import Scope
from stator.transports.dialling import SharedDial, connect_error

pytestmark = pytest.mark.timeout(10)


class Dialled:
    """A dial that ends when it is told to."""

    def __init__(self) -> None:
        self.scope = Scope("dials")
        self.begun = 0
        self.ended = 0
        self.outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def dial(self) -> SharedDial[str]:
        return SharedDial(self._connect, dials=self.scope, name="dial", ended=self._ended)

    async def _connect(self) -> str:
        self.begun += 1
        return await asyncio.shield(self.outcome)

    def _ended(self) -> None:
        self.ended += 1


@pytest.fixture
async def dialled() -> AsyncIterator[Dialled]:
    it = Dialled()
    yield it
    await it.scope.aclose()


async def waiting(dial: SharedDial[str], callers: int) -> list[asyncio.Task[str]]:
    tasks = [asyncio.create_task(dial.wait()) for _ in range(callers)]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def test_all_who_wait_share_one_dial(dialled: Dialled) -> None:
    dial = dialled.dial()
    callers = await waiting(dial, 3)
    assert not dial.over and dialled.ended == 0
    dialled.outcome.set_result("line")
    assert await asyncio.gather(*callers) == ["line"] * 3
    assert (dialled.begun, dialled.ended) == (1, 1)
    assert dial.over and await dial.wait() == "line"


@pytest.mark.parametrize("error", [ConnectionRefusedError("refused"), Unavailable("drains")], ids=repr)
async def test_all_are_told_of_a_failure_which_is_no_crash(
    dialled: Dialled, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    callers = await waiting(dialled.dial(), 2)
    dialled.outcome.set_exception(error)
    for caller in callers:
        with pytest.raises(type(error)) as caught:
            await caller
        assert caught.value is error
    assert dialled.ended == 1 and caplog.records == []


async def test_a_bug_is_told_and_logged(dialled: Dialled, caplog: pytest.LogCaptureFixture) -> None:
    (caller,) = await waiting(dialled.dial(), 1)
    dialled.outcome.set_exception(LookupError("a bug"))
    with pytest.raises(LookupError):
        await caller
    assert dialled.ended == 1 and "task dial of dials failed" in caplog.text


async def test_who_is_cancelled_leaves_the_dial_to_the_others(dialled: Dialled) -> None:
    first, second = await waiting(dialled.dial(), 2)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert dialled.ended == 0
    dialled.outcome.set_result("line")
    assert await second == "line"


@pytest.mark.parametrize("begun", [False, True])
async def test_the_end_of_its_scope_is_a_failed_dial(dialled: Dialled, begun: bool) -> None:
    dial = dialled.dial()
    caller = asyncio.create_task(dial.wait())
    if begun:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await dialled.scope.aclose()
    assert (dialled.begun, dialled.ended, dial.over) == (int(begun), 1, True)
    with pytest.raises(ConnectionAbortedError, match="the client closed its plane"):
        await caller


async def test_who_is_cancelled_while_its_scope_ends_is_cancelled(dialled: Dialled) -> None:
    (caller,) = await waiting(dialled.dial(), 1)
    caller.cancel()
    await dialled.scope.aclose()
    with pytest.raises(asyncio.CancelledError):
        await caller


async def test_a_dial_is_over_before_it_says_so(dialled: Dialled) -> None:
    """Who comes between must not take it for one that is under way: waiting for it would not let the loop go on."""
    dial = dialled.dial()
    await waiting(dial, 1)
    seen: list[tuple[bool, int]] = []

    async def late() -> None:
        await asyncio.shield(dialled.outcome)
        seen.append((dial.over, dialled.ended))

    task = asyncio.create_task(late())
    await asyncio.sleep(0)
    dialled.outcome.set_result("line")
    await task
    assert seen == [(True, 0)]


def _read(error: StatorError) -> tuple[type[StatorError], str, int, str]:
    return type(error), error.message, error.instance, error.phase


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (TimeoutError(), Timeout, "no line to host:1 within 2.5 s"),
        (Unavailable("it drains", instance=3), Unavailable, "it drains"),
        (NotTrusted("no certificate", instance=3), NotTrusted, "cannot connect to host:1: no certificate"),
        (ConnectionRefusedError("refused"), ConnectFailed, "cannot connect to host:1: refused"),
        (ConnectFailed("another process", instance=3), ConnectFailed, "cannot connect to host:1: another process"),
        (PeerProtocolError("no address"), ConnectFailed, "cannot connect to host:1: no address"),
    ],
    ids=repr,
)
def test_each_who_waited_has_an_error_of_its_own(error: Exception, kind: type[StatorError], text: str) -> None:
    told: Callable[[int], StatorError] = lambda instance: connect_error(  # noqa: E731  # two of the same
        error, sought="line", address="host:1", limit=2.5, instance=instance
    )
    assert _read(told(7)) == (kind, text, 7, "connect")
    assert told(8) is not error and told(8).instance == 8


def test_the_reason_of_a_refusal_is_kept() -> None:
    told = connect_error(NotTrusted("no", reason="encrypted"), address="host:1", limit=1, instance=7)
    assert isinstance(told, NotTrusted) and told.reason == "encrypted"
