"""A context is stopped and killed once, downwards only, and tells everybody who asked."""

import asyncio

import pytest

from stator.errors import UsageError
from stator.runtime.context import Context

pytestmark = pytest.mark.timeout(10)


def test_a_new_context_runs() -> None:
    context = Context("r1", metadata={"tenant": "t"}, headers={"traceparent": "x"}, deadline=12.5)
    assert (context.id, context.metadata, context.headers, context.deadline) == (
        "r1",
        {"tenant": "t"},
        {"traceparent": "x"},
        12.5,
    )
    assert not context.is_stopped
    assert not context.is_killed
    assert repr(context) == "<Context r1 running>"


def test_metadata_of_two_contexts_is_not_shared() -> None:
    one, other = Context("1"), Context("2")
    one.metadata["a"] = "b"
    assert other.metadata == {}


def test_stop_is_no_kill_and_kill_is_a_stop() -> None:
    context = Context("r")
    context.stop()
    assert context.is_stopped
    assert not context.is_killed
    assert repr(context) == "<Context r stopped>"
    context.kill()
    assert context.is_killed
    assert repr(context) == "<Context r killed>"
    killed = Context("k")
    killed.kill()
    assert killed.is_stopped


def test_subscribers_hear_each_end_once() -> None:
    context, heard = Context("r"), list[bool]()
    context.subscribe(heard.append)
    context.stop()
    context.stop()
    assert heard == [False]
    context.kill()
    context.kill()
    context.stop()
    assert heard == [False, True]


def test_kill_without_stop_is_told_once() -> None:
    context, heard = Context("r"), list[bool]()
    context.subscribe(heard.append)
    context.kill()
    context.stop()
    assert heard == [True]


@pytest.mark.parametrize("killed", [False, True])
def test_a_late_subscriber_is_told_at_once(killed: bool) -> None:
    context, heard = Context("r"), list[bool]()
    context.kill() if killed else context.stop()
    context.subscribe(heard.append)
    assert heard == [killed]


def test_who_unsubscribed_is_not_told() -> None:
    context, heard = Context("r"), list[bool]()
    context.unsubscribe(heard.append)  # harmless before
    callback = heard.append
    context.subscribe(callback)
    context.unsubscribe(callback)
    context.unsubscribe(callback)  # harmless after
    context.kill()
    assert heard == []


def test_a_subscriber_may_unsubscribe_itself_while_it_is_told() -> None:
    context, heard = Context("r"), list[str]()

    def first(killed: bool) -> None:
        heard.append("first")
        context.unsubscribe(first)

    context.subscribe(first)
    context.subscribe(lambda killed: heard.append("second"))
    context.stop()
    context.kill()
    assert heard == ["first", "second", "second"]


def test_a_subscriber_that_fails_keeps_nobody_from_being_told(caplog: pytest.LogCaptureFixture) -> None:
    context, heard = Context("r"), list[bool]()

    def fails(killed: bool) -> None:
        raise RuntimeError("broken callback")

    context.subscribe(fails)
    context.subscribe(heard.append)
    child = context.child()
    context.kill()
    assert heard == [True]
    assert child.is_killed
    assert "broken callback" in caplog.text


def test_children_end_with_their_parent_and_not_the_other_way_round() -> None:
    parent = Context("p", metadata={"a": "1"}, headers={"b": "2"}, deadline=7.0)
    child, grandchild = parent.child(), parent.child("other").child()
    assert (child.id, grandchild.id) == ("p", "other")
    assert (child.metadata, child.headers, child.deadline) == ({"a": "1"}, {"b": "2"}, 7.0)
    child.metadata["a"] = "changed"
    assert parent.metadata == {"a": "1"}
    child.kill()
    assert not parent.is_stopped
    parent.stop()
    assert grandchild.is_stopped
    assert not grandchild.is_killed
    parent.kill()
    assert grandchild.is_killed


@pytest.mark.parametrize("killed", [False, True])
def test_a_child_of_an_ended_context_is_born_ended(killed: bool) -> None:
    parent = Context("p")
    parent.kill() if killed else parent.stop()
    child = parent.child()
    assert child.is_stopped
    assert child.is_killed is killed


def test_a_released_child_lives_on_its_own() -> None:
    parent = Context("p")
    child, stranger = parent.child(), Context("s")
    parent.release(stranger)
    parent.release(child)
    parent.release(child)
    parent.kill()
    assert not child.is_stopped


def test_children_released_while_their_parent_is_killed_leave_no_sibling_out() -> None:
    parent = Context("p")
    children = [parent.child(str(n)) for n in range(5)]
    for child in children:
        child.subscribe(lambda killed, child=child: parent.release(child))
    parent.kill()
    assert all(child.is_killed for child in children)


def test_an_empty_id_is_refused() -> None:
    with pytest.raises(UsageError):
        Context("p").child("")


@pytest.mark.parametrize("killed", [False, True])
async def test_waiting_for_the_end(killed: bool) -> None:
    context = Context("r")
    async with asyncio.TaskGroup() as group:
        waits = [group.create_task(context.stopped()) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waits)
        context.kill() if killed else context.stop()
    await context.stopped()  # at once from now on


async def test_cancelling_the_wait_changes_nothing() -> None:
    context = Context("r")
    async with asyncio.TaskGroup() as group:
        given_up, other = group.create_task(context.stopped()), group.create_task(context.stopped())
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.sleep(0)
        assert not context.is_stopped
        assert not other.done()
        context.stop()
