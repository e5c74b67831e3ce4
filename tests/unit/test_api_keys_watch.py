"""When a changed file is read: once it stands still."""

import asyncio
from pathlib import Path

import pytest

from stator.frontend import file_watch
from stator.frontend.file_watch import FileWatch

pytestmark = pytest.mark.timeout(10)


class Looks:
    """What the watch sees, look by look; the last one stays."""

    def __init__(self, *states: int | None) -> None:
        self._states = list(states)
        self.taken = 0

    def __call__(self, path: Path) -> tuple[int, ...] | None:
        state = self._states[min(self.taken, len(self._states) - 1)]
        self.taken += 1
        return None if state is None else (state,)


@pytest.mark.parametrize(
    ("states", "looks"),
    [
        ([1, 2, 2], 3),
        ([1, 1, 1, 2, 2], 5),
        ([1, 2, 3, 4, 5, 5], 6),  # is being written
        ([1, None, 2, 2], 4),  # is replaced in two steps
        ([1, None, None], 3),  # is gone
        ([1, 2, 1, 1, 2, 2], 6),  # changed, and back
    ],
)
async def test_a_change_is_told_when_two_looks_agree(
    monkeypatch: pytest.MonkeyPatch, states: list[int | None], looks: int
) -> None:
    monkeypatch.setattr(file_watch, "_identity", seen := Looks(*states))
    watch = FileWatch(Path("file"), interval=0.0)
    await watch.mark()
    await asyncio.wait_for(watch.changed(), 5)
    assert seen.taken == looks


async def test_a_file_that_stays_is_not_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_watch, "_identity", seen := Looks(1, 2, 2))
    watch = FileWatch(Path("file"), interval=0.0)
    await watch.mark()
    await watch.changed()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(watch.changed(), 0.1)
    assert seen.taken > 4


def test_what_makes_a_file_another_one(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    found = {file_watch._identity(path)}
    path.write_text("one")
    found.add(file_watch._identity(path))
    path.write_text("longer")
    found.add(file_watch._identity(path))
    path.chmod(0o604)
    found.add(file_watch._identity(path))
    other.write_text("longer")
    other.replace(path)
    found.add(file_watch._identity(path))
    assert len(found) == 5
    assert None in found


def test_a_change_is_told_within_a_second() -> None:
    assert 2 * file_watch._INTERVAL < 1.0
