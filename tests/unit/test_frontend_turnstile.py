"""A burst passes a few at a time, in order, and nobody is left behind."""

import asyncio

from stator.frontend.turnstile import Turnstile


async def test_as_many_as_the_width_pass_without_waiting() -> None:
    turnstile = Turnstile(2)
    for _ in range(2):
        await asyncio.wait_for(turnstile.enter(), 1)
    assert turnstile.waiting == 0


async def test_a_burst_passes_a_few_in_each_turn_and_in_order() -> None:
    turnstile = Turnstile(3)
    passed: list[int] = []
    per_turn: list[int] = []

    async def caller(number: int) -> None:
        await turnstile.enter()
        passed.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(caller(number))
        while len(passed) < 10:
            before = len(passed)
            await asyncio.sleep(0)
            per_turn.append(len(passed) - before)
    assert passed == list(range(10))
    assert max(per_turn) == 3
    assert turnstile.waiting == 0


async def test_a_later_caller_does_not_overtake_those_who_wait() -> None:
    turnstile = Turnstile(1)
    await turnstile.enter()
    first = asyncio.ensure_future(turnstile.enter())
    await asyncio.sleep(0)
    second = asyncio.ensure_future(turnstile.enter())
    order: list[str] = []
    first.add_done_callback(lambda _: order.append("first"))
    second.add_done_callback(lambda _: order.append("second"))
    await asyncio.wait_for(asyncio.gather(first, second), 1)
    assert order == ["first", "second"]


async def test_who_is_cancelled_while_waiting_costs_nobody_a_turn() -> None:
    turnstile = Turnstile(1)
    await turnstile.enter()
    waiting = [asyncio.ensure_future(turnstile.enter()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    waiting[1].cancel()
    await asyncio.wait_for(waiting[2], 1)
    assert turnstile.waiting == 0
