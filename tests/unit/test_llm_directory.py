"""The directory of models: who is there, who may not join, and where requests go."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest

from stator.discovery.memory import MemoryStore
from stator.errors import Unavailable, UsageError
from stator.llm.card import byte_card, card_to_json
from stator.llm.deployment import turns
from stator.llm.directory import ModelDirectory
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.llm.served import ServedModel
from stator.protocol.ids import EndpointId
from stator.protocol.records import ModelRecord
from stator.runtime import Runtime
from stator.runtime.context import Context
from stator.tasks import SystemClock
from stator.testing.plane_suite import eventually
from stator.transports.memory import MemoryNetwork

pytestmark = pytest.mark.timeout(30)


class Cluster:
    """Workers that answer with their own number, and a directory that sees them; all in one process."""

    def __init__(self, stack: AsyncExitStack, store: MemoryStore, network: MemoryNetwork, directory: ModelDirectory) -> None:
        self._stack = stack
        self._store = store
        self._network = network
        self.directory = directory

    async def add(self, number: int, *, name: str = "echo", path: str = "dynamo.backend.generate", **changes: Any) -> "Peer":
        """A worker whose card is the byte tokenizer's with `changes`."""
        runtime = await self._stack.enter_async_context(Runtime.connect(discovery=self._store, plane=self._network))

        async def generate(body: Any, context: Context) -> AsyncIterator[EngineOutput]:
            yield EngineOutput(token_ids=[number], finish_reason="stop")

        served = await runtime.serve(EndpointId.parse(path), generate)
        plain = await asyncio.to_thread(byte_card, name)
        card = card_to_json(msgspec.structs.replace(plain, **changes))
        peer = Peer(runtime, served, path, card)
        await peer.publish()
        return peer

    def names(self) -> list[str]:
        return [served.name for served in self.directory.models()]

    def instances(self, name: str = "echo") -> list[int]:
        return list(self.entry(name).instances())

    def entry(self, name: str = "echo") -> ServedModel:
        return next(served for served in self.directory.models() if served.name == name)

    async def ask(self, name: str = "echo") -> int:
        """The number of the worker that answered."""
        served = self.directory.get(name)
        assert served is not None
        request = PreprocessedRequest(token_ids=[1])
        async with served.engine.generate(request, request_id="r", metadata={}, headers={}) as stream:
            items = [item async for batch in stream.batches() for item in batch]
        return items[0].token_ids[0]


class Peer:
    """One worker."""

    def __init__(self, runtime: Runtime, served: Any, path: str, card: dict[str, Any]) -> None:
        self._runtime = runtime
        self._served = served
        self.card = card
        id = EndpointId.parse(path)
        self.id = runtime.instance_id
        self._record = ModelRecord(
            namespace=id.namespace,
            component=id.component,
            endpoint=id.name,
            instance_id=runtime.instance_id,
            card_json=card,
        )

    async def publish(self) -> None:
        await self._runtime.publish(self._record)

    async def leave(self) -> None:
        await self._served.unregister()
        await self._runtime.withdraw(self._record)
        await self._served.finish(1.0)


@asynccontextmanager
async def cluster() -> AsyncGenerator[Cluster]:
    store, network = MemoryStore(), MemoryNetwork()
    async with AsyncExitStack() as stack:
        connecting = Runtime.connect(discovery=store, plane=network, instance_timeout=0.1)
        runtime = await stack.enter_async_context(connecting)
        directory = await stack.enter_async_context(ModelDirectory.follow(runtime, clock=SystemClock()))
        yield Cluster(stack, store, network, directory)


async def test_a_model_is_there_while_one_instance_is() -> None:
    async with cluster() as it:
        assert it.names() == []
        assert it.directory.get("echo") is None
        first = await it.add(1)
        await eventually(lambda: it.names() == ["echo"])
        entry = it.entry()
        second = await it.add(2)
        await eventually(lambda: it.instances() == sorted([first.id, second.id]))
        assert it.entry() is entry, "nothing is loaded again for one more worker"
        assert Counter([await it.ask() for _ in range(8)]) == {1: 4, 2: 4}
        await first.leave()
        await eventually(lambda: it.instances() == [second.id])
        await second.leave()
        await eventually(lambda: it.names() == [])


async def test_endpoints_of_one_model_get_requests_by_their_instances() -> None:
    async with cluster() as it:
        await it.add(1)
        await it.add(2)
        await it.add(3, path="blue.backend.generate")
        await it.add(9, name="other", path="dynamo.other.generate")
        await eventually(lambda: it.names() == ["echo", "other"] and len(it.instances()) == 3)
        assert Counter([await it.ask() for _ in range(12)]) == {1: 4, 2: 4, 3: 4}
        assert await it.ask("other") == 9


async def test_another_card_on_the_same_endpoint_waits_until_the_old_ones_are_gone(caplog: pytest.LogCaptureFixture) -> None:
    async with cluster() as it:
        old = await it.add(1)
        await eventually(lambda: it.names() == ["echo"])
        new = await it.add(2, kv_cache_block_size=64)
        await eventually(lambda: "differs from the one its endpoint serves" in caplog.text)
        await it.add(3)
        await eventually(lambda: len(it.instances()) == 2)
        assert {await it.ask() for _ in range(12)} == {1, 3}, "a worker with another tokenizer would misread the request"
        assert caplog.text.count("differs") == 1, "reported once"
        await old.leave()
        assert new.id not in it.instances()


