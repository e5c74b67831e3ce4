"""etcd that goes, comes back, comes back empty, freezes, forgets; and the processes that must not notice."""

import asyncio
import logging
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from stator.discovery.etcd import EtcdConfig, EtcdDiscovery, open_etcd
from stator.discovery.etcd_store import EtcdStore, Snapshot
from stator.errors import Unavailable
from stator.protocol.records import EndpointRecord, Query
from stator.tasks import Scope, SystemClock
from stator.testing.cluster import open_files, tasks_now
from stator.testing.discovery_suite import endpoint_record, silence, until
from stator.testing.etcd_server import EtcdServer, etcd_cluster, etcd_server, leader_of

pytestmark = pytest.mark.timeout(90)

ENDPOINTS = Query(EndpointRecord.bucket)
TTL = 2
QUICK: dict[str, Any] = {"lease_ttl": TTL, "request_timeout": 0.5, "answer_timeout": 1.0, "reconnect_most": 0.3}

OWNER = """
import asyncio, sys
from random import Random
from stator.discovery.etcd import EtcdConfig, open_etcd
from stator.tasks import SystemClock
from stator.testing.discovery_suite import endpoint_record
async def main(url, ttl, instance):
    async with open_etcd(EtcdConfig(endpoints=(url,), lease_ttl=ttl), clock=SystemClock(), random=Random()) as discovery:
        await discovery.register(endpoint_record(instance))
        print("ready", flush=True)
        await asyncio.sleep(600)
asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_fails_unexpectedly(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record.message for record in caplog.get_records("call") if record.levelno >= logging.ERROR] == []


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    """Tasks and sockets are gone when a test is over."""

    def now() -> tuple[list[str], Counter[str]]:
        """Without the numbers of sockets: the loop makes new ones for itself."""
        return tasks_now(), Counter(re.sub(r"\[\d+\]", "", what) for what in open_files().values())

    before = now()
    yield
    for _ in range(100):
        if now() == before:
            break
        await asyncio.sleep(0.02)
    assert now() == before


class FirstMember(Random):
    """Lets everybody begin with the first member."""

    def randrange(self, *args: Any) -> int:
        return 0


def discovery(*urls: str, **settings: Any) -> EtcdDiscovery:
    return open_etcd(EtcdConfig(endpoints=urls, **{**QUICK, **settings}), clock=SystemClock(), random=FirstMember())


class Site:
    """Workers with a record each, and a client that notes the fewest it ever knew."""

    def __init__(self, stack: AsyncExitStack, client: EtcdDiscovery) -> None:
        self.client = client
        self.workers: list[EtcdDiscovery] = []
        self.known: set[int] = set()
        self.fewest = 0
        self.lost: set[int] = set()
        """whom the client did not know for a moment"""
        self._stack = stack

    async def join(self, *urls: str, count: int = 1) -> None:
        for _ in range(count):
            worker = await self._stack.enter_async_context(discovery(*urls))
            await worker.register(endpoint_record(worker.instance_id))
            self.workers.append(worker)

    @property
    def ids(self) -> set[int]:
        return {worker.instance_id for worker in self.workers}

    async def observe(self) -> None:
        async with self.client.watch(ENDPOINTS) as watch:
            async for _ in watch:
                now = {key.id for key in watch.current}
                self.lost |= self.known - now
                self.known = now


async def eventually(condition: Callable[[], bool], what: str, *, within: float = 20.0) -> float:
    """Wait until `condition()` holds; the answer is how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within, f"{what}: not within {within} s"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


@asynccontextmanager
async def site(*urls: str, workers: int = 3) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        found = Site(stack, await stack.enter_async_context(discovery(*urls)))
        scope = await stack.enter_async_context(Scope("observer"))
        scope.spawn(found.observe(), name="observer")
        await found.join(*urls, count=workers)
        await eventually(lambda: found.known == found.ids, "everybody is known")
        yield found


def stale(site: Site) -> list[EtcdDiscovery]:
    return [one for one in (*site.workers, site.client) if not one.status.connected]


async def in_etcd(server: EtcdServer, ids: set[int], *, within: float = 20.0) -> float:
    """Wait until etcd has exactly the records of `ids`."""
    began = time.monotonic()
    wanted = {str(endpoint_record(id).key) for id in ids}
    while set(await asyncio.to_thread(server.keys)) != wanted:
        assert time.monotonic() - began < within, (await asyncio.to_thread(server.keys), wanted)
        await asyncio.sleep(0.02)
    return time.monotonic() - began


