"""File discovery among real processes that die, freeze and block, and on a disk that does not answer."""

import asyncio
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest

from stator.discovery import FileDiscovery, FileDiscoveryConfig, open_file
from stator.discovery.file_names import file_name
from stator.discovery.file_store import FileStore
from stator.errors import ConfigError, Unavailable, UsageError
from stator.protocol.records import EndpointRecord, Query, Record, encode_record
from stator.tasks import SystemClock
from stator.testing.discovery_suite import endpoint_record, silence, until

ENDPOINTS = Query(EndpointRecord.bucket)
TTL = 1.2
OWNER = Path(__file__).with_name("discovery_owner.py")


def discovery(root: Path, *, answer_timeout: float = 5.0, ttl: float = TTL) -> FileDiscovery:
    config = FileDiscoveryConfig(root=str(root), ttl=ttl, answer_timeout=answer_timeout)
    return open_file(config, clock=SystemClock(), random=Random())


@asynccontextmanager
async def owner(root: Path, instance: int, mode: str = "serve") -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that owns a record; killed in the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *(str(OWNER), str(root), str(TTL), str(instance), mode),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def path_of(root: Path, instance: int) -> Path:
    return root / EndpointRecord.bucket / file_name(endpoint_record(instance).key)


async def test_a_killed_owner_is_gone_within_its_ttl(tmp_path: Path) -> None:
    async with discovery(tmp_path) as client, client.watch(ENDPOINTS) as watch, owner(tmp_path, 1) as process:
        await until(watch, lambda: len(watch.current) == 1)
        process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        await until(watch, lambda: not watch.current)
        waited = time.monotonic() - killed
        assert TTL * 2 / 3 - 0.2 < waited < TTL + 1.0
        assert not await asyncio.to_thread(path_of(tmp_path, 1).exists)


async def test_who_comes_after_the_death_never_sees_the_dead(tmp_path: Path) -> None:
    async with owner(tmp_path, 1) as process:
        process.send_signal(signal.SIGKILL)
        await process.wait()
        await asyncio.sleep(TTL)
    assert await asyncio.to_thread(path_of(tmp_path, 1).exists)
    async with discovery(tmp_path) as client, client.watch(ENDPOINTS) as watch:
        assert await anext(watch) == []
        assert await client.list(ENDPOINTS) == []
        await silence(watch)


async def test_a_frozen_owner_comes_back(tmp_path: Path) -> None:
    async with discovery(tmp_path) as client, client.watch(ENDPOINTS) as watch, owner(tmp_path, 1) as process:
        await until(watch, lambda: len(watch.current) == 1)
        process.send_signal(signal.SIGSTOP)
        await until(watch, lambda: not watch.current)
        assert not await asyncio.to_thread(path_of(tmp_path, 1).exists)
        process.send_signal(signal.SIGCONT)
        thawed = time.monotonic()
        await until(watch, lambda: len(watch.current) == 1)
        assert time.monotonic() - thawed < 1.0
        await silence(watch, TTL)


async def test_a_frozen_client_buries_nobody(tmp_path: Path) -> None:
    """The frozen process wakes up to find everybody's signs of life too old, as after the sleep of a whole machine."""
    async with owner(tmp_path, 1) as first, owner(tmp_path, 2) as second, discovery(tmp_path) as client:
        async with client.watch(ENDPOINTS) as watch:
            await until(watch, lambda: len(watch.current) == 2)
        for process in (first, second):
            process.send_signal(signal.SIGSTOP)
        stopper = await asyncio.create_subprocess_exec(
            "sh", "-c", f"kill -STOP {os.getpid()}; sleep {TTL * 2}; kill -CONT {os.getpid()} {first.pid} {second.pid}"
        )
        await stopper.wait()
        async with client.watch(ENDPOINTS) as watch:
            assert len(await anext(watch)) == 2
            await silence(watch, 2 * TTL)


async def test_a_blocked_loop_keeps_its_records(tmp_path: Path) -> None:
    async with discovery(tmp_path) as client, client.watch(ENDPOINTS) as watch, owner(tmp_path, 1, "block"):
        await until(watch, lambda: len(watch.current) == 1)
        await silence(watch, 3 * TTL)


async def test_what_happens_while_the_loop_is_blocked_is_known_right_after(tmp_path: Path) -> None:
    def plant(instance: int) -> None:
        temporary = tmp_path / "new"
        temporary.write_bytes(encode_record(endpoint_record(instance)))
        temporary.rename(path_of(tmp_path, instance))

    async with discovery(tmp_path, ttl=60) as client, client.watch(ENDPOINTS) as watch:
        await anext(watch)
        for instance in range(5):
            plant(instance)
            time.sleep(0.05)
        await until(watch, lambda: len(watch.current) == 5, within=2)


