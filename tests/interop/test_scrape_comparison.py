"""A worker of the reference and ours get the same traffic from the same client, byte for byte: their metrics pages say the same.

Each step of the traffic is sent to both, and what it changed on either page is compared sample by sample. `NOT_COMPARED` and
`DIFFERENCES` list, with reasons, all that may differ.
"""

import asyncio
import json
import os
import socket
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from interop.peers import Peer, discovery_root, needs_reference, peer, records_in
from interop.raw_caller import RawCaller, raw_caller, two_part
from interop.scraped_handler import conversation, items
from stator.runtime import Context, Runtime

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]

SLOTS, QUEUE = 2, 2
LIMITS = {"DYN_ENGINE_REQUEST_LIMIT": str(SLOTS), "DYN_DYNAMO_REQUEST_QUEUE_LIMIT": str(QUEUE)}

NOT_COMPARED = {
    "dynamo_tokio_": "gauges of the reference's executor, which has no equal in Python (`spec/30 §8.6`)",
    "stator_": "ours alone: it adds up, which the reference's counters do not",
}
"""families, by the beginning of their names"""

Sample = tuple[str, tuple[tuple[str, str], ...]]
Counts = dict[Sample, float]


class Scraped:
    """A worker, wherever it runs."""

    def __init__(self, root: Path, url: str) -> None:
        self.root = root
        self.url = url

    async def page(self) -> str:
        """Without what is not compared; `worker_id` is the same for everybody."""

        def read() -> str:
            with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
                return answer.read().decode()

        page = (await asyncio.to_thread(read)).replace(self.worker_id, "W")
        lines = (line for line in page.splitlines(keepends=True) if line.split()[line.startswith("#") * 2])
        return "".join(line for line in lines if not line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith(FOREIGN))

    async def settled(self) -> str:
        """The page, once nothing of any request is going on and nothing changes."""
        deadline = asyncio.get_running_loop().time() + 20
        before = await self.page()
        while True:
            await asyncio.sleep(0.1)
            page = await self.page()
            now = counts(page)
            if counts(before) == now and not any(value for sample, value in now.items() if sample[0].endswith(GAUGES)):
                return page
            assert asyncio.get_running_loop().time() < deadline, page
            before = page

    @property
    def worker_id(self) -> str:
        return f"{records_in(self.root)[0].instance_id:x}"

    @asynccontextmanager
    async def called(self, endpoint: str = "generate") -> AsyncIterator[RawCaller]:
        """A caller of one of its endpoints."""
        (record,) = [record for record in records_in(self.root) if record.endpoint == endpoint]
        assert record.transport.tcp is not None
        async with raw_caller(record.transport.tcp) as caller:
            yield caller


FOREIGN = tuple(NOT_COMPARED)
GAUGES = ("_inflight_requests", "_pool_active_tasks", "_queue_depth", "_engine_request", "_request_queue")


