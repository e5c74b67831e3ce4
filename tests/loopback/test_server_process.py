"""What the servers of the test kit share: how they end, and that one which stands still does nothing."""

import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from stator.testing.server_process import ServerProcess

pytestmark = pytest.mark.timeout(30)

COUNTS = """
import itertools, time
for n in itertools.count():
    print(n, flush=True)
    time.sleep(0.001)
"""


class Script(ServerProcess):
    """A server that is a script, ready when it has written a line."""

    def __init__(self, directory: Path, text: str) -> None:
        super().__init__(directory, log="script.log")
        self._text = text

    def start(self) -> None:
        """Start, and wait for the first line."""
        self._launch([sys.executable, "-c", self._text])
        self._wait_until(lambda: b"\n" in self.written())


@pytest.fixture
def counting(tmp_path: Path) -> Generator[Script, None, None]:
    script = Script(tmp_path, COUNTS)
    try:
        script.start()
        yield script
    finally:
        script.kill()


def test_a_server_runs_until_it_is_stopped(counting: Script) -> None:
    first = counting.pid
    assert counting.running
    counting.stop()
    counting.stop()
    assert not counting.running
    assert not Path(f"/proc/{first}").exists()
    with pytest.raises(RuntimeError, match="not running"):
        _ = counting.pid


def test_the_lines_of_an_earlier_life_do_not_make_it_ready(tmp_path: Path, counting: Script) -> None:
    counting.kill()
    silent = Script(tmp_path, "raise SystemExit")
    with pytest.raises(RuntimeError, match="did not start: 0\n"):  # the log is the same
        silent.start()


def test_a_server_that_ends_at_once_shows_its_log(tmp_path: Path) -> None:
    script = Script(tmp_path, "import sys; sys.stderr.write('no such flag'); sys.exit(2)")
    with pytest.raises(RuntimeError, match="Script did not start: no such flag"):
        script.start()
    assert not script.running


def test_a_server_that_will_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stator.testing.server_process._STOP", 0.5)
    script = Script(tmp_path, f"import signal; signal.signal(15, signal.SIG_IGN)\n{COUNTS}")
    script.start()
    pid = script.pid
    script.stop()
    assert not Path(f"/proc/{pid}").exists()


def test_one_that_stands_still_writes_nothing(counting: Script) -> None:
    with counting.standing_still():
        written = counting.log()
        time.sleep(0.05)  # in which it would have written fifty lines
        assert counting.log() == written
    deadline = time.monotonic() + 10
    while counting.log() == written:
        assert time.monotonic() < deadline, "it does not go on"
        time.sleep(0.001)
