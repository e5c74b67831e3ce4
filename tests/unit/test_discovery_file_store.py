"""What a file discovery does when, on a clock that stands still until it is told to go on."""

import errno
import itertools
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from random import Random
from typing import Any

import pytest

from stator.discovery import FileDiscoveryConfig, file_store
from stator.discovery.file_names import file_name
from stator.discovery.file_store import FileStore
from stator.errors import ConfigError, Unavailable, UsageError
from stator.protocol.records import EndpointRecord, Query, Record, RecordKey, encode_record
from stator.testing.discovery_suite import channel_record, endpoint_record, model_record

BUCKET = EndpointRecord.bucket
TTL = 9.0
PERIOD = TTL / 3


class TwoHands:
    """A clock whose two readings can be set apart."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.epoch = 1_700_000_000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.epoch

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        self.epoch += seconds


class Machine:
    """Several processes on one machine, stepped when they want to be."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.root = root
        self.bucket = root / BUCKET
        self.clock = TwoHands()
        self.running: list[FileStore] = []
        self.seen: dict[int, dict[RecordKey, Record]] = {}
        self._stack = stack

    def process(self, **config: Any) -> FileStore:
        """One more process; it watches endpoints."""
        settings = FileDiscoveryConfig(root=str(self.root), ttl=TTL, **config)
        store = FileStore(settings, clock=self.clock, random=Random(len(self.seen)))
        self._stack.enter_context(closing(store))
        store.open()
        store.sync(BUCKET)
        self.running.append(store)
        self.seen[id(store)] = {}
        return store

    def run(self, seconds: float = 0.0) -> int:
        """Let time pass; every running process steps whenever it is due or told. The answer is how many steps that took."""
        end = self.clock.now + seconds
        steps = 0
        while True:
            for store in self.running:
                store.step()
                steps += 1
            due = min((store.due() for store in self.running), default=end)
            if due > end:
                break
            assert steps < 10_000, "a process wants to be stepped all the time"
            self.clock.pass_by(max(due - self.clock.now, 0.0) + 1e-6)
        self.clock.pass_by(max(end - self.clock.now, 0.0))
        return steps

    def known(self, store: FileStore) -> set[int]:
        """The instances that readers of `store` have been told of."""
        seen = self.seen[id(store)]
        for key, record in store.take_changes().items():
            if record is None:
                seen.pop(key, None)
            else:
                seen[key] = record
        return {key.id for key in seen}

    def path(self, instance: int) -> Path:
        return self.bucket / file_name(endpoint_record(instance).key)

    def plant(self, instance: int, *, age: float = 0.0, data: bytes | None = None) -> Path:
        """A file of a foreign process, as it links it into place."""
        path = self.path(instance)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / ".tmp_00"
        temporary.write_bytes(encode_record(endpoint_record(instance)) if data is None else data)
        self.age(temporary, age)
        os.rename(temporary, path)
        return path

    def age(self, path: Path, seconds: float) -> None:
        """Let the last sign of life be `seconds` ago."""
        at = self.clock.epoch - seconds
        os.utime(path, (at, at))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with ExitStack() as stack:
        yield Machine(tmp_path / "root", stack)


def test_a_record_becomes_one_private_file_in_the_layout_of_the_reference(machine: Machine) -> None:
    old = os.umask(0o022)
    try:
        store = machine.process()
        records = [endpoint_record(2**64 - 1), model_record(5, "m", lora="a_b"), channel_record(3, "kv_metrics")]
        assert all(store.publish(record) for record in records)
    finally:
        os.umask(old)
    files = {path.relative_to(machine.root).as_posix(): path for path in machine.root.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in files.items()} == {
        "v1/instances/demo%2Fbackend%2Fgenerate%2Fffffffffffffffff": encode_record(records[0]),
        "v1/mdc/demo%2Fbackend%2Fgenerate%2F5%2Fa%5Fb": encode_record(records[1]),
        "v1/event_channels/demo%2F%2Fkv%5Fmetrics%2F3": encode_record(records[2]),
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o600}
    directories = [machine.root, *(path for path in machine.root.rglob("*") if path.is_dir())]
    assert len(directories) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in directories} == {0o700}


def test_owners_give_a_sign_of_life_every_third_of_the_ttl(machine: Machine) -> None:
    store = machine.process()
    machine.clock.pass_by(100)
    store.publish(endpoint_record(1))
    started = machine.clock.epoch
    touched: list[float] = []
    for _ in range(200):
        machine.run(0.1)
        at = machine.path(1).stat().st_mtime - started
        if not touched or at > touched[-1] + 0.01:
            touched.append(at)
    gaps = [later - earlier for earlier, later in itertools.pairwise(touched)]
    assert len(gaps) >= 5
    assert max(gaps) <= PERIOD + 0.2
    assert min(gaps[1:]) >= PERIOD - 0.2
    assert machine.known(store) == {1}