def counts(page: str) -> Counts:
    """The numbers that do not depend on the clock."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if not sample.name.endswith(("_sum", "_bucket", "_uptime_seconds"))
    }


def changes(before: str, after: str) -> dict[str, float]:
    """What a step did to a page: sample → by how much, short enough to be read in a failure."""
    first = counts(before)
    found: dict[str, float] = {}
    for (name, labels), value in counts(after).items():
        change = value - first.get((name, labels), 0)
        if change:
            told = [text for label, text in labels if label in ("dynamo_endpoint", "error_type")]
            found[" ".join((name.removeprefix("dynamo_"), *told))] = change
    return found


# -- the traffic

Step = Callable[[Scraped], Awaitable[None]]
STEPS: dict[str, Step] = {}
SOON = 0.15
"""seconds in which a worker has noticed whatever was sent to it"""


def step(function: Step) -> Step:
    STEPS[function.__name__] = function
    return function


async def to_the_end(caller: RawCaller, request: Any) -> list[Any]:
    """A request whose answer is read to its sentinel. The connection is closed when the worker has surely noted the end: the
    reference takes who closes before for one that cancels."""
    call = await caller.open(request)
    found = await call.take(10_000)
    await asyncio.sleep(0.02)
    call.close()
    return found


@step
async def unary(worker: Scraped) -> None:
    async with worker.called() as caller:
        for _ in range(3):
            assert len(await to_the_end(caller, {"mode": "count", "n": 1})) == 2


@step
async def stream(worker: Scraped) -> None:
    async with worker.called() as caller:
        for _ in range(2):
            assert len(await to_the_end(caller, {"mode": "count", "n": 50})) == 51


@step
async def empty(worker: Scraped) -> None:
    async with worker.called() as caller:
        assert await to_the_end(caller, {"mode": "count", "n": 0}) == [{"complete_final": True}]


@step
async def without_a_time_stamp(worker: Scraped) -> None:
    async with worker.called() as caller:
        _, subject = await caller.ask({"mode": "count", "n": 1}, stamp=False)
        call, _ = await caller.answer(subject)
        await call.take(10)
        await asyncio.sleep(0.02)
        call.close()


@step
async def error_before_the_first_item(worker: Scraped) -> None:
    async with worker.called() as caller:
        for mode in ("error", "crash"):
            assert "error" in (await to_the_end(caller, {"mode": mode, "n": 0}))[0]["data"]


@step
async def error_in_mid_stream(worker: Scraped) -> None:
    async with worker.called() as caller:
        for mode in ("error", "crash"):
            assert "error" in (await to_the_end(caller, {"mode": mode, "n": 3}))[3]["data"]


@step
async def an_item_that_cannot_be_sent(worker: Scraped) -> None:
    async with worker.called() as caller:
        _, subject = await caller.ask({"mode": "unsendable", "n": 2})
        call, prologue = await caller.answer(subject)
        if prologue:  # the reference may cut the connection before
            await call.take(10)
        await asyncio.sleep(SOON)
        call.close()


@step
async def a_handler_that_does_not_start(worker: Scraped) -> None:
    async with worker.called("broken") as caller:
        _, subject = await caller.ask({})
        call, prologue = await caller.answer(subject)
        assert "not today" in prologue["error"]
        await asyncio.sleep(SOON)
        call.close()


async def ended(worker: Scraped, mode: str, how: Callable[[Any], None]) -> None:
    """A request that its caller ends after the first item."""
    async with worker.called() as caller:
        call = await caller.open({"mode": mode})
        assert await call.take(1)
        how(call)
        await asyncio.sleep(SOON)
        call.close()


@step
async def stopped(worker: Scraped) -> None:
    await ended(worker, "until stopped", lambda call: call.say("stop"))


@step
async def stopped_while_silent(worker: Scraped) -> None:
    await ended(worker, "silent", lambda call: call.say("stop"))


@step
async def stopped_and_not_heeded(worker: Scraped) -> None:
    await ended(worker, "deaf", lambda call: call.say("stop"))


@step
async def killed(worker: Scraped) -> None:
    await ended(worker, "until stopped", lambda call: call.say("kill"))


@step
async def killed_while_silent(worker: Scraped) -> None:
    await ended(worker, "silent", lambda call: call.say("kill"))


@step
async def killed_and_not_heeded(worker: Scraped) -> None:
    await ended(worker, "deaf", lambda call: call.say("kill"))


@step
async def dropped(worker: Scraped) -> None:
    """As the reference's client kills: it sends "kill" and resets the connection."""

    def drop(call: Any) -> None:
        call.say("kill")
        call.reset()

    await ended(worker, "until stopped", drop)


@step
async def reset(worker: Scraped) -> None:
    await ended(worker, "until stopped", lambda call: call.reset())


@step
async def closed(worker: Scraped) -> None:
    await ended(worker, "until stopped", lambda call: call.close())