# etcd is away


@pytest.mark.parametrize("empty", [False, True], ids=["with its data", "empty"])
async def test_etcd_stops_and_comes_back(etcd: EtcdServer, empty: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "stator.discovery")
    async with site(etcd.url) as here:
        before = await asyncio.to_thread(etcd.leases)
        await asyncio.to_thread(etcd.kill)
        await eventually(lambda: len(stale(here)) == 4, "everybody has noticed", within=5)
        assert "etcd" in here.client.status.reason or "127.0.0.1" in here.client.status.reason
        assert {record.key.id for record in await here.client.list(ENDPOINTS)} == here.ids
        await asyncio.sleep(1.5 * TTL)  # every lease would have ended
        if empty:
            etcd.wipe()
        await asyncio.to_thread(etcd.start)
        back = time.monotonic()
        await in_etcd(etcd, here.ids, within=2 * TTL)
        await eventually(lambda: not stale(here), "contact is back")
        assert time.monotonic() - back < 2 * TTL
        leases = await asyncio.to_thread(etcd.leases)
        assert (sorted(leases) == sorted(before)) is not empty
        await here.join(etcd.url)
        await eventually(lambda: here.known == here.ids, "who comes later is seen")
        await asyncio.sleep(TTL + 0.5)  # the patience is over, and nobody was lost
        assert here.lost == set()
        assert here.known == here.ids
        assert {record.key.id for record in await here.client.list(ENDPOINTS)} == here.ids
    texts = [record.message for record in caplog.records]
    assert sum("etcd does not answer" in text for text in texts) == 4
    assert sum("etcd answers again" in text for text in texts) == 4


@pytest.mark.parametrize("empty", [False, True], ids=["with its data", "empty"])
async def test_who_died_while_etcd_was_away_is_gone_soon_after(etcd: EtcdServer, empty: bool) -> None:
    async with site(etcd.url) as here, owner(etcd.url, 7) as process:
        await eventually(lambda: 7 in here.known, "the process is known")
        await asyncio.to_thread(etcd.kill)
        process.kill()
        await asyncio.sleep(TTL / 2)
        if empty:
            etcd.wipe()
        await asyncio.to_thread(etcd.start)
        assert await eventually(lambda: 7 not in here.known, "the dead are gone", within=3 * TTL) < 2 * TTL + 1.0
        assert here.lost == {7}
        assert here.known == here.ids


async def test_etcd_stands_still_for_longer_than_the_ttl(etcd: EtcdServer) -> None:
    async with site(etcd.url) as here:
        before = set(await asyncio.to_thread(etcd.leases))
        standing = etcd.standing_still()
        await asyncio.to_thread(standing.__enter__)
        try:
            await eventually(lambda: len(stale(here)) >= 3, "the workers have noticed", within=TTL)
            assert "no answer within" in here.workers[0].status.reason
            await asyncio.sleep(1.5 * TTL)
            assert {record.key.id for record in await here.client.list(ENDPOINTS)} == here.ids
        finally:
            standing.__exit__(None, None, None)
        await eventually(lambda: not stale(here), "contact is back")
        await in_etcd(etcd, here.ids, within=2 * TTL)
        await asyncio.sleep(TTL + 1)
        await in_etcd(etcd, here.ids, within=2 * TTL)
        assert set(await asyncio.to_thread(etcd.leases)) != before, "leases have ended meanwhile"
        assert here.lost == set()
        assert here.known == here.ids


async def test_every_lease_is_revoked(etcd: EtcdServer, caplog: pytest.LogCaptureFixture) -> None:
    async with site(etcd.url, workers=5) as here:
        for _ in range(3):
            before = set(await asyncio.to_thread(etcd.leases))
            revoked = time.monotonic()
            assert len(await asyncio.to_thread(etcd.revoke_all)) >= 5
            await in_etcd(etcd, here.ids, within=TTL)
            assert time.monotonic() - revoked < TTL / 3, "nobody waits for the next sign of life"
            assert not before & set(await asyncio.to_thread(etcd.leases)) - {here.client.instance_id}
        await asyncio.sleep(0.5)  # in which the client would be told of who was missed
        assert here.lost == set()
        assert here.known == here.ids
        assert len({worker.instance_id for worker in here.workers}) == 5
    assert sum("is gone; 1 records are registered under" in record.message for record in caplog.records) >= 5


