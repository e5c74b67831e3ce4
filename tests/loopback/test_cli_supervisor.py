"""Children of a supervisor: news, restarts, giving up, and the end of whatever they started."""

import asyncio
import sys
import time
from pathlib import Path
from random import Random

import pytest

from stator.cli.supervision import News, NewsKind, read_news
from stator.cli.supervisor import Child, Supervisor
from stator.tasks import Backoff, Scope
from stator.testing.serve_process import wait_gone

pytestmark = pytest.mark.timeout(30)

TELL = "import sys; from stator.cli.supervision import NewsKind, tell; "


class Stage:
    """A supervisor with one child that runs some Python."""

    def __init__(self, code: str, *arguments: str) -> None:
        self.told: list[News] = []
        self.child = Child("child", (sys.executable, "-c", code, *arguments), {"PYTHONPATH": ":".join(sys.path)}, self._tell)
        self.supervisor = Supervisor(Random(1), backoff=Backoff(first=0.05, most=0.2))
        self._news = asyncio.Event()

    def _tell(self, name: str, news: News) -> None:
        assert name == "child"
        self.told.append(news)
        self._news.set()

    async def hear(self, text: str, count: int = 1) -> None:
        """Wait until `count` lines with `text` were told."""
        async with asyncio.timeout(15):
            while sum(text in news.text for news in self.told) < count:
                self._news.clear()
                await self._news.wait()

    async def gave_up(self) -> str:
        async with asyncio.timeout(15):
            return await self.supervisor.gave_up()


def read(data: bytes, *, split: int) -> list[News]:
    async def all_news() -> list[News]:
        stream = asyncio.StreamReader()
        for begin in range(0, len(data), split):
            stream.feed_data(data[begin : begin + split])
        stream.feed_eof()
        return [news async for news in read_news(stream)]

    return asyncio.run(all_news())


@pytest.mark.parametrize("split", [1, 7, 1000])
def test_news_are_told_apart_from_what_libraries_print(split: int) -> None:
    data = (
        "::stator::ready::modèle 1\nLoading… 10%\n\n::stator::failed::no such file::really\n::stator::unheard::x\nlast".encode()
    )
    assert read(data, split=split) == [
        News(kind=NewsKind.READY, text="modèle 1"),
        News(kind=NewsKind.PROGRESS, text="Loading… 10%"),
        News(kind=NewsKind.FAILED, text="no such file::really"),
        News(kind=NewsKind.PROGRESS, text="last"),
    ]


def test_a_line_without_end_costs_no_memory() -> None:
    (news,) = read(b"x" * 1_000_000 + b"\n", split=65536)
    assert len(news.text) == 2000


async def test_a_child_that_says_why_it_cannot_start_is_not_tried_again() -> None:
    stage = Stage(TELL + "tell(NewsKind.FAILED, 'no\\nsuch model'); sys.exit(1)")
    async with Scope("test") as scope:
        stage.supervisor.start([stage.child], scope)
        assert await stage.gave_up() == "child cannot start: no such model"
    assert stage.told == []


async def test_a_child_that_dies_without_a_word_is_tried_three_times() -> None:
    stage = Stage("import os; os.kill(os.getpid(), 11)")
    async with Scope("test") as scope:
        stage.supervisor.start([stage.child], scope)
        reason = await stage.gave_up()
    assert reason == "child ended 3 times before it was ready, the last time with signal 11, Segmentation fault"
    assert [news.text.partition(";")[0] for news in stage.told] == ["died (signal 11, Segmentation fault)"] * 2


async def test_a_child_that_was_ready_is_restarted_for_ever() -> None:
    stage = Stage(TELL + "tell(NewsKind.READY, 'model'); tell(NewsKind.FAILED, 'out of memory'); sys.exit(3)")
    async with Scope("test") as scope:
        stage.supervisor.start([stage.child], scope)
        await stage.hear("died (out of memory); starting again in", count=4)
        await stage.supervisor.end([stage.child], timeout=5)
    assert sum(news.kind is NewsKind.READY for news in stage.told) >= 4


async def test_what_a_dead_child_started_is_ended_before_it_is_started_again(tmp_path: Path) -> None:
    code = (
        "import subprocess; grandchild = subprocess.Popen(['sleep', '600']); "
        "open(sys.argv[1], 'a').write(f'{grandchild.pid}\\n'); tell(NewsKind.READY, 'model'); sys.exit(1)"
    )
    stage = Stage(TELL + code, str(tmp_path / "pids"))
    async with Scope("test") as scope:
        stage.supervisor.start([stage.child], scope)
        await stage.hear("starting again", count=2)  # although the grandchild holds our pipe open
        await stage.supervisor.end([stage.child], timeout=5)
    pids = [int(line) for line in (await asyncio.to_thread((tmp_path / "pids").read_text)).split()]
    assert len(pids) >= 2
    assert await asyncio.to_thread(wait_gone, pids) == []


async def test_a_child_that_ignores_sigterm_is_killed() -> None:
    stage = Stage(TELL + "import signal, time; signal.signal(15, signal.SIG_IGN); tell(NewsKind.READY, 'x'); time.sleep(600)")
    async with Scope("test") as scope:
        stage.supervisor.start([stage.child], scope)
        await stage.hear("x")
        pid = stage.child.pid
        assert pid is not None
        began = time.monotonic()
        await stage.supervisor.end([stage.child], timeout=0.3)
        assert 0.2 < time.monotonic() - began < 5
    assert await asyncio.to_thread(wait_gone, [pid]) == []
    assert stage.child.pid is None


async def test_leaving_the_scope_kills_what_runs() -> None:
    stage = Stage(TELL + "import time; tell(NewsKind.READY, 'x'); time.sleep(600)")
    async with Scope("test") as scope:
        stage.supervisor.start([stage.child], scope)
        await stage.hear("x")
        pid = stage.child.pid
        assert pid is not None
    assert await asyncio.to_thread(wait_gone, [pid]) == []