@step
async def stopped_then_killed(worker: Scraped) -> None:
    async with worker.called() as caller:
        call = await caller.open({"mode": "deaf"})
        assert await call.take(1)
        call.say("stop")
        await asyncio.sleep(SOON)
        call.say("kill")
        await asyncio.sleep(SOON)
        call.close()


@step
async def an_unknown_word(worker: Scraped) -> None:
    await ended(worker, "until stopped", lambda call: call.say("hello"))


@step
async def refused_at_capacity(worker: Scraped) -> None:
    async with worker.called() as caller:
        asked = [await caller.ask({"mode": "late", "seconds": 0.5}) for _ in range(SLOTS + QUEUE + 3)]
        refused = [text for text, _ in asked if text]
        assert len(refused) == 3 and all(text.startswith(b"Server overloaded:") for text in refused)
        calls = [(await caller.answer(subject))[0] for text, subject in asked[:SLOTS]]
        for call in calls:
            await call.take(10)
        await asyncio.sleep(0.02)
        for call in calls:
            call.close()
        for _, subject in asked[SLOTS : SLOTS + QUEUE]:
            call, _ = await caller.answer(subject)
            await call.take(10)
            await asyncio.sleep(0.02)
            call.close()


async def bad(worker: Scraped, payload: Callable[[RawCaller], bytes], endpoint: str = "generate") -> None:
    """Two request frames in order, with something else in them."""
    async with worker.called(endpoint) as caller:
        for _ in range(2):
            assert await caller.send(payload(caller)) == b""
        await asyncio.sleep(SOON)


def told(caller: RawCaller, body: bytes = b'{"mode": "count", "n": 1}', **changes: Any) -> bytes:
    return two_part(json.dumps(caller.control(**changes)).encode(), body)


@step
async def a_short_payload(worker: Scraped) -> None:
    await bad(worker, lambda caller: told(caller)[:-3])


@step
async def a_payload_of_noise(worker: Scraped) -> None:
    await bad(worker, lambda caller: b"\xff" * 40)


@step
async def no_payload(worker: Scraped) -> None:
    await bad(worker, lambda caller: b"")


@step
async def no_header(worker: Scraped) -> None:
    await bad(worker, lambda caller: two_part(b"", b"{}"))


@step
async def no_data(worker: Scraped) -> None:
    await bad(worker, lambda caller: told(caller, b""))


@step
async def neither_header_nor_data(worker: Scraped) -> None:
    await bad(worker, lambda caller: two_part())


@step
async def a_control_message_that_is_no_json(worker: Scraped) -> None:
    await bad(worker, lambda caller: two_part(b"{not json", b"{}"))


@step
async def a_control_message_without_its_fields(worker: Scraped) -> None:
    await bad(worker, lambda caller: two_part(b'{"id": "r"}', b"{}"))


@step
async def an_unknown_codec(worker: Scraped) -> None:
    await bad(worker, lambda caller: told(caller, payload_codec="cbor"))


@step
async def a_body_that_is_no_json(worker: Scraped) -> None:
    await bad(worker, lambda caller: told(caller, b"{not json"))


@step
async def a_body_of_another_codec(worker: Scraped) -> None:
    await bad(worker, lambda caller: told(caller, b"\xc1", payload_codec="msgpack"))


@step
async def an_address_that_is_none(worker: Scraped) -> None:
    await bad(worker, lambda caller: told(caller, info={"address": "nowhere"}))


@step
async def an_address_that_nobody_listens_at(worker: Scraped) -> None:
    await bad(worker, lambda caller: told(caller, info={"address": "127.0.0.1:1"}))


@step
async def the_connection_of_another_request(worker: Scraped) -> None:
    await bad(worker, lambda caller: told(caller, info={"context": "another"}))


@step
async def a_request_stream_for_an_answer(worker: Scraped) -> None:
    await bad(worker, lambda caller: told(caller, info={"stream_type": "request"}))


@step
async def another_transport(worker: Scraped) -> None:
    await bad(worker, lambda caller: told(caller, connection_info={"transport": "carrier pigeon", "info": "{}"}))


