"""The reference 1.3.1 and Stator over NATS, both ways, discovery in files and in etcd (`spec/10 §6`)."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, ClassVar

import nats
import pytest

from interop.exchanges import Exchanges, Place, count, refusals_of_one_that_left
from interop.peers import Peer, discovery_root, needs_reference
from stator.errors import UsageError
from stator.runtime import Runtime
from stator.runtime.plugins import load_plugin
from stator.testing.nats_server import NatsServer, nats_server
from stator.testing.plane_suite import eventually

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]


class TestEtcdAndNats(Exchanges):
    over_nats: ClassVar[bool] = True
    over_etcd: ClassVar[bool] = True


class TestNatsExchanges(Exchanges):
    over_nats: ClassVar[bool] = True

    # -- what only NATS has

    async def test_what_is_too_large_is_refused_before_it_is_sent(self, place: Place, worker: Peer) -> None:
        async with place.calling("generate") as client:
            with pytest.raises(UsageError, match="max_payload"):
                await client.generate({"mode": "echo", "value": "x" * 9_000_000}).collect()

    async def test_both_are_services_of_one_kind(self, place: Place, worker: Peer) -> None:
        assert place.nats is not None
        asking: Any = await nats.connect(place.nats.url)
        try:
            async with place.working(count) as ours:
                own: dict[str, Any] = {}
                while not own:  # the server may hear of us after it hears the question
                    answers = await everybody(asking, "$SRV.INFO.demo_backend")
                    own = next((each for each in answers if each["version"] != "1.3.1"), {})
                theirs = next(each for each in answers if "demo_backend-generate-" in str(each["endpoints"]))
                assert own.keys() == theirs.keys()
                assert own["description"] == theirs["description"]
                assert (own["type"], own["metadata"]) == (theirs["type"], theirs["metadata"])
                (endpoint,) = own["endpoints"]
                names = {each["name"].rpartition("-")[0]: each for each in theirs["endpoints"]}
                assert endpoint.keys() == names["demo_backend-generate"].keys()
                assert endpoint["name"].startswith(f"demo_backend-{ours.endpoint.rpartition('.')[2]}-")
                assert endpoint["queue_group"] == names["demo_backend-generate"]["queue_group"]
                counts = {each["id"]: each for each in await everybody(asking, "$SRV.STATS.demo_backend")}
                own, theirs = counts[own["id"]], counts[theirs["id"]]
                assert own.keys() == theirs.keys()
                assert {**own["endpoints"][0], "data": None}.keys() == {**theirs["endpoints"][0], "data": None}.keys()
        finally:
            await asking.close()

    async def test_an_endpoint_that_left_is_not_waited_for(self, place: Place, client: Peer) -> None:
        draining, gone = await refusals_of_one_that_left(place, client)
        assert "Unavailable: Server unavailable" in draining
        assert "CannotConnect" in gone, gone

    async def test_its_worker_goes_on_after_nats_was_away(self, place: Place, worker: Peer) -> None:
        assert place.nats is not None
        async with place.calling("generate") as client:
            await asyncio.to_thread(place.nats.stop)
            await asyncio.to_thread(place.nats.start)
            recovered = asyncio.Event()

            async def until_answered() -> None:
                while not recovered.is_set():
                    try:
                        assert await client.generate({"mode": "count", "n": 1}).collect()
                        recovered.set()
                    except Exception:
                        await asyncio.sleep(0.05)

            trying = asyncio.get_running_loop().create_task(until_answered())
            await eventually(recovered.is_set, within=20, what="the reference's worker is back")
            await trying


async def everybody(client: Any, subject: str) -> list[dict[str, Any]]:
    """All answers to a question."""
    inbox = client.new_inbox()
    heard = await client.subscribe(inbox)
    await client.publish(subject, b"", reply=inbox)
    answers: list[dict[str, Any]] = []
    try:
        while True:
            answers.append(json.loads((await heard.next_msg(1.0)).data))
    except nats.errors.TimeoutError:
        return answers


@pytest.fixture
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[NatsServer, dict[str, Any]]]:
    """A server, and the settings of runtimes of ours that meet there."""
    load_plugin("stator.transports", "native")
    root = str(discovery_root(tmp_path_factory))
    with nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server, {"discovery": "file", "file__root": root, "nats__servers": (server.url,)}


async def test_the_native_plane_comes_first_between_our_processes(ours: tuple[NatsServer, dict[str, Any]]) -> None:
    """A worker that takes requests by NATS is still reached directly by who can."""
    server, common = ours
    async with (
        Runtime.connect(request_plane="nats", **common) as there,
        Runtime.connect(**common) as here,
        there.endpoint("demo.backend.generate").serving(count),
    ):
        client = await here.endpoint("demo.backend.generate").client()
        await client.wait_for_instances()
        await asyncio.to_thread(server.stop)
        assert len(await client.generate({"n": 3}).collect()) == 3