async def test_a_loop_left_without_closing_keeps_no_records(tmp_path: Path) -> None:
    async with discovery(tmp_path) as client, client.watch(ENDPOINTS) as watch, owner(tmp_path, 1, "abandon") as process:
        await until(watch, lambda: len(watch.current) == 1)
        assert process.stdin is not None
        process.stdin.write(b"\n")
        await until(watch, lambda: not watch.current)
        assert process.returncode is None


async def test_the_directory_is_deleted_among_living_processes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    async with discovery(root) as client, client.watch(ENDPOINTS) as watch, owner(root, 1), owner(root, 2):
        await client.register(endpoint_record(3))
        await until(watch, lambda: len(watch.current) == 3)
        for _ in range(3):
            await asyncio.to_thread(shutil.rmtree, root, ignore_errors=True)
            await silence(watch, TTL * 1.5)
            assert len(await client.list(ENDPOINTS)) == 3
            for instance in (1, 2, 3):
                assert await asyncio.to_thread(path_of(root, instance).exists)
        async with discovery(root) as fresh:
            assert len(await fresh.list(ENDPOINTS)) == 3


async def test_a_disk_that_does_not_answer_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread hangs in a system call, as on a dead network file system."""
    answer = threading.Event()
    async with discovery(tmp_path, answer_timeout=0.2) as client, discovery(tmp_path) as other:
        await other.register(endpoint_record(1))
        assert await client.list(ENDPOINTS) == [endpoint_record(1)]
        real = FileStore.sync

        def hang(store: FileStore, bucket: str) -> None:
            answer.wait(30)
            real(store, bucket)

        monkeypatch.setattr(FileStore, "sync", hang)
        assert await client.list(ENDPOINTS) == [endpoint_record(1)]
        monkeypatch.undo()
        assert not client.status.connected
        assert "did not answer" in client.status.reason
        with pytest.raises(Unavailable, match="cannot register"):
            await client.register(endpoint_record(2))
        with pytest.raises(Unavailable):
            await client.last_seen(ENDPOINTS)
        async with client.watch(ENDPOINTS) as watch:
            assert len(await anext(watch)) == 1
            answer.set()
            await other.register(endpoint_record(3))
            await until(watch, lambda: set(watch.current) == {endpoint_record(1).key, endpoint_record(3).key})
        assert client.status.connected
        assert dict(client.owned()) == {}
        assert len(await client.list(ENDPOINTS)) == 2, "a registration that failed is not made up for later"


async def test_a_slow_disk_that_answers_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with discovery(tmp_path, answer_timeout=0.5) as client:
        real = FileStore.publish

        def slow(store: FileStore, record: Record) -> bool:
            time.sleep(0.005)
            return real(store, record)

        monkeypatch.setattr(FileStore, "publish", slow)
        assert all(await asyncio.gather(*(client.register(endpoint_record(instance)) for instance in range(300))))
        assert client.status.connected


async def test_closing_waits_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    async with discovery(tmp_path, answer_timeout=0.2) as client:
        await client.register(endpoint_record(1))
        monkeypatch.setattr(FileStore, "sync", lambda *_: answer.wait(30))
        await client.list(ENDPOINTS)
        began = time.monotonic()
        await client.aclose()
        assert time.monotonic() - began < 2
        answer.set()
        await client.aclose()
    assert not await asyncio.to_thread(path_of(tmp_path, 1).exists)


async def test_a_failed_opening_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    threads = threading.active_count()
    descriptors = len(await asyncio.to_thread(os.listdir, "/proc/self/fd"))
    threads = threading.active_count()
    for _ in range(5):
        with pytest.raises(ConfigError, match="STATOR_FILE_ROOT"):
            async with discovery(tmp_path / "file"):
                pass
    async with discovery(tmp_path / "root") as opened:
        with pytest.raises(UsageError, match="opened once"):
            await opened.__aenter__()
    deadline = time.monotonic() + 5
    while threading.active_count() > threads or len(await asyncio.to_thread(os.listdir, "/proc/self/fd")) > descriptors:
        assert time.monotonic() < deadline, "threads or descriptors are left"
        await asyncio.sleep(0.01)


async def test_an_unexpected_failure_of_the_thread_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with discovery(tmp_path) as client, discovery(tmp_path) as other, client.watch(ENDPOINTS) as watch:
        await anext(watch)
        real = FileStore.step
        failed: set[int] = set()

        def fail_once(store: FileStore) -> None:
            if id(store) not in failed:
                failed.add(id(store))
                raise ZeroDivisionError
            real(store)

        monkeypatch.setattr(FileStore, "step", fail_once)
        await other.register(endpoint_record(1))
        await until(watch, lambda: len(watch.current) == 1)
        assert "failed unexpectedly" in caplog.text