@step
async def many_in_for_a_unary_handler(worker: Scraped) -> None:
    await bad(worker, lambda caller: told(caller, request_type="many_in"))


@step
async def a_conversation_with_a_unary_handler(worker: Scraped) -> None:
    def conversation(caller: RawCaller) -> bytes:
        control = caller.control(request_type="many_in")
        more = {"address": caller.address, "subject": "inputs", "context": control["id"], "stream_type": "request"}
        control["request_stream_connection_info"] = {"transport": "tcp_server", "info": json.dumps(more)}
        return two_part(json.dumps(control).encode())

    await bad(worker, conversation)


@step
async def a_single_request_for_a_conversation(worker: Scraped) -> None:
    await bad(worker, told, endpoint="converse")


async def conversed(worker: Scraped, last_word: str) -> None:
    async with worker.called("converse") as caller:
        inputs, answer = await caller.converse()
        for number in range(3):
            inputs.give(number)
            assert (await answer.take(1))[0]["data"] == {"data": number}
        inputs.say(last_word)
        await answer.take(10)
        await asyncio.sleep(SOON)
        for call in (inputs, answer):
            call.close()


@step
async def a_conversation(worker: Scraped) -> None:
    await conversed(worker, "sentinel")


@step
async def a_conversation_that_is_stopped(worker: Scraped) -> None:
    await conversed(worker, "stop")


@step
async def a_conversation_that_is_killed(worker: Scraped) -> None:
    await conversed(worker, "kill")


@step
async def an_address_that_nobody_listens_at_and_a_long_answer(worker: Scraped) -> None:
    await bad(worker, lambda caller: told(caller, b'{"mode": "deaf"}', info={"address": "127.0.0.1:1"}))


@step
async def a_path_that_nobody_serves(worker: Scraped) -> None:
    async with worker.called() as caller:
        assert (await caller.send(told(caller), path=b"1/nothing")).startswith(b"Unknown endpoint:")
        assert await caller.send(told(caller), path=b"\xff\xff") == b"Invalid endpoint path"
        await asyncio.sleep(SOON)


# -- the workers


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return discovery_root(tmp_path_factory)


def free_port() -> int:
    """The reference reads it as a signed 16-bit number, so those that the system would choose are too high."""
    for port in range(22_000 + os.getpid() % 10_000, 32_767):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port")


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def reference(root: Path, port: int) -> Iterator[Peer]:
    with peer("peer_scraped.py", root, DYN_SYSTEM_PORT=str(port), **LIMITS) as process:
        yield process


async def handle(request: Any, context: Context) -> AsyncIterator[Any]:
    async for item in items(request, lambda: context.is_stopped):
        yield item


async def converse(inputs: Any, context: Context) -> AsyncIterator[Any]:
    async for item in conversation(inputs):
        yield item


def broken(request: Any, context: Context) -> AsyncIterator[Any]:
    raise RuntimeError("not today")


@asynccontextmanager
async def both(reference: Peer, root: Path, port: int, ours: Path) -> AsyncIterator[tuple[Scraped, Scraped]]:
    """The reference's worker, and a new one of ours with the same handlers."""
    async with AsyncExitStack() as stack:
        runtime = await stack.enter_async_context(
            Runtime.connect(
                plane="compatible",
                discovery="file",
                file__root=str(ours),
                health__port=0,
                admission__slots=SLOTS,
                admission__queue=QUEUE,
            )
        )
        endpoint = runtime.endpoint("demo.backend.generate")
        await stack.enter_async_context(endpoint.serving(handle, metrics_labels=[("model", "tiny")]))
        await stack.enter_async_context(runtime.endpoint("demo.backend.broken").serving(broken))
        await stack.enter_async_context(runtime.endpoint("demo.backend.converse").serving(converse, bidirectional=True))
        assert runtime.status_url is not None
        workers = Scraped(root, f"http://127.0.0.1:{port}"), Scraped(ours, runtime.status_url)
        deadline = asyncio.get_running_loop().time() + 15
        while len(await asyncio.to_thread(records_in, root)) < 3:
            gone = f"the reference is not listed, its exit status is {reference.process.poll()}"
            assert asyncio.get_running_loop().time() < deadline, f"{gone}\n{reference.log()}"
            await asyncio.sleep(0.05)
        yield workers