def test_steps_are_rare(machine: Machine) -> None:
    stores = [machine.process() for _ in range(2)]
    for store in stores:
        for instance in range(5):
            store.publish(endpoint_record(id(store) % 1000 * 10 + instance))
    machine.run(TTL)
    assert machine.run(10 * TTL) <= 2 * (10 * TTL / PERIOD) * 2.5


def test_dead_owners_are_hidden_from_the_start_and_cleaned_up_later(machine: Machine) -> None:
    dead, alive = machine.plant(1, age=TTL + 0.1), machine.plant(2, age=TTL - 1)
    leftover, unfinished = machine.bucket / ".tmp_0123456789abcdef", machine.bucket / ".tmp_fedcba9876543210"
    for path, age in ((leftover, TTL + 0.1), (unfinished, 0.0)):
        path.touch()
        machine.age(path, age)
    store = machine.process()
    assert machine.known(store) == {2}
    assert dead.exists(), "who has just started has not seen anybody being silent"
    for _ in range(3):
        machine.run(PERIOD)
        machine.age(alive, 0)
        machine.age(unfinished, 0)
    assert machine.known(store) == {2}
    assert not dead.exists()
    assert not leftover.exists()
    assert alive.exists()
    assert unfinished.exists()


def test_an_owner_is_dead_when_its_ttl_is_over_and_not_before(machine: Machine) -> None:
    store = machine.process()
    machine.run(2 * TTL)
    path = machine.plant(1, age=2.0)
    machine.run(TTL - 2.0 - 0.01)
    assert machine.known(store) == {1}
    machine.run(0.02)
    assert machine.known(store) == set()
    assert not path.exists()


def test_a_sign_of_life_is_noticed_without_an_event(machine: Machine) -> None:
    store = machine.process()
    path = machine.plant(1)
    for _ in range(20):
        machine.run(PERIOD)
        machine.age(path, 0)
        assert machine.known(store) == {1}


@pytest.mark.parametrize("seconds", [TTL + 1, 10 * TTL])
def test_who_was_stopped_gives_the_others_time(machine: Machine, seconds: float) -> None:
    """All processes of the machine slept; the first one to wake up must not bury the others."""
    first, second = machine.process(), machine.process()
    first.publish(endpoint_record(1))
    second.publish(endpoint_record(2))
    machine.run(TTL)
    machine.clock.pass_by(seconds)
    machine.running = [first]
    machine.run(0.1)
    assert machine.known(first) == {1, 2}
    assert machine.path(2).exists()
    machine.running = [first, second]
    machine.run(3 * TTL)
    assert machine.known(first) == machine.known(second) == {1, 2}
    machine.running = [first]
    machine.run(TTL + 0.1)
    assert machine.known(first) == {1}, "the patience ends"


def test_a_jump_of_the_wall_clock_buries_nobody(machine: Machine) -> None:
    first, second = machine.process(), machine.process()
    first.publish(endpoint_record(1))
    second.publish(endpoint_record(2))
    for jump in (3600.0, -7200.0, 30.0):
        machine.run(TTL)
        machine.clock.epoch += jump
        for store in machine.running:
            store.step()
            store.last_seen(Query(BUCKET))  # looks at every file
            assert machine.known(store) == {1, 2}, jump
        machine.run(2 * TTL)
        assert machine.known(first) == machine.known(second) == {1, 2}, jump