async def test_a_record_deleted_by_hand_is_written_again(etcd: EtcdServer) -> None:
    async with discovery(etcd.url) as worker:
        records = [endpoint_record(n) for n in range(3)]
        for record in records:
            await worker.register(record)
        for record in records:
            await asyncio.to_thread(etcd.delete, str(record.key))
            assert await in_etcd(etcd, {0, 1, 2}) < TTL
        assert await asyncio.to_thread(etcd.leases) == [worker.instance_id]


async def test_who_is_killed_is_gone_when_its_ttl_is_over(etcd: EtcdServer) -> None:
    async with site(etcd.url) as here, owner(etcd.url, 7) as process:
        await eventually(lambda: 7 in here.known, "the process is known")
        await asyncio.sleep(TTL + 0.5)
        assert 7 in here.known
        process.send_signal(signal.SIGKILL)
        took = await eventually(lambda: 7 not in here.known, "the dead are gone", within=3 * TTL)
        assert TTL / 2 < took < TTL + 1.5
        assert here.lost == {7}


async def test_a_process_that_stood_still_comes_back(etcd: EtcdServer) -> None:
    async with site(etcd.url) as here, owner(etcd.url, 7) as process:
        await eventually(lambda: 7 in here.known, "the process is known")
        process.send_signal(signal.SIGSTOP)
        await eventually(lambda: 7 not in here.known, "it has disappeared", within=3 * TTL)
        process.send_signal(signal.SIGCONT)
        await eventually(lambda: 7 in here.known, "it is back", within=TTL)