async def done(worker: Scraped, name: str) -> dict[str, float]:
    """What step `name` changes on the page of `worker`."""
    before = await worker.settled()
    await STEPS[name](worker)
    return changes(before, await worker.settled())


BYTES = "component_response_bytes_total generate"
FIRST = "work_handler_time_to_first_response_seconds_count"
FINAL = "component_errors_total generate publish_final"
RESPONSE = "component_errors_total generate publish_response"
INVALID = "component_errors_total generate invalid_message"
BODY = "component_errors_total generate deserialization"
HOME = "component_errors_total generate response_stream"

ANY = float("nan")
"""not the same twice"""

_UNSENT = "it counts the bytes of the item or end that it could not send, we count what was taken for sending"
_KILLED = (
    {FINAL: -1, RESPONSE: 1, BYTES: -23},
    "we cancel a handler at once, it waits for the next item: whether the handler would have heeded the kill and left only the end "
    "to be sent is not known; and " + _UNSENT,
)
_RESET = (
    {FINAL: ANY, RESPONSE: ANY, BYTES: ANY},
    f"{_KILLED[1]}; and a reset may overtake the kill, then it notices only when it sends the next item",
)
CANCELLED = "component_cancellation_total converse"
_INPUTS = "it counts who cancels on the connection of the answer, as clients do, and not who does on that of the inputs; we count both"
_GOES_ON = "we send what a handler still says after a stop (`spec/10 §4.2` allows both), it drops it"
_UNREADABLE = (
    {INVALID: 2},
    "it counts no error for a payload that is no two-part message; here the request is not lost to sight",
)

DIFFERENCES: dict[str, tuple[dict[str, float], str]] = {
    "an_item_that_cannot_be_sent": (
        {BYTES: ANY, RESPONSE: ANY, FINAL: ANY},
        "it cuts the stream, now before and now after an error item of its own; we always send the error item (`spec/10 §11`, rule 4)",
    ),
    "stopped_and_not_heeded": ({BYTES: ANY}, _GOES_ON),
    "stopped_then_killed": ({BYTES: ANY}, _GOES_ON),
    "killed": _KILLED,
    "killed_while_silent": _KILLED,
    "killed_and_not_heeded": ({BYTES: ANY}, _UNSENT),
    "dropped": _RESET,
    "reset": _RESET,
    "an_unknown_word": _KILLED,
    "closed": (
        {BYTES: ANY},
        "until the worker's host answers with a reset, items are sent to nobody: how many is a matter of time",
    ),
    "a_short_payload": _UNREADABLE,
    "a_payload_of_noise": _UNREADABLE,
    "no_payload": _UNREADABLE,
    "a_conversation_that_is_stopped": (
        {CANCELLED: 1, FINAL.replace("generate", "converse"): ANY},
        f"{_INPUTS}; and the connection may be gone before the end is written, on a busy machine",
    ),
    "a_conversation_that_is_killed": (
        {CANCELLED: 1, **{sample.replace("generate", "converse"): change for sample, change in _KILLED[0].items()}},
        f"{_INPUTS}; and {_KILLED[1]}",
    ),
    "many_in_for_a_unary_handler": (
        {BODY: 2, FIRST: -2, BYTES: -188},
        "it ignores the type of a request that has a value; we do not answer one value where many were announced",
    ),
    "an_address_that_nobody_listens_at": (
        {HOME: -2, FIRST: 2, BYTES: 188},
        "our handler starts while the connection is being made; this short answer is complete before anybody knows that it cannot be "
        "delivered",
    ),
    "an_address_that_nobody_listens_at_and_a_long_answer": (
        {FIRST: 2, BYTES: ANY},
        "our handler starts while the connection is being made, and is cancelled when it cannot be",
    ),
}
"""step → what it changes here and not there (negative: there and not here), and why that is right"""