async def test_a_new_card_takes_over_when_the_last_old_one_leaves() -> None:
    async with cluster() as it:
        old = await it.add(1)
        await eventually(lambda: it.names() == ["echo"])
        created = it.entry().created
        new = await it.add(2, kv_cache_block_size=64)
        await old.leave()
        await eventually(lambda: it.instances() == [new.id])
        assert it.entry().card.kv_cache_block_size == 64
        assert it.entry().created == created, "for clients it is the same model"
        assert {await it.ask() for _ in range(4)} == {2}


async def test_endpoints_with_different_cards_are_served_side_by_side() -> None:
    async with cluster() as it:
        await it.add(1)
        await it.add(2, path="blue.backend.generate", kv_cache_block_size=64)
        await it.add(3, path="blue.backend.generate", kv_cache_block_size=64)
        await eventually(lambda: len(it.instances()) == 3)
        assert it.names() == ["echo"]
        blocks: Counter[int] = Counter()
        for _ in range(12):
            served = it.directory.get("echo")
            assert served is not None
            blocks[served.preprocessor.card.kv_cache_block_size] += 1
            assert served.preprocessor.card.kv_cache_block_size == served.card.kv_cache_block_size
        assert blocks == {16: 4, 64: 8}
        assert {await it.ask() for _ in range(12)} == {1, 2, 3}


async def test_cards_that_cannot_be_served_are_reported_and_harm_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async with cluster() as it:
        broken = {"hf_tokenizer_json": {"path": "/nowhere/tokenizer.json", "checksum": f"blake3:{'0' * 64}"}}
        await it.add(1, name="embeddings", path="a.b.c", model_type="Embedding")
        await it.add(2, name="missing", path="a.d.e", tokenizer=broken, user_data=None)
        await it.add(3, name="strange", path="a.f.g", kv_cache_block_size="many")
        await it.add(4)
        await eventually(lambda: it.names() == ["echo"] and caplog.text.count("is not served") == 3)
        for reason in ("'Embedding' is neither chat nor completions", "/nowhere/tokenizer.json", "kv_cache_block_size"):
            assert reason in caplog.text
        assert await it.ask() == 4


async def test_a_card_without_instance_is_no_model() -> None:
    async with cluster() as it:
        peer = await it.add(1)
        await eventually(lambda: it.names() == ["echo"])
        await peer._served.unregister()  # pyright: ignore[reportPrivateUsage]
        await eventually(lambda: it.names() == [])


async def test_who_holds_a_model_that_is_gone_gets_unavailable() -> None:
    async with cluster() as it:
        peer = await it.add(1)
        await eventually(lambda: it.names() == ["echo"])
        served = it.entry()
        await peer.leave()
        await eventually(lambda: it.names() == [])
        with pytest.raises(Unavailable):
            async with served.engine.generate(PreprocessedRequest(token_ids=[1]), request_id="r", metadata={}, headers={}):
                pass


async def test_an_unknown_policy_is_refused_at_once() -> None:
    async with Runtime.connect(discovery=MemoryStore(), plane=MemoryNetwork()) as runtime:
        with pytest.raises(UsageError, match="did you mean 'round_robin'"):
            async with asyncio.timeout(5), ModelDirectory.follow(runtime, clock=SystemClock(), policy="round_robbin"):
                pass


@pytest.mark.parametrize("weights", [[1], [2, 1], [0, 3], [0, 0], [5, 1, 4]])
def test_turns_follow_the_weights(weights: list[int]) -> None:
    rounds = 7
    found = Counter(turns(weights, turn) for turn in range(rounds * (sum(weights) or len(weights))))
    expected = weights if sum(weights) else [1] * len(weights)
    assert [found[place] for place in range(len(weights))] == [rounds * weight for weight in expected]


async def test_a_directory_is_entered_when_both_cards_and_instances_are_known() -> None:
    late = asyncio.Event()

    class Late(ModelDirectory):
        async def _follow_instances(self) -> None:
            await late.wait()
            await super()._follow_instances()

    async with AsyncExitStack() as stack:
        store, network = MemoryStore(), MemoryNetwork()
        watching = await stack.enter_async_context(Runtime.connect(discovery=store, plane=network))
        async with ModelDirectory.follow(watching, clock=SystemClock()) as directory:
            cluster = Cluster(stack, store, network, directory)
            await cluster.add(1)
            await eventually(lambda: cluster.names() == ["echo"])
        entering = stack.enter_async_context(Late.follow(watching, clock=SystemClock()))
        waiting = asyncio.ensure_future(entering)
        try:
            done, _ = await asyncio.wait([waiting], timeout=0.3)
            assert not done, "cards alone are not enough"
        finally:
            late.set()
        entered = await waiting
        assert [served.name for served in entered.models()] == ["echo"]