@asynccontextmanager
async def owner(url: str, instance: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that owns a record; killed in the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, url, str(TTL), str(instance), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


# Calls while etcd is away


async def test_what_is_asked_while_etcd_is_away(etcd: EtcdServer) -> None:
    async with discovery(etcd.url) as worker, discovery(etcd.url) as client, client.watch(ENDPOINTS) as watch:
        await worker.register(endpoint_record(1))
        await worker.register(endpoint_record(2))
        await until(watch, lambda: len(watch.current) == 2)
        with etcd.standing_still():
            began = time.monotonic()
            with pytest.raises(Unavailable, match=r"cannot register v1/instances/demo/backend/generate/3 in etcd: .*127.0.0.1"):
                await worker.register(endpoint_record(3))
            assert await worker.unregister(endpoint_record(2).key) is True
            assert set(worker.owned()) == {endpoint_record(1).key}
            assert len(await client.list(ENDPOINTS)) == 2
            assert time.monotonic() - began < 4
        # what was asked for in vain does not happen later, and what was taken back goes
        await in_etcd(etcd, {1}, within=2 * TTL)
        await asyncio.sleep(TTL)
        await in_etcd(etcd, {1})
        assert await worker.register(endpoint_record(3)) is True
        await in_etcd(etcd, {1, 3})


async def test_closing_does_not_wait_for_etcd(etcd: EtcdServer) -> None:
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(discovery(etcd.url))
        await worker.register(endpoint_record(1))
        with etcd.standing_still():
            began = time.monotonic()
            await worker.aclose()
            assert time.monotonic() - began < 1.5
        await in_etcd(etcd, set(), within=3 * TTL)


# The start


async def test_without_etcd_the_start_fails_with_its_address() -> None:
    began = time.monotonic()
    with pytest.raises(
        Unavailable, match=r"cannot reach etcd at http://127\.0\.0\.1:1,http://127\.0\.0\.1:2 .*refused.* within 0\.5 s"
    ):
        async with discovery("127.0.0.1:1", " 127.0.0.1:2 ", start_timeout=0.5):
            pass
    assert 0.2 < time.monotonic() - began < 2


async def test_etcd_that_comes_late_is_waited_for(etcd: EtcdServer) -> None:
    await asyncio.to_thread(etcd.kill)
    async with Scope("late") as scope:
        scope.spawn(asyncio.to_thread(lambda: (time.sleep(1), etcd.start())), name="late")
        async with discovery(etcd.url, start_timeout=20) as worker:
            await worker.register(endpoint_record(1))
        await scope.join()


# Several members


@pytest.fixture
def members(tmp_path: Path) -> Iterator[list[EtcdServer]]:
    with etcd_cluster(tmp_path) as servers:
        yield servers


async def test_each_member_is_killed_in_turn(members: list[EtcdServer]) -> None:
    urls = [member.url for member in members]
    async with site(*urls) as here:
        leader = await asyncio.to_thread(leader_of, members)
        leaders = {leader.name}
        for victim in [leader, *(member for member in members if member is not leader)]:
            await asyncio.to_thread(victim.kill)
            others = [member for member in members if member is not victim]
            leaders.add((await asyncio.to_thread(leader_of, others)).name)
            await here.join(*urls)
            await eventually(lambda: here.known == here.ids, "who comes meanwhile is seen", within=10)
            await asyncio.sleep(TTL / 2)
            await asyncio.to_thread(victim.start)
        assert len(leaders) > 1
        await asyncio.sleep(TTL + 0.5)
        await in_etcd(members[0], here.ids)
        assert here.lost == set()
        assert here.known == here.ids
        await eventually(lambda: not stale(here), "contact is back")


async def test_a_member_that_stands_still_is_left(members: list[EtcdServer]) -> None:
    leader = await asyncio.to_thread(leader_of, members)
    victim, *others = sorted(members, key=lambda member: member is leader)
    async with site(victim.url, *(member.url for member in others)) as here:
        with victim.standing_still():
            await asyncio.sleep(TTL)  # signs of life are due, and go elsewhere
            assert stale(here) == []
            async with discovery(leader.url) as newcomer:
                await newcomer.register(endpoint_record(1))
                await eventually(lambda: 1 in here.known, "news come from the others", within=2)
        await asyncio.sleep(TTL)
        assert here.lost <= {1}
        assert here.known == here.ids


async def test_dead_members_are_passed_over(etcd: EtcdServer) -> None:
    async with discovery("127.0.0.1:1", "127.0.0.1:2", etcd.url) as worker:
        await worker.register(endpoint_record(worker.instance_id))
        assert worker.status.connected


# The connection


class Proxy:
    """Passes bytes on to etcd until it is told otherwise."""

    def __init__(self, target: EtcdServer) -> None:
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._frozen: set[asyncio.StreamWriter] = set()
        self.refusing = False
        self.mute = False
        """etcd is asked, and its answers are lost"""
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Proxy"]:
        async with Scope("proxy") as scope:
            server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            try:
                yield self
            finally:
                server.close()
                self.cut()
                await scope.aclose()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self.refusing:
                return
            there, back = await asyncio.open_connection("127.0.0.1", self._target.client_port)
            self._writers.add(back)
            try:
                await asyncio.gather(self._copy(reader, back), self._copy(there, writer, answers=True))
            finally:
                self._close(back)
        except OSError:
            pass
        finally:
            self._close(writer)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool = False) -> None:
        while chunk := await reader.read(65536):
            if writer not in self._frozen and not (answers and self.mute):
                writer.write(chunk)
        self._close(writer)

    def _close(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        self._frozen.discard(writer)
        writer.close()

    def freeze(self) -> None:
        """What is open stays open and passes nothing on; new connections do."""
        self._frozen |= self._writers

    def cut(self) -> None:
        for writer in tuple(self._writers):
            self._close(writer)


async def test_a_registration_whose_answer_is_lost_is_taken_back(etcd: EtcdServer) -> None:
    async with Proxy(etcd).serving() as proxy, discovery(proxy.url) as worker:
        await worker.register(endpoint_record(1))
        proxy.mute = True
        with pytest.raises(Unavailable, match="no answer within"):
            await worker.register(endpoint_record(3))
        assert set(worker.owned()) == {endpoint_record(1).key}
        await in_etcd(etcd, {1, 3}, within=1)
        proxy.mute = False
        await in_etcd(etcd, {1}, within=TTL)
        assert await worker.register(endpoint_record(3)) is True
        await in_etcd(etcd, {1, 3}, within=1)


async def test_a_record_taken_back_in_vain_is_gone_when_etcd_answers(etcd: EtcdServer) -> None:
    async with Proxy(etcd).serving() as proxy, discovery(proxy.url) as worker:
        await worker.register(endpoint_record(1))
        await worker.register(endpoint_record(2))
        proxy.refusing = True
        proxy.cut()
        assert await worker.unregister(endpoint_record(2).key) is True
        await in_etcd(etcd, {1, 2}, within=1)
        proxy.refusing = False
        await in_etcd(etcd, {1}, within=TTL)


async def test_what_was_compacted_while_a_watcher_was_away_is_a_difference(etcd: EtcdServer) -> None:
    async with discovery(etcd.url) as worker, Proxy(etcd).serving() as proxy, discovery(proxy.url) as client:
        watch = client.watch(ENDPOINTS)
        async with watch:
            for instance in (1, 2, 3):
                await worker.register(endpoint_record(instance))
            await until(watch, lambda: len(watch.current) == 3)
            proxy.refusing = True
            proxy.cut()
            await eventually(lambda: not client.status.connected, "it has noticed")
            for _ in range(20):
                await worker.unregister(endpoint_record(1).key)
                await worker.register(endpoint_record(1, tcp="192.0.2.9:1/a/generate"))
                await worker.unregister(endpoint_record(1).key)
                await worker.register(endpoint_record(1))
            await worker.unregister(endpoint_record(2).key)
            await worker.register(endpoint_record(4))
            await asyncio.to_thread(etcd.compact)
            proxy.refusing = False
            seen: set[int] = set()
            began = time.monotonic()
            while {key.id for key in watch.current} != {1, 3, 4}:
                async with asyncio.timeout(10):
                    seen |= {change.key.id if hasattr(change, "key") else change.record.key.id for change in await anext(watch)}
            assert seen == {2, 4}, "what is the same again is not told"
            assert time.monotonic() - began < TTL + 1
            await silence(watch)


async def test_a_revision_that_is_compacted_meanwhile_is_read_again(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = EtcdStore.read
    old: list[int] = []

    async def late(self: EtcdStore, prefix: bytes, *, within: float | None = None) -> Snapshot:
        found = await real(self, prefix, within=within)
        if len(old) < 2 and prefix == b"v1/instances/":
            old.append(found.revision)
            for _ in range(3):
                await asyncio.to_thread(etcd.put, "x", b"")
            await asyncio.to_thread(etcd.compact)
        return found

    async with discovery(etcd.url) as worker:
        monkeypatch.setattr(EtcdStore, "read", late)
        async with worker.watch(ENDPOINTS) as watch:
            await worker.register(endpoint_record(1))
            await until(watch, lambda: len(watch.current) == 1)
            await worker.register(endpoint_record(2))
            await until(watch, lambda: len(watch.current) == 2)
        assert len(old) == 2
        assert worker.status.connected


async def test_a_watch_that_has_gone_deaf_is_opened_again(etcd: EtcdServer, caplog: pytest.LogCaptureFixture) -> None:
    """Its connection stays open, but nothing comes any more, as behind a firewall that forgot it."""
    caplog.set_level(logging.INFO, "stator.discovery")
    async with discovery(etcd.url) as worker, Proxy(etcd).serving() as proxy, discovery(proxy.url) as client:
        watch = client.watch(ENDPOINTS)
        async with watch:
            await worker.register(endpoint_record(1))
            await until(watch, lambda: len(watch.current) == 1)
            followers: Any = client._opened()._followers  # pyright: ignore[reportPrivateUsage]
            await eventually(lambda: followers[EndpointRecord.bucket]._live, "the watch is open")
            proxy.freeze()
            await worker.register(endpoint_record(2))
            await until(watch, lambda: len(watch.current) == 2, within=4 * TTL)
    assert any("has missed changes" in record.message for record in caplog.records)


async def test_other_keys_that_change_do_not_disturb_a_watch(etcd: EtcdServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "stator.discovery")
    async with discovery(etcd.url) as worker, discovery(etcd.url) as client, client.watch(ENDPOINTS) as watch:
        await worker.register(endpoint_record(1))
        await until(watch, lambda: len(watch.current) == 1)
        end = time.monotonic() + 2 * TTL  # in which one that heard nothing would be found out
        while time.monotonic() < end:
            await asyncio.to_thread(etcd.put, "v1/other/x", b"")
            await asyncio.sleep(0.1)
        await worker.register(endpoint_record(2))
        await until(watch, lambda: len(watch.current) == 2, within=1)
    assert not any("has missed changes" in record.message for record in caplog.records)
