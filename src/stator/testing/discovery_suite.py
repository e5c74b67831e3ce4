"""What every discovery must do: subclass `DiscoverySuite`, say how processes join a cluster, and pytest collects the cases.

    class TestMemoryDiscovery(DiscoverySuite):
        @asynccontextmanager
        async def cluster(self):
            store = MemoryStore()
            yield lambda: MemoryDiscovery(store, clock=SystemClock(), random=Random())

Backends whose records are bytes that anybody may write subclass `StoredDiscoverySuite`, which adds foreign and broken records.
"""

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager

import pytest

from stator.discovery.interface import Added, Discovery, Removed, Watch
from stator.errors import UsageError
from stator.protocol.records import (
    EndpointRecord,
    EventChannelRecord,
    EventTransport,
    ModelRecord,
    NativeAddress,
    Query,
    Record,
    RecordKey,
    Transport,
    encode_record,
)

__all__ = ["Connect", "DiscoverySuite", "StoredDiscoverySuite", "endpoint_record", "model_record", "until"]

Connect = Callable[[], AbstractAsyncContextManager[Discovery]]
"""One more process of the cluster."""

ENDPOINTS = Query(EndpointRecord.bucket)
MODELS = Query(ModelRecord.bucket)
CHANNELS = Query(EventChannelRecord.bucket)
LARGEST_ID = 2**64 - 1


def endpoint_record(
    instance: int, path: str = "demo.backend.generate", *, tcp: str = "192.0.2.1:4000/a/generate"
) -> EndpointRecord:
    """A record of `namespace.component.endpoint`; the namespace may be dotted."""
    namespace, component, endpoint = path.rsplit(".", 2)
    return EndpointRecord(
        namespace=namespace, component=component, endpoint=endpoint, instance_id=instance, transport=Transport(tcp=tcp)
    )


def model_record(
    instance: int, name: str, *, source: str = "/models/tiny", lora: str = "", endpoint: str = "generate"
) -> ModelRecord:
    """A model card's record; `lora` is the suffix of an adapter's."""
    card = {"display_name": name, "source_path": source}
    where = ModelRecord(namespace="demo", component="backend", endpoint=endpoint, instance_id=instance, card_json=card)
    if not lora:
        return where
    return ModelRecord(
        namespace="demo", component="backend", endpoint=endpoint, instance_id=instance, card_json=card, model_suffix=lora
    )


def channel_record(publisher: int, topic: str, *, component: str = "") -> EventChannelRecord:
    """One publisher's record; without component the channel belongs to the namespace."""
    transport = EventTransport(kind="Zmq", config={"endpoint": "tcp://192.0.2.1:5000"})
    return EventChannelRecord(namespace="demo", component=component, topic=topic, instance_id=publisher, transport=transport)


async def until(watch: Watch, condition: Callable[[], bool], *, within: float = 10.0) -> None:
    """Read batches until `condition()` holds; AssertionError after `within` seconds."""
    try:
        async with asyncio.timeout(within):
            while not condition():
                await anext(watch)
    except TimeoutError:
        raise AssertionError(f"after {within} s the watch knows {sorted(map(str, watch.current))}") from None