TRIES = 3
"""A step that crosses an end with a lost connection is a race in both workers: which of the two is first moves a count from one kind
of error to another. It must come out as described in one of so many tries; a count that is wrong is so in all of them."""


@pytest.mark.parametrize("name", STEPS)
async def test_a_step_counts_the_same(root: Path, port: int, reference: Peer, tmp_path: Path, name: str) -> None:
    expected, _ = DIFFERENCES.get(name, ({}, ""))
    tries: list[str] = []
    async with both(reference, root, port, tmp_path) as (theirs, ours):
        for _ in range(TRIES):
            there, here = await asyncio.gather(done(theirs, name), done(ours, name))
            assert here or there or name == "a_path_that_nobody_serves", "the step has no effect"
            found = {sample: here.get(sample, 0) - there.get(sample, 0) for sample in sorted({*here, *there})}
            given = {sample: change for sample, change in found.items() if change and expected.get(sample) is not ANY}
            if given == {sample: change for sample, change in expected.items() if change is not ANY}:
                return
            tries.append(f"differences {given}\nthere {there}\nhere {here}")
    raise AssertionError("\n\n".join(tries))


def test_every_difference_is_of_a_step_and_has_a_reason() -> None:
    assert set(DIFFERENCES) <= set(STEPS)
    assert all(changes and reason for changes, reason in DIFFERENCES.values())


# -- the page as a whole


def families(page: str) -> list[tuple[str, str, str]]:
    """Name, type and help of each family, in the order of the page."""
    return [(family.name, family.type, family.documentation) for family in text_string_to_metric_families(page)]


def samples(page: str) -> list[tuple[str, dict[str, str]]]:
    """Name and labels of all samples, buckets included, in the order of the page."""
    return [(sample.name, sample.labels) for family in text_string_to_metric_families(page) for sample in family.samples]


QUEUE_CAPACITY = "dynamo_work_handler_queue_capacity"
"""It shows one less than wait, at least 1: one is in the hands of its dispatcher (`spec/10 §1.6`). We show how many wait."""


async def test_the_pages_have_the_same_families_labels_and_buckets(tmp_path: Path) -> None:
    """Before the first request, and after errors of every kind that both count."""
    kinds = (
        "unary",
        "a_handler_that_does_not_start",
        "no_header",
        "a_body_that_is_no_json",
        "an_address_that_is_none",
        "stopped",
    )
    root, own = tmp_path / "theirs", tmp_path / "ours"
    root.mkdir()
    own.mkdir()
    port = free_port()
    with peer("peer_scraped.py", root, DYN_SYSTEM_PORT=str(port), **LIMITS) as process:
        async with both(process, root, port, own) as (theirs, ours):
            for steps in ((), kinds):
                for name in steps:
                    await asyncio.gather(STEPS[name](theirs), STEPS[name](ours))
                there, here = await theirs.settled(), await ours.settled()
                assert families(here) == families(there)
                assert by_family(here) == by_family(there)
                assert labels_in_order(here) == labels_in_order(there)
                there_counts, here_counts = counts(there), counts(here)
                assert there_counts.pop((QUEUE_CAPACITY, ())) == QUEUE - 1
                assert here_counts.pop((QUEUE_CAPACITY, ())) == QUEUE
                assert here_counts == there_counts


def by_family(page: str) -> dict[str, list[str]]:
    """All samples, sorted: two endpoints of a component are registered in no particular order."""
    found: dict[str, list[str]] = {}
    for name, labels in samples(page):
        found.setdefault(name, []).append(json.dumps(labels, sort_keys=True))
    return {name: sorted(labels) for name, labels in found.items()}


def labels_in_order(page: str) -> set[tuple[str, ...]]:
    """How the labels of each family stand one after the other."""
    return {(name, *labels) for name, labels in samples(page)}
