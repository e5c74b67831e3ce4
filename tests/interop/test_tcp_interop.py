"""The reference 1.3.1 and Stator over TCP, both ways, discovery in files (`spec/10 §1`)."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from interop.exchanges import (
    VALUES,
    Exchanges,
    Place,
    count,
    counted,
    digest,
    journal,
    killed_in_mid_stream,
    refusals_of_one_that_left,
)
from interop.peers import Peer, needs_reference
from stator.errors import ConnectFailed, Disconnected, StatorError
from stator.protocol.envelope import RequestEnvelope
from stator.runtime import Context, Runtime
from stator.transports.inbox import Inbox, Patience, PhaseLimits

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]


class TestTcp(Exchanges):
    # -- its worker, our client

    @pytest.mark.parametrize("codec", ["json", "msgpack"])
    async def test_three_megabytes_there_and_back(self, place: Place, worker: Peer, codec: str) -> None:
        async with place.calling("generate", tcp__codec=codec) as client:
            value = "x" * 3_000_000
            assert await client.generate({"mode": "echo", "value": value}).collect() == [value]

    async def test_its_item_that_cannot_be_sent(self, place: Place, worker: Peer) -> None:
        """It cuts the connection, sometimes before the items that were fine have left."""
        async with place.calling("generate") as client:
            got: list[Any] = []
            with pytest.raises(Disconnected):
                async for batch in client.generate({"mode": "unsendable"}, retry="never").batches():
                    got.extend(batch)
            assert got in ([], [1])

    async def test_its_handler_that_does_not_start_is_no_connection(self, place: Place, worker: Peer) -> None:
        async with place.calling("broken") as client:
            with pytest.raises(ConnectFailed, match="not today") as caught:
                await client.generate({}, retry="never").collect()
            assert caught.value.phase == "prologue"

    @pytest.mark.parametrize("first", [0, 1])
    async def test_stopping_it_early(self, place: Place, worker: Peer, first: int) -> None:
        async with place.calling("generate") as client:
            got = 0
            async with client.generate({"mode": "until stopped"}, id=f"stopped after {first}") as stream:
                if not first:
                    stream.stop()
                async for _ in stream:
                    got += 1
                    if got == first:
                        stream.stop()
            assert got >= first
            noted = await journal(client, f"stopped after {first}")
            assert (noted["stopped"], noted["killed"]) == (True, False)

    async def test_our_trace_goes_on_there(self, tmp_path: Path) -> None:
        place = Place(root=tmp_path, python=self.reference, nats=None, etcd=None)
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        with place.peer("peer_worker.py", DYN_LOGGING_JSONL="1", DYN_LOG="info"):
            await asyncio.to_thread(place.wait_for, "generate")
            async with place.calling("generate") as client:
                metadata, headers = {"tenant": "t1", "ü": "ö"}, {"traceparent": trace}
                (facts,) = await client.generate({"mode": "facts"}, id="id-1", metadata=metadata, headers=headers).collect()
        assert facts == {
            "id": "id-1",
            "metadata": metadata,
            "trace_id": "0af7651916cd43dd8448eb211c80319c",
            "parent_span_id": "b7ad6b7169203331",
        }

    async def test_an_endpoint_it_does_not_know(self, place: Place, worker: Peer) -> None:
        async with place.calling("generate") as client:
            (record,) = client.instances()
            moved = msgspec.structs.replace(
                record, transport=msgspec.structs.replace(record.transport, tcp=f"{record.transport.tcp}-gone")
            )
            services: Any = client._services  # pyright: ignore[reportPrivateUsage]
            inbox = Inbox(wheel=services.wheel, patience=Patience(PhaseLimits()), instance=record.instance_id)
            await services.network.open(moved, RequestEnvelope(id="nowhere", payload=b"{}"), inbox)
            with pytest.raises(StatorError, match="Unknown endpoint") as caught:
                await inbox.more()
            assert caught.value.retryable

    async def test_a_request_larger_than_it_takes(self, place: Place, worker: Peer) -> None:
        async with place.calling("generate", tcp__max_message_size=50_000_000) as client:
            with pytest.raises(StatorError) as caught:
                await client.generate({"mode": "echo", "value": "x" * 40_000_000}, retry="never").collect()
            assert caught.value.phase == "accept"
            assert await client.generate({"mode": "count", "n": 1}).collect() == counted(1)

    async def test_it_is_killed_in_mid_stream(self, tmp_path: Path) -> None:
        await killed_in_mid_stream(Place(root=tmp_path, python=self.reference, nats=None, etcd=None))

    # -- its client, our worker

    async def test_a_request_to_us_and_an_item_of_ten_megabytes(self, place: Place, client: Peer) -> None:
        async def echo(request: Any, context: Context) -> AsyncIterator[Any]:
            yield request["text"]

        text = "abcdefghij" * 1_000_000
        async with place.working(echo) as ours:
            answer = await client.ask(endpoint=ours.endpoint, request={"text": text})
            assert answer["error"] is None
            assert answer["items"] == digest([text])

    async def test_our_values_in_messagepack(self, place: Place) -> None:
        async def echo(request: Any, context: Context) -> AsyncIterator[Any]:
            yield request
            for value in request["values"][1:]:
                yield value
            yield {"nan": float("nan")}

        with place.peer("peer_client.py", DYN_REQUEST_PLANE_CODEC="msgpack") as client:
            async with place.working(echo) as ours:
                answer = await client.ask(endpoint=ours.endpoint, request={"values": VALUES})
        assert answer["error"] is None
        assert answer["items"] == [{"values": VALUES}, *VALUES[1:], {"nan": None}]

    async def test_our_handler_that_does_not_start(self, place: Place, client: Peer) -> None:
        class Refuses:
            def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
                raise TypeError("no model")

        endpoint = "demo.backend.refuses"
        async with Runtime.connect(**place.settings) as runtime, runtime.endpoint(endpoint).serving(Refuses()):
            answer = await client.ask(endpoint=endpoint, request={})
            assert "CannotConnect" in answer["error"]
            assert "Generate Error: TypeError: no model" in answer["error"]

    async def test_its_trace_goes_on_here_if_it_has_one(self, place: Place, client: Peer) -> None:
        async with place.working(count) as ours:
            with place.peer("peer_client.py", DYN_LOGGING_JSONL="1", DYN_LOG="info") as tracing:
                answer = await tracing.ask(endpoint=ours.endpoint, request={"n": 1})
            assert answer["error"] is None
            await client.ask(endpoint=ours.endpoint, request={"n": 1})
            traced, plain = ours.contexts
            version, trace, span, flags = traced.headers["traceparent"].split("-")
            assert (version, len(trace), len(span), len(flags)) == ("00", 32, 16, 2)
            assert "traceparent" not in plain.headers

    async def test_our_worker_is_killed_in_mid_stream(self, place: Place, client: Peer) -> None:
        endpoint = "demo.backend.killed"
        script = Path(__file__).with_name("stator_worker.py")
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(script), str(place.root), endpoint, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        try:
            warm = await client.ask(endpoint=endpoint, request={}, take=1, then="stop")
            assert warm["error"] is None
            answer = client.ask_soon(endpoint=endpoint, request={}, id="killed")
            async with asyncio.timeout(20):
                while await process.stdout.readline() != b"killed\n":
                    pass
            process.kill()
            got = await asyncio.to_thread(answer.get, True, 15)
            assert "Disconnected: Stream ended before generation completed" in got["error"]
            assert got["items"]
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    async def test_an_endpoint_that_left_is_not_waited_for(self, place: Place, client: Peer) -> None:
        draining, gone = await refusals_of_one_that_left(place, client)
        assert "Unavailable" in draining
        assert "CannotConnect" in gone and "no endpoint is served" in gone, gone