async def silence(watch: Watch, seconds: float = 0.2) -> None:
    """AssertionError if the watch has anything to tell within `seconds`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            pytest.fail(f"unexpected changes {await anext(watch)}")


def keys(records: Iterable[Record]) -> set[RecordKey]:
    """The keys of `records`."""
    return {record.key for record in records}


class DiscoverySuite(ABC):
    """The cases for every backend."""

    @abstractmethod
    def cluster(self) -> AbstractAsyncContextManager[Connect]:
        """A fresh cluster; each call of the answer is one more process of it."""

    # register, list, unregister

    async def test_a_registered_record_is_listed_by_everybody(self) -> None:
        record = EndpointRecord(
            namespace="demo",
            component="backend",
            endpoint="generate",
            instance_id=LARGEST_ID,
            transport=Transport(tcp="192.0.2.1:4000/ffffffffffffffff/generate"),
            device_type="cuda",
            stator=NativeAddress(plane=1, address="192.0.2.1:4001", process="0" * 32, path="/run/stator/x.sock"),
        )
        async with self.cluster() as connect, connect() as worker, connect() as client:
            assert await worker.register(record) is True
            assert await worker.list(ENDPOINTS) == [record]
            assert await client.list(ENDPOINTS) == [record]
            assert dict(worker.owned()) == {record.key: record}
            assert dict(client.owned()) == {}

    async def test_registering_twice_changes_nothing(self) -> None:
        first, second = endpoint_record(1), endpoint_record(1, tcp="192.0.2.9:1/a/generate")
        async with self.cluster() as connect, connect() as worker, connect() as client:
            assert await worker.register(first) is True
            assert await worker.register(second) is False
            assert await client.list(ENDPOINTS) == [first]
            assert dict(worker.owned()) == {first.key: first}

    async def test_a_key_of_another_owner_is_refused(self) -> None:
        first, second = endpoint_record(1), endpoint_record(1, tcp="192.0.2.9:1/a/generate")
        async with self.cluster() as connect, connect() as worker, connect() as other:
            await worker.register(first)
            with pytest.raises(UsageError, match="v1/instances/demo/backend/generate/1 is registered by another owner"):
                await other.register(second)
            assert dict(other.owned()) == {}
            await other.aclose()
            assert await worker.list(ENDPOINTS) == [first]

    async def test_unregister_removes_for_everybody(self) -> None:
        gone, stays = endpoint_record(1), endpoint_record(2)
        async with self.cluster() as connect, connect() as worker, connect() as client:
            await worker.register(gone)
            await worker.register(stays)
            assert await worker.unregister(gone.key) is True
            assert await worker.unregister(gone.key) is False
            assert await client.list(ENDPOINTS) == [stays]
            assert set(worker.owned()) == {stays.key}

    async def test_only_the_owner_can_unregister(self) -> None:
        record = endpoint_record(1)
        async with self.cluster() as connect, connect() as worker, connect() as other:
            await worker.register(record)
            assert await other.unregister(record.key) is False
            assert await other.list(ENDPOINTS) == [record]

    async def test_the_list_is_ordered_by_key(self) -> None:
        async with self.cluster() as connect, connect() as worker:
            for instance in (10, LARGEST_ID, 9, 2**63):
                await worker.register(endpoint_record(instance))
            assert [record.instance_id for record in await worker.list(ENDPOINTS)] == [9, 10, 2**63, LARGEST_ID]

    async def test_processes_have_different_ids(self) -> None:
        async with self.cluster() as connect, connect() as first, connect() as second:
            assert 0 <= first.instance_id <= LARGEST_ID
            assert 0 <= second.instance_id <= LARGEST_ID
            assert first.instance_id != second.instance_id

    async def test_status_and_last_seen(self) -> None:
        async with self.cluster() as connect, connect() as worker, connect() as client:
            await worker.register(endpoint_record(1))
            await worker.register(endpoint_record(1, "other.backend.generate"))
            assert worker.status.connected
            assert worker.status.backend
            for discovery in (worker, client):
                (seen,) = (await discovery.last_seen(Query(EndpointRecord.bucket, ("demo",)))).items()
                assert seen[0] == endpoint_record(1).key
                assert seen[1] > 0

    # queries

    async def test_queries_compare_whole_segments(self) -> None:
        paths = [
            "demo.backend.generate",
            "demo.backend.generate2",
            "demo.backend2.generate",
            "demo2.backend.generate",
            "demo.sub.backend.generate",
            "demo.sub.deep.backend.generate",
        ]
        expected: dict[tuple[str, ...], list[str]] = {
            (): paths,
            ("demo",): paths[:3],
            ("demo", "backend"): paths[:2],
            ("demo", "backend", "generate"): paths[:1],
            ("demo.sub",): paths[4:5],
            ("demo.sub", "backend", "generate"): paths[4:5],
            ("demo.sub.deep",): paths[5:],
            ("dem",): [],
            ("demo", "back"): [],
            ("demo", "backend", "gen"): [],
        }
        async with self.cluster() as connect, connect() as worker, connect() as client:
            for path in paths:
                await worker.register(endpoint_record(7, path))
            for segments, matching in expected.items():
                query = Query(EndpointRecord.bucket, segments)
                wanted = keys(endpoint_record(7, path) for path in matching)
                assert keys(await client.list(query)) == wanted, segments
                async with client.watch(query) as watch:
                    await anext(watch)
                    assert set(watch.current) == wanted, segments

    async def test_a_watch_is_told_of_its_own_segments_only(self) -> None:
        query = Query(EndpointRecord.bucket, ("demo", "backend", "generate"))
        async with self.cluster() as connect, connect() as worker, connect() as client:
            watch = client.watch(query)
            async with watch:
                assert await anext(watch) == []
                await worker.register(endpoint_record(1, "demo.backend.generate2"))
                await worker.register(model_record(1, "m"))
                await worker.unregister(endpoint_record(1, "demo.backend.generate2").key)
                await worker.register(endpoint_record(1))
                async with asyncio.timeout(10):
                    assert await anext(watch) == [Added(endpoint_record(1))]

    async def test_adapters_are_found_with_their_model(self) -> None:
        base, adapter = model_record(1, "m"), model_record(1, "my/Lora-A.1", lora="my_lora-a_1")
        other = model_record(1, "m", endpoint="generate2")
        async with self.cluster() as connect, connect() as worker, connect() as client:
            for record in (base, adapter, other):
                assert await worker.register(record)
            found = await client.list(Query(ModelRecord.bucket, ("demo", "backend", "generate")))
            assert found == [base, adapter]
            assert await worker.unregister(adapter.key)
            assert await client.list(MODELS) == [base, other]

    async def test_channels_of_a_namespace_have_an_empty_component(self) -> None:
        wide, narrow = channel_record(2**63, "kv_metrics"), channel_record(3, "kv-events", component="backend")
        async with self.cluster() as connect, connect() as worker, connect() as client:
            await worker.register(wide)
            await worker.register(narrow)
            assert await client.list(Query(EventChannelRecord.bucket, ("demo", ""))) == [wide]
            assert await client.list(Query(EventChannelRecord.bucket, ("demo", "backend", "kv-events"))) == [narrow]
            assert keys(await client.list(CHANNELS)) == {wide.key, narrow.key}

    async def test_names_may_contain_anything_but_a_slash(self) -> None:
        records = [
            EndpointRecord(
                namespace=name, component=name, endpoint=name, instance_id=n, transport=Transport(tcp="192.0.2.1:1/a/b")
            )
            for n, name in enumerate(["Ünï cödé", "100%", "a%2Fb", ".tmp_x", "日本", "_", "a b\tc"])
        ]
        async with self.cluster() as connect, connect() as worker, connect() as client:
            for record in records:
                await worker.register(record)
            assert keys(await client.list(ENDPOINTS)) == keys(records)

    # watching

    async def test_the_first_batch_is_what_is_there(self) -> None:
        async with self.cluster() as connect, connect() as worker, connect() as client:
            async with client.watch(ENDPOINTS) as empty, asyncio.timeout(10):
                assert await anext(empty) == []
            await worker.register(endpoint_record(1))
            await worker.register(endpoint_record(2))
            async with client.watch(ENDPOINTS) as watch, asyncio.timeout(10):
                batch = await anext(watch)
                assert batch == [Added(endpoint_record(1)), Added(endpoint_record(2))]
                assert watch.current == {record.key: record for record in (endpoint_record(1), endpoint_record(2))}

    async def test_changes_arrive(self) -> None:
        one, two = endpoint_record(1), endpoint_record(2)
        async with self.cluster() as connect, connect() as worker, connect() as client, client.watch(ENDPOINTS) as watch:
            async with asyncio.timeout(20):
                await anext(watch)
                await worker.register(one)
                assert await anext(watch) == [Added(one)]
                await worker.register(two)
                assert await anext(watch) == [Added(two)]
                await worker.unregister(one.key)
                assert await anext(watch) == [Removed(one.key)]
                assert watch.current == {two.key: two}

    async def test_everybody_sees_the_same(self) -> None:
        records = [endpoint_record(n) for n in (1, 2, 3)]
        async with self.cluster() as connect, connect() as a, connect() as b, connect() as c:
            owners = (a, b, c)
            async with a.watch(ENDPOINTS) as seen_a, b.watch(ENDPOINTS) as seen_b, c.watch(ENDPOINTS) as seen_c:
                for owner, record in zip(owners, records, strict=True):
                    await owner.register(record)
                for watch in (seen_a, seen_b, seen_c):
                    await until(watch, lambda watch=watch: set(watch.current) == keys(records))
                await b.unregister(records[1].key)
                for watch in (seen_a, seen_b, seen_c):
                    await until(watch, lambda watch=watch: set(watch.current) == keys([records[0], records[2]]))

    async def test_a_changed_record_is_an_added(self) -> None:
        before, after = endpoint_record(1), endpoint_record(1, tcp="192.0.2.9:1/a/generate")
        async with self.cluster() as connect, connect() as worker, connect() as client, client.watch(ENDPOINTS) as watch:
            await worker.register(before)
            await until(watch, lambda: watch.current == {before.key: before})
            await worker.unregister(before.key)
            await worker.register(after)
            assert await client.list(ENDPOINTS) == [after]  # both changes have arrived, the watch was not read between them
            async with asyncio.timeout(10):
                assert await anext(watch) == [Added(after)]
            assert watch.current == {after.key: after}

    async def test_removed_comes_before_added(self) -> None:
        async with self.cluster() as connect, connect() as worker, connect() as client, client.watch(ENDPOINTS) as watch:
            await worker.register(endpoint_record(1))
            await until(watch, lambda: len(watch.current) == 1)
            await worker.register(endpoint_record(2))
            await worker.unregister(endpoint_record(1).key)
            assert len(await client.list(ENDPOINTS)) == 1
            async with asyncio.timeout(10):
                assert await anext(watch) == [Removed(endpoint_record(1).key), Added(endpoint_record(2))]

    async def test_a_slow_watcher_gets_the_difference(self) -> None:
        async with self.cluster() as connect, connect() as worker, connect() as client, client.watch(ENDPOINTS) as watch:
            await worker.register(endpoint_record(1))
            await until(watch, lambda: len(watch.current) == 1)
            for _ in range(30):
                for instance in range(2, 6):
                    await worker.register(endpoint_record(instance))
                for instance in range(2, 6):
                    await worker.unregister(endpoint_record(instance).key)
                await client.list(ENDPOINTS)
                assert watch.pending == 0
            await worker.register(endpoint_record(6))
            await client.list(ENDPOINTS)
            async with asyncio.timeout(10):
                assert await anext(watch) == [Added(endpoint_record(6))]

    async def test_a_thousand_records(self) -> None:
        records = [endpoint_record(n) for n in range(1000)]
        async with self.cluster() as connect, connect() as worker, connect() as client, client.watch(ENDPOINTS) as watch:
            await asyncio.gather(*(worker.register(record) for record in records))
            await until(watch, lambda: len(watch.current) == 1000, within=30)
            assert keys(await client.list(ENDPOINTS)) == keys(records)
            await asyncio.gather(*(worker.unregister(record.key) for record in records[:990]))
            await until(watch, lambda: set(watch.current) == keys(records[990:]), within=30)

    async def test_watches_are_independent(self) -> None:
        async with self.cluster() as connect, connect() as worker, connect() as client, client.watch(ENDPOINTS) as slow:
            async with client.watch(ENDPOINTS) as quick:
                await worker.register(endpoint_record(1))
                await until(quick, lambda: len(quick.current) == 1)
            await worker.register(endpoint_record(2))
            await until(slow, lambda: len(slow.current) == 2)
            assert len(quick.current) == 1

    async def test_a_cancelled_read_loses_nothing(self) -> None:
        async with self.cluster() as connect, connect() as worker, connect() as client, client.watch(ENDPOINTS) as watch:
            await anext(watch)
            for _ in range(20):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.002):
                        await anext(watch)
            reader = asyncio.get_running_loop().create_task(self._next(watch))
            await asyncio.sleep(0)
            await worker.register(endpoint_record(1))
            reader.cancel()  # races with the arrival of the record
            with contextlib.suppress(asyncio.CancelledError):
                await reader
            await until(watch, lambda: set(watch.current) == {endpoint_record(1).key})

    @staticmethod
    async def _next(watch: Watch) -> None:
        await anext(watch)

    async def test_a_watch_cancelled_while_opening_leaves_nothing(self) -> None:
        async with self.cluster() as connect, connect() as worker, connect() as client:

            async def read() -> None:
                async with client.watch(ENDPOINTS) as watch:
                    async for _ in watch:
                        pass

            for _ in range(20):
                reader = asyncio.get_running_loop().create_task(read())
                await asyncio.sleep(0)
                reader.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reader
            async with client.watch(ENDPOINTS) as watch:
                await worker.register(endpoint_record(1))
                await until(watch, lambda: len(watch.current) == 1)

    async def test_misuse_of_a_watch_is_an_error(self) -> None:
        async with self.cluster() as connect, connect() as client:
            with pytest.raises(UsageError, match="async with"):
                await anext(client.watch(ENDPOINTS))
            async with client.watch(ENDPOINTS) as watch:
                await anext(watch)
                reader = asyncio.get_running_loop().create_task(self._next(watch))
                await asyncio.sleep(0)
                with pytest.raises(UsageError, match="one reader"):
                    await anext(watch)
                reader.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reader
            with pytest.raises(UsageError, match="once"):
                await watch.__aenter__()

    # closing

    async def test_closing_removes_what_is_owned(self) -> None:
        async with self.cluster() as connect, connect() as client, client.watch(ENDPOINTS) as watch, connect() as stays:
            await stays.register(endpoint_record(9))
            async with connect() as worker:
                for instance in range(5):
                    await worker.register(endpoint_record(instance))
                await worker.register(model_record(1, "m"))
                await until(watch, lambda: len(watch.current) == 6)
            assert dict(worker.owned()) == {}
            assert await client.list(ENDPOINTS) == [endpoint_record(9)]
            assert await client.list(MODELS) == []
            await until(watch, lambda: set(watch.current) == {endpoint_record(9).key})

    async def test_closing_ends_the_watches(self) -> None:
        async with self.cluster() as connect, connect() as worker, connect() as client:
            await worker.register(endpoint_record(1))
            batches = 0
            async with client.watch(ENDPOINTS) as watch, asyncio.timeout(10):
                async for _ in watch:
                    batches += 1
                    await client.aclose()
            assert batches == 1
            async with worker.watch(ENDPOINTS) as alive, asyncio.timeout(10):
                assert len(await anext(alive)) == 1

    async def test_a_watch_opened_while_closing_ends(self) -> None:
        async def read(watch: Watch) -> None:
            with contextlib.suppress(UsageError):
                async with watch:
                    async for _ in watch:
                        pass

        async with self.cluster() as connect, connect() as client:
            readers = [asyncio.get_running_loop().create_task(read(client.watch(ENDPOINTS))) for _ in range(3)]
            await asyncio.sleep(0)
            await client.aclose()
            async with asyncio.timeout(10):
                await asyncio.gather(*readers)

    async def test_closing_twice_is_harmless_and_use_afterwards_an_error(self) -> None:
        async with self.cluster() as connect:
            async with connect() as discovery:
                await discovery.register(endpoint_record(1))
                await asyncio.gather(discovery.aclose(), discovery.aclose())
                await discovery.aclose()
                for use in (
                    lambda: discovery.register(endpoint_record(2)),
                    lambda: discovery.unregister(endpoint_record(1).key),
                    lambda: discovery.list(ENDPOINTS),
                    lambda: discovery.last_seen(ENDPOINTS),
                    lambda: discovery.watch(ENDPOINTS).__aenter__(),
                    lambda: discovery.__aenter__(),
                ):
                    with pytest.raises(UsageError):
                        await use()
            async with connect() as witness:
                assert await witness.list(ENDPOINTS) == []

    async def test_a_cancelled_registration_goes_with_its_owner(self) -> None:
        async with self.cluster() as connect, connect() as client:
            async with connect() as worker:
                for instance in range(20):
                    task = asyncio.get_running_loop().create_task(worker.register(endpoint_record(instance)))
                    await asyncio.sleep(0)
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
                assert keys(await worker.list(ENDPOINTS)) == set(worker.owned())
                for key in list(worker.owned())[:5]:
                    assert await worker.unregister(key) is True
            assert await client.list(ENDPOINTS) == []

    # one model per endpoint

    async def test_a_second_model_on_an_endpoint_is_refused(self) -> None:
        async with self.cluster() as connect, connect() as first, connect() as second:
            assert await first.register(model_record(1, "m1"))
            with pytest.raises(UsageError, match=r"'m2' on endpoint demo\.backend\.generate: a different model 'm1'"):
                await second.register(model_record(2, "m2"))
            with pytest.raises(UsageError, match="a different model 'm1'"):
                await first.register(model_record(1, "m2"))
            assert dict(second.owned()) == {}
            assert await second.list(MODELS) == [model_record(1, "m1")]
            assert await second.register(model_record(2, "m1"))
            assert await second.register(model_record(2, "m2", endpoint="generate2"))
            await first.aclose()
            await second.unregister(model_record(2, "m1").key)
            assert await second.register(model_record(2, "m2"))

    async def test_adapters_are_compared_by_their_base_model(self) -> None:
        async with self.cluster() as connect, connect() as first, connect() as second:
            assert await first.register(model_record(1, "m1"))
            assert await second.register(model_record(2, "adapter", lora="adapter"))
            with pytest.raises(UsageError, match=r"'/models/other' on endpoint .* '/models/tiny'"):
                await second.register(model_record(2, "wrong", source="/models/other", lora="wrong"))

    async def test_of_two_different_models_at_once_at_most_one_is_registered(self) -> None:
        async with self.cluster() as connect, connect() as first, connect() as second:
            for _ in range(10):
                results = await asyncio.gather(
                    first.register(model_record(1, "m1")), second.register(model_record(2, "m2")), return_exceptions=True
                )
                assert any(isinstance(result, UsageError) for result in results)
                assert len(await first.list(MODELS)) == sum(result is True for result in results)
                await first.unregister(model_record(1, "m1").key)
                await second.unregister(model_record(2, "m2").key)


class StoredDiscoverySuite(DiscoverySuite):
    """More cases for backends that store bytes which other programs write, too."""

    @abstractmethod
    async def plant(self, key: RecordKey, data: bytes) -> None:
        """Write `data` under `key` of the current cluster, as a foreign process does; overwrites."""

    async def test_foreign_records_are_read(self) -> None:
        data = (
            b'{"type":"Endpoint","component":"backend","endpoint":"generate","namespace":"demo","instance_id":12803683045594844867,'
            b'"transport":{"tcp":"10.0.0.5:40953/b1af7f6f1f1c8ec3/generate"},"device_type":null,"news":[1,{"a":2}]}'
        )
        expected = endpoint_record(12803683045594844867, tcp="10.0.0.5:40953/b1af7f6f1f1c8ec3/generate")
        async with self.cluster() as connect, connect() as client, client.watch(ENDPOINTS) as watch:
            await self.plant(expected.key, data)
            await until(watch, lambda: len(watch.current) == 1)
            assert watch.current == {expected.key: expected}

    async def test_an_overwritten_record_is_an_added(self) -> None:
        before, after = endpoint_record(1), endpoint_record(1, tcp="192.0.2.9:1/a/generate")
        async with self.cluster() as connect, connect() as client, client.watch(ENDPOINTS) as watch:
            await self.plant(before.key, encode_record(before))
            await until(watch, lambda: watch.current == {before.key: before})
            await self.plant(after.key, encode_record(after))
            async with asyncio.timeout(10):
                assert await anext(watch) == [Added(after)]

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"{",
            b"null",
            b"\xff\xfe",
            b'{"type":"Nonsense"}',
            b'{"type":"Endpoint","component":"backend"}',
            encode_record(endpoint_record(3)),  # belongs under another key
            encode_record(model_record(2, "m")),  # belongs into another bucket
            encode_record(endpoint_record(2)).replace(b":2,", b":18446744073709551616,"),
            encode_record(endpoint_record(2))[:-1] + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        ],
        ids=[
            "empty",
            "cut",
            "null",
            "not-utf8",
            "unknown-type",
            "missing-fields",
            "other-key",
            "other-bucket",
            "id-too-large",
            "too-deep",
        ],
    )
    async def test_a_bad_record_disturbs_nobody(self, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
        good, bad = endpoint_record(1), endpoint_record(2)
        async with self.cluster() as connect, connect() as worker, connect() as client, client.watch(ENDPOINTS) as watch:
            await self.plant(bad.key, data)
            await worker.register(good)
            await until(watch, lambda: watch.current == {good.key: good})
            assert await client.list(ENDPOINTS) == [good]
            await silence(watch)
            deadline = asyncio.get_running_loop().time() + 10
            while not any("ignored" in record.message for record in caplog.records):
                assert asyncio.get_running_loop().time() < deadline, "nobody was warned"
                await asyncio.sleep(0.02)
            await self.plant(bad.key, encode_record(bad))
            await until(watch, lambda: set(watch.current) == {good.key, bad.key})