def test_a_record_that_another_process_removed_is_written_again(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    owner, witness = machine.process(), machine.process()
    owner.publish(endpoint_record(1))
    machine.run(PERIOD)
    before = machine.path(1).stat().st_ino
    keep = machine.bucket.parent / "keep"
    os.link(machine.path(1), keep)  # so that the inode number is not used again
    machine.path(1).unlink()
    machine.run(0.1)
    assert machine.path(1).stat().st_ino != before
    assert machine.known(owner) == machine.known(witness) == {1}
    assert "removed by another process" in caplog.text


def test_two_processes_that_disagree_do_not_fight_without_pause(machine: Machine) -> None:
    owner = machine.process()
    owner.publish(endpoint_record(1))
    machine.run(1.0)
    written = 0
    for _ in range(int(2 * TTL / 0.05)):
        if machine.path(1).exists():
            machine.path(1).unlink()
            written += 1
        machine.run(0.05)
    assert 2 <= written <= 2 * (2 * TTL / PERIOD)


def test_a_stopped_owner_is_visible_again_when_it_goes_on(machine: Machine) -> None:
    owner, witness = machine.process(), machine.process()
    owner.publish(endpoint_record(1))
    machine.run(PERIOD)
    machine.running = [witness]
    machine.run(TTL + 1)
    assert machine.known(witness) == set()
    machine.running = [owner, witness]
    machine.run(0.1)
    assert machine.known(witness) == {1}


def test_a_removed_directory_is_made_again_and_costs_nobody(machine: Machine) -> None:
    owner, witness = machine.process(), machine.process()
    owner.publish(endpoint_record(1))
    machine.plant(2)  # somebody who, like the reference, never writes its file again
    machine.run(0.1)
    assert machine.known(witness) == {1, 2}
    shutil.rmtree(machine.root)
    machine.run(0.1)
    assert witness.take_changes() == {}, "the removal of the directory is no goodbye"
    assert machine.path(1).exists()
    assert not machine.path(2).exists()
    machine.run(TTL)
    assert machine.known(witness) == {1}
    machine.plant(3)
    machine.run(0.1)
    assert machine.known(witness) == {1, 3}, "the new directory is watched"


def test_a_directory_moved_away_is_replaced(machine: Machine) -> None:
    owner, witness = machine.process(), machine.process()
    owner.publish(endpoint_record(1))
    machine.run(0.1)
    os.rename(machine.root, machine.root.with_name("elsewhere"))
    machine.run(TTL + 0.1)
    assert machine.path(1).exists()
    assert machine.known(witness) == {1}
    machine.plant(3)
    machine.run(0.1)
    assert machine.known(witness) == {1, 3}


def test_a_root_that_cannot_be_used_makes_it_stale_and_costs_nobody(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    owner, witness = machine.process(), machine.process()
    owner.publish(endpoint_record(1))
    peer = machine.process()
    peer.publish(endpoint_record(2))
    machine.run(0.1)
    shutil.rmtree(machine.root)
    machine.root.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        steps = machine.run(5 * TTL)
    assert witness.stale_since is not None
    assert "Not a directory" in witness.reason
    assert machine.known(witness) == machine.known(owner) == {1, 2}
    assert sum("known records are kept" in record.message for record in caplog.records) == 3, "said once by each"
    assert steps < 3 * (5 * TTL / 0.5)
    with pytest.raises(Unavailable, match="cannot register"):
        owner.publish(endpoint_record(9))
    machine.root.unlink()
    machine.run(PERIOD + 0.1)
    assert witness.stale_since is None
    assert witness.reason == ""
    machine.run(3 * TTL)
    assert machine.known(witness) == machine.known(owner) == {1, 2}
    assert machine.path(1).exists()
    assert machine.path(2).exists()
    machine.running = [owner, witness]
    machine.run(TTL + 0.1)
    assert machine.known(witness) == {1}


def test_a_full_disk_registers_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = machine.process()
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        with pytest.raises(Unavailable, match="No space left on device"):
            store.publish(endpoint_record(1))
    assert machine.known(store) == set()
    assert list(machine.bucket.iterdir()) == []
    assert store.publish(endpoint_record(1))


def test_one_record_in_trouble_does_not_cost_the_others_their_signs_of_life(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = machine.process()
    for instance in (1, 2, 3):
        owner.publish(endpoint_record(instance))
    machine.run(0.1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))  # pyright: ignore
        machine.path(1).unlink()
        machine.run(2 * TTL)
        assert owner.stale_since is not None
        assert all(machine.clock.epoch - machine.path(instance).stat().st_mtime < TTL / 2 for instance in (2, 3))
    machine.run(PERIOD + 0.1)
    assert owner.stale_since is None
    assert machine.path(1).exists()


def test_a_leftover_of_a_dead_owner_does_not_block_its_key(machine: Machine) -> None:
    machine.plant(1, age=TTL + 1, data=b"old")
    store = machine.process()
    assert store.publish(endpoint_record(1))
    assert machine.path(1).read_bytes() == encode_record(endpoint_record(1))
    machine.plant(2)
    with pytest.raises(UsageError, match="another owner"):
        store.publish(endpoint_record(2))


@pytest.mark.parametrize("polling", [False, True], ids=["inotify", "polling"])
def test_files_that_are_no_records_are_ignored(machine: Machine, polling: bool, caplog: pytest.LogCaptureFixture) -> None:
    store = machine.process(watching="polling" if polling else "auto")
    os.mkfifo(machine.path(1))
    machine.path(2).mkdir()
    target = machine.root / "target"
    target.write_bytes(encode_record(endpoint_record(3)))
    machine.path(3).symlink_to(target)
    (machine.bucket / "README").write_text("hello")
    machine.plant(4, data=b" " * (4 * 2**20 + 1))
    machine.plant(5)
    machine.run(2 * TTL / 3)
    assert machine.known(store) == {5}
    machine.run(TTL / 3 - 0.1)
    warnings = [record.message for record in caplog.records if "ignored file" in record.message]
    assert len(warnings) == 2, "README and the long one, once each"


def test_a_file_written_slowly_is_read_when_it_is_complete(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    store = machine.process()
    data = encode_record(endpoint_record(1))
    with machine.path(1).open("wb", buffering=0) as file:
        file.write(data[:20])
        machine.age(machine.path(1), 0)
        machine.run(0.05)
        assert machine.known(store) == set()
        file.write(data[20:])
    machine.age(machine.path(1), 0)
    machine.run(0.3)
    assert machine.known(store) == {1}
    assert "ignored" not in caplog.text


def test_content_that_breaks_leaves_what_was_known(machine: Machine) -> None:
    store = machine.process()
    machine.plant(1)
    machine.run(0.1)
    machine.plant(1, data=b"{")
    machine.run(1.0)
    assert machine.known(store) == {1}
    machine.path(1).unlink()
    machine.run(0.1)
    assert machine.known(store) == set()


def test_a_file_renamed_away_is_gone(machine: Machine) -> None:
    store = machine.process()
    machine.plant(1)
    machine.run(0.1)
    assert machine.known(store) == {1}
    os.rename(machine.path(1), machine.root / "away")
    machine.run(0.1)
    assert machine.known(store) == set()
    os.rename(machine.root / "away", machine.path(1))
    machine.run(0.1)
    assert machine.known(store) == {1}


def test_an_overflow_of_the_kernels_queue_loses_nothing(machine: Machine) -> None:
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    store = machine.process()
    machine.plant(1)
    machine.run(0.1)
    for _ in range(limit // 2 + 10):
        path = machine.bucket / ".tmp_x"
        os.close(os.open(path, os.O_CREAT))
        os.unlink(path)
    machine.path(1).unlink()
    machine.plant(2)
    machine.run(0.01)
    assert machine.known(store) == {2}


def refuse_inotify(number: int) -> Callable[[], object]:
    def refuse() -> object:
        raise OSError(number, os.strerror(number))

    return refuse


class FullInotify(file_store.Inotify):
    """As many watches as the user may have are in use."""

    def add(self, directory: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "inotify",
    [refuse_inotify(errno.EMFILE), refuse_inotify(errno.ENOSYS), FullInotify],
    ids=["instances", "missing", "watches"],
)
def test_without_inotify_the_directory_is_polled(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, inotify: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_store, "Inotify", inotify)
    store = machine.process()
    assert "polled every 1 s" in caplog.text
    for instance in range(1, 4):
        machine.plant(instance)
        machine.run(1.01)
        assert machine.known(store) == set(range(1, instance + 1))
    machine.path(1).unlink()
    machine.run(1.01)
    assert machine.known(store) == {2, 3}
    machine.plant(1)
    store.sync(BUCKET)
    assert machine.known(store) == {1, 2, 3}, "a list does not wait for the next look"
    assert sum("polled" in record.message for record in caplog.records) == 1


def test_last_seen_tells_the_age_of_the_last_sign_of_life(machine: Machine) -> None:
    store = machine.process()
    store.publish(endpoint_record(1))
    machine.plant(2, age=1.0)
    machine.plant(3, age=0.0)
    machine.run(0.5)
    machine.age(machine.path(3), 0.25)
    ages = {key.id: machine.clock.epoch - at for key, at in store.last_seen(Query(BUCKET)).items()}
    assert ages == pytest.approx({1: 0.5, 2: 1.5, 3: 0.25}, abs=1e-3)


def test_closing_removes_the_files_but_not_the_directories(machine: Machine) -> None:
    store = machine.process()
    store.publish(endpoint_record(1))
    machine.plant(2)
    store.close()
    assert [path.name for path in machine.bucket.iterdir()] == [machine.path(2).name]


def test_a_root_that_cannot_be_had_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in ("file", "file/below"):
        store = FileStore(FileDiscoveryConfig(root=str(tmp_path / root)), clock=TwoHands(), random=Random())
        with pytest.raises(ConfigError, match="set STATOR_FILE_ROOT"):
            store.open()


def test_the_default_root_belongs_to_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with closing(FileStore(FileDiscoveryConfig(), clock=TwoHands(), random=Random())) as store:
        assert store.open() == str(tmp_path / "stator" / "discovery")
    assert stat.S_IMODE((tmp_path / "stator" / "discovery").stat().st_mode) == 0o700


def test_a_root_open_to_everybody_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(0o777)
    with closing(FileStore(FileDiscoveryConfig(root=str(tmp_path)), clock=TwoHands(), random=Random())) as store:
        store.open()
    assert "everybody on this machine may write" in caplog.text


def test_settings_have_limits() -> None:
    for bad in ({"ttl": 0.1}, {"poll_interval": 0.0}, {"answer_timeout": 0.0}, {"watching": "maybe"}):
        with pytest.raises(ConfigError):
            FileDiscoveryConfig(**bad)  # pyright: ignore
