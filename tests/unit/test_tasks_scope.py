"""Scopes own tasks: crashes are told and stay alone, closing is complete and bounded."""

import asyncio
import logging

import pytest

from stator.tasks import Scope

pytestmark = pytest.mark.timeout(20)


async def forever(cancelled: list[str] | None = None, name: str = "") -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        if cancelled is not None:
            cancelled.append(name)
        raise


async def crash() -> None:
    raise ValueError("out of paper")


async def test_spawn_returns_the_task_and_its_result() -> None:
    async def answer() -> int:
        return 42

    async with Scope("test") as scope:
        task = scope.spawn(answer(), name="answer")
        assert task.get_name() == "answer" and len(scope) == 1
        assert await task == 42
        assert len(scope) == 0


async def test_a_crash_is_logged_with_its_name_and_siblings_live(caplog: pytest.LogCaptureFixture) -> None:
    async with Scope("printers") as scope:
        sibling = scope.spawn(forever())
        crashing = scope.spawn(crash(), name="tray 2")
        await asyncio.wait([crashing], timeout=5)
        await asyncio.sleep(0)
        assert not sibling.done() and len(scope) == 1
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "tray 2 of printers failed" in record.getMessage()
    assert record.exc_info is not None and isinstance(record.exc_info[1], ValueError)
    assert sibling.cancelled()


async def test_leaving_cancels_and_waits_for_everything() -> None:
    cancelled: list[str] = []
    async with Scope("test") as scope:
        for name in "abc":
            scope.spawn(forever(cancelled, name))
        await asyncio.sleep(0)
    assert sorted(cancelled) == ["a", "b", "c"] and len(scope) == 0


async def test_leaving_by_an_error_does_the_same_and_raises_it() -> None:
    cancelled: list[str] = []
    with pytest.raises(KeyError):
        async with Scope("test") as scope:
            scope.spawn(forever(cancelled, "a"))
            await asyncio.sleep(0)
            raise KeyError("x")
    assert cancelled == ["a"]


async def test_a_task_that_was_cancelled_is_no_crash(caplog: pytest.LogCaptureFixture) -> None:
    async with Scope("test") as scope:
        task = scope.spawn(forever())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=5)
    assert [record for record in caplog.records if record.name == "stator.tasks.scope"] == []


async def test_clean_up_of_a_task_is_waited_for() -> None:
    done = False

    async def tidy() -> None:
        nonlocal done
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            done = True

    async with Scope("test") as scope:
        scope.spawn(tidy())
        await asyncio.sleep(0)
    assert done


async def test_closing_is_bounded_and_names_who_stays(caplog: pytest.LogCaptureFixture) -> None:
    release = asyncio.Event()

    async def stubborn() -> None:
        try:
            await release.wait()
        except asyncio.CancelledError:
            await asyncio.wait_for(release.wait(), 10)

    scope = Scope("test", close_timeout=0.1)
    task = scope.spawn(stubborn(), name="stubborn")
    polite = scope.spawn(forever())
    await asyncio.sleep(0)
    started = asyncio.get_running_loop().time()
    await scope.aclose()
    assert 0.05 < asyncio.get_running_loop().time() - started < 2
    assert "task stubborn of test did not end within 0.1 s" in caplog.text
    assert polite.cancelled() and not task.done()
    release.set()
    await asyncio.wait_for(task, 5)


async def test_a_closed_scope_takes_nothing() -> None:
    scope = Scope("test")
    await scope.aclose()
    await scope.aclose()
    assert scope.closed
    work = forever()
    with pytest.raises(RuntimeError, match="'test' is closed"):
        scope.spawn(work)
    with pytest.raises(RuntimeError, match="cannot reuse"):
        await work  # it was closed, so that nobody is warned of a coroutine never awaited


async def test_a_task_may_close_its_own_scope() -> None:
    scope = Scope("test")
    other = scope.spawn(forever())

    async def close() -> str:
        await scope.aclose()
        return "alive"

    closing = scope.spawn(close())
    assert await asyncio.wait_for(closing, 5) == "alive"
    assert other.cancelled() and len(scope) == 0


async def test_tasks_spawned_by_tasks_that_end_are_refused() -> None:
    refused: list[str] = []
    scope = Scope("test")

    async def last_words() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            try:
                scope.spawn(forever())
            except RuntimeError as error:
                refused.append(str(error))

    scope.spawn(last_words())
    await asyncio.sleep(0)
    await scope.aclose()
    assert len(refused) == 1 and len(scope) == 0


async def test_join_waits_for_the_last_and_cancelling_it_cancels_nothing() -> None:
    async with Scope("test") as scope:
        release = asyncio.Event()
        for _ in range(3):
            scope.spawn(release.wait())  # type: ignore[arg-type]
        joining = asyncio.create_task(scope.join())
        await asyncio.sleep(0)
        joining.cancel()
        with pytest.raises(asyncio.CancelledError):
            await joining
        assert len(scope) == 3
        release.set()
        await asyncio.wait_for(scope.join(), 5)
        assert len(scope) == 0
        await asyncio.wait_for(scope.join(), 5)


async def test_cancelling_the_close_still_cancels_the_tasks() -> None:
    cancelled: list[str] = []
    scope = Scope("test")
    scope.spawn(forever(cancelled, "a"))
    await asyncio.sleep(0)
    closing = asyncio.create_task(scope.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    for _ in range(3):
        await asyncio.sleep(0)
    assert cancelled == ["a"] and scope.closed


async def test_subjects_are_what_the_running_tasks_are_about() -> None:
    async with Scope("test") as scope:
        scope.spawn(forever(), about="a")
        task = scope.spawn(forever(), about="b")
        scope.spawn(forever())
        assert scope.subjects() == ["a", "b", None]
        task.cancel()
        await asyncio.wait([task], timeout=5)
        assert scope.subjects() == ["a", None]
