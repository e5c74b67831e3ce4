"""The compatible plane over NATS keeps the meaning of a request, over a real server; and what is on the wire."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import nats
import pytest
from nats.aio.msg import Msg

from stator.errors import ConnectFailed, Disconnected, Overloaded, StatorError, Timeout, Unavailable, UsageError
from stator.protocol.control_message import decode_control_message, read_call_home
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.ids import endpoint_path
from stator.protocol.records import EndpointRecord, Transport
from stator.protocol.two_part import decode_message, encode_frame
from stator.runtime.admission import Admission, AdmissionConfig
from stator.runtime.context import Context
from stator.runtime.serving import Serving
from stator.security import Tls
from stator.tasks import DeadlineWheel, SystemClock
from stator.testing.certificates import Authority, tls_of
from stator.testing.conversation_suite import ConversationSuite
from stator.testing.nats_server import NatsServer as ServerProcess
from stator.testing.nats_server import nats_server
from stator.testing.plane_suite import INSTANCE, PlanePair, PlaneSuite, count, drain, eventually
from stator.transports.inbox import Inbox, Patience, PhaseLimits
from stator.transports.nats import NatsConfig
from stator.transports.nats.client import NatsClient
from stator.transports.nats.server import NatsServer
from stator.transports.plane import InstanceObserver, PlaneHost

pytestmark = pytest.mark.timeout(60)

SUBJECT = f"test_backend.generate-{INSTANCE:x}"
PATH = endpoint_path(INSTANCE, "generate")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with nats_server(tmp_path_factory.mktemp("nats")) as running:
        yield running


def plane_host(*, observer: InstanceObserver | None = None, tls: Tls | None = None, **overrides: Any) -> PlaneHost:
    return PlaneHost(
        process="a" * 32,
        bind_host="127.0.0.1",
        advertise_host="127.0.0.1",
        socket_directory=None,
        wheel=DeadlineWheel(asyncio.get_running_loop(), resolution=0.02),
        clock=SystemClock(),
        random=Random(1),
        observer=observer,
        tls=tls,
        overrides={"tcp.linger": 1.0, **overrides},
    )


def config(server: ServerProcess, **settings: Any) -> NatsConfig:
    return NatsConfig(servers=(server.url,), **{"reconnect_first": 0.02, "reconnect_most": 0.1, **settings})


@asynccontextmanager
async def connected(config: NatsConfig, **overrides: Any) -> AsyncGenerator[PlanePair, None]:
    """Both ends of the plane; closing them must leave no deadline."""
    here, there = plane_host(**overrides), plane_host(**overrides)
    worker = await NatsServer.listen(config, here, version="0.0.1")
    try:
        caller = await NatsClient.start(config, there)
        try:
            yield PlanePair(
                server=worker, client=caller, cut=caller.cut, open_streams=lambda: worker.open_streams + caller.open_streams
            )
        finally:
            await caller.aclose()
    finally:
        await worker.aclose()
    assert len(here.wheel) == len(there.wheel) == 0


class TestNatsPlane(PlaneSuite):
    max_buffered = 20_000  # the kernel's buffers on loopback
    codec = "json"

    @pytest.fixture(autouse=True)
    def _server(self, server: ServerProcess) -> None:
        self.server = server

    def pair(self) -> AbstractAsyncContextManager[PlanePair]:
        return connected(config(self.server), **{"tcp.codec": self.codec})


class TestNatsPlaneMsgpack(TestNatsPlane):
    codec = "msgpack"


class TestNatsConversations(ConversationSuite):
    max_buffered = 20_000

    @pytest.fixture(autouse=True)
    def _server(self, server: ServerProcess) -> None:
        self.server = server

    def pair(self) -> AbstractAsyncContextManager[PlanePair]:
        return connected(config(self.server))


# -- one side of the plane, and a plain NATS client in place of the other


@asynccontextmanager
async def plain_client(server: ServerProcess) -> AsyncGenerator[Any, None]:
    client: Any = await nats.connect(server.url)
    try:
        yield client
    finally:
        await client.close()


async def told(client: Any) -> None:
    """Wait until the server has what a plain client sent. Its first question overtakes that."""
    for _ in range(2):
        await client.flush()


@asynccontextmanager
async def calling(server: ServerProcess, *, tls: Tls | None = None, **settings: Any) -> AsyncGenerator[NatsClient, None]:
    host = plane_host(tls=tls)
    client = await NatsClient.start(config(server, **settings), host)
    try:
        yield client
    finally:
        await client.aclose()
    assert len(host.wheel) == 0


@asynccontextmanager
async def working(
    server: ServerProcess, handler: Any = count, admission: Admission | None = None, tls: Tls | None = None
) -> AsyncGenerator[Any, None]:
    worker = await NatsServer.listen(config(server), plane_host(tls=tls), version="0.0.1")
    serving = Serving(handler, name="test.backend.generate", admission=admission)
    worker.register(PATH, serving)
    worker.describe(record(), PATH)
    await worker.connection.settled()
    try:
        yield worker
    finally:
        await worker.aclose()
        await serving.aclose()


def record(subject: str = SUBJECT) -> EndpointRecord:
    return EndpointRecord(
        component="backend",
        endpoint="generate",
        namespace="test",
        instance_id=INSTANCE,
        transport=Transport(nats_tcp=subject),
    )


async def ask(client: NatsClient, *, id: str = "r", subject: str = SUBJECT, request: Any = None, **limits: float) -> Inbox:
    wheel = DeadlineWheel(asyncio.get_running_loop(), resolution=0.02)
    inbox = Inbox(wheel=wheel, patience=Patience(PhaseLimits(**limits)), instance=INSTANCE)
    envelope = RequestEnvelope(id=id, payload=msgspec.json.encode(request), headers={"traceparent": "00-a-b-01"})
    try:
        await client.open(record(subject), envelope, inbox)
    except StatorError as error:
        inbox.finish(error)
        raise
    return inbox


async def refusal(inbox: Inbox) -> StatorError:
    with pytest.raises(StatorError) as caught:
        await drain(inbox)
    return caught.value


async def test_what_a_request_looks_like(server: ServerProcess) -> None:
    async with plain_client(server) as worker, calling(server) as client:
        heard = await worker.subscribe(SUBJECT, queue="q")
        await told(worker)
        inbox = await ask(client, id="req\r\n1", request={"n": 2})
        message: Msg = await heard.next_msg(5)
        assert message.headers is not None
        assert list(message.headers) == ["request-id", "x-frontend-send-ts-ns", "traceparent"]
        assert (message.headers["request-id"], message.headers["traceparent"]) == ("req  1", "00-a-b-01")
        assert message.reply.startswith("_INBOX.")
        header, data = decode_message(message.data)
        assert data == b'{"n":2}'
        assert decode_control_message(header).id == "req\r\n1"
        assert read_call_home(header).address == client.call_home_address
        await message.respond(b"")
        await eventually(lambda: inbox.phase.label == "call home", what="the acknowledgement came")
        inbox.kill()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"Server overloaded: worker at capacity", Overloaded),
        (b"Server unavailable: worker is shutting down", Unavailable),
        (b"whatever", ConnectFailed),
    ],
)
async def test_acknowledgements_that_say_no(server: ServerProcess, text: bytes, kind: type[StatorError]) -> None:
    async with plain_client(server) as worker, calling(server) as client:

        async def refuse(message: Msg) -> None:
            await message.respond(text)

        await worker.subscribe(SUBJECT, cb=refuse)
        await told(worker)
        error = await refusal(await ask(client))
        assert type(error) is kind
        assert (error.phase, error.instance, error.retryable) == ("accept", INSTANCE, True)
        assert client.open_streams == 0


async def test_an_acknowledgement_that_does_not_come(server: ServerProcess) -> None:
    async with plain_client(server) as worker, calling(server, request_timeout=0.2) as client:
        await worker.subscribe(SUBJECT)
        await told(worker)
        error = await refusal(await ask(client))
        assert isinstance(error, Timeout)
        assert (error.phase, error.message) == ("accept", "no acknowledgement within 0.2 s")
        assert client.open_streams == 0


async def test_nobody_listens(server: ServerProcess) -> None:
    """A subject that is new gets a third of a second, or a little more when we are new ourselves; one that was answered before none."""
    async with plain_client(server) as worker, calling(server) as client:

        async def take(message: Msg) -> None:
            await message.respond(b"")

        loop = asyncio.get_running_loop()
        began = loop.time()
        error = await refusal(await ask(client))
        assert type(error) is ConnectFailed
        assert SUBJECT in error.message
        assert 1.2 < loop.time() - began < 4
        began = loop.time()
        await asyncio.sleep(1.0)  # the time that workers have to be back after we have connected
        assert type(await refusal(await ask(client))) is ConnectFailed
        assert 1.3 < loop.time() - began < 2.2
        subscription = await worker.subscribe(SUBJECT, cb=take)
        await told(worker)
        inbox = await ask(client)
        await eventually(lambda: inbox.phase.label == "call home", what="the acknowledgement came")
        inbox.kill()
        await subscription.unsubscribe()
        await told(worker)
        began = loop.time()
        assert type(await refusal(await ask(client))) is ConnectFailed
        assert loop.time() - began < 0.2


async def test_a_worker_that_is_about_to_listen_is_waited_for(server: ServerProcess) -> None:
    async with plain_client(server) as worker, calling(server) as client:
        inbox = await ask(client)
        await asyncio.sleep(0.05)  # so much too late
        heard = await worker.subscribe(SUBJECT)
        message = await heard.next_msg(5)
        await message.respond(b"")
        await eventually(lambda: inbox.phase.label == "call home", what="the acknowledgement came")
        assert heard.delivered == 1
        inbox.kill()


async def test_more_than_the_server_takes_is_the_callers_mistake(server: ServerProcess) -> None:
    async with plain_client(server) as worker, calling(server) as client:
        heard = await worker.subscribe(SUBJECT)
        await told(worker)
        with pytest.raises(UsageError, match=r"too large for this deployment: \d+ bytes.*max_payload"):
            await ask(client, request="x" * client.connection.max_payload)
        assert client.open_streams == 0
        overhead = 1000
        fits = await ask(client, request="x" * (client.connection.max_payload - overhead))
        message = await heard.next_msg(5)
        assert len(message.data) > client.connection.max_payload - overhead
        fits.kill()


async def test_too_many_without_acknowledgement(server: ServerProcess) -> None:
    async with plain_client(server) as worker, calling(server, unacknowledged=3) as client:
        await worker.subscribe(SUBJECT)
        await told(worker)
        waiting = [await ask(client, id=str(number)) for number in range(3)]
        with pytest.raises(Overloaded):
            await ask(client)
        for inbox in waiting:
            inbox.kill()


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB b 0\r\n\r\n", "a.*", "a.>", "x" * 5000])
async def test_records_that_name_no_subject(server: ServerProcess, subject: str) -> None:
    async with calling(server) as client:
        with pytest.raises(ConnectFailed, match="is no NATS subject") as caught:
            await ask(client, subject=subject)
        assert caught.value.phase == "connect"
        assert client.connection.connected


async def test_answers_of_strangers_are_ignored(server: ServerProcess) -> None:
    async with plain_client(server) as worker, calling(server) as client:
        heard = await worker.subscribe(SUBJECT)
        await told(worker)
        inbox = await ask(client)
        message = await heard.next_msg(5)
        await worker.publish(message.reply + "0", b"Server overloaded: not yours")
        await worker.publish(message.reply.rpartition(".")[0] + ".zzz", b"")
        await message.respond(b"")
        await message.respond(b"Server overloaded: too late")
        await eventually(lambda: inbox.phase.label == "call home", what="the acknowledgement came")
        await told(worker)
        assert not inbox.ended
        inbox.kill()


# -- the worker


class Home:
    """Where a worker calls."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[bytes] = asyncio.Queue()
        self.address = ""

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen = b""
        while b'"sentinel"' not in seen and (more := await reader.read(65536)):
            seen += more
        self.received.put_nowait(seen)
        writer.transport.abort()


@asynccontextmanager
async def home() -> AsyncGenerator[Home, None]:
    found = Home()
    listener = await asyncio.start_server(found.take, "127.0.0.1", 0)
    found.address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield found
    finally:
        listener.close()
        await listener.wait_closed()


def request(home: Home, body: bytes = b'{"n":2}', **fields: Any) -> bytes:
    info = {"address": home.address, "subject": "s", "context": "c", "stream_type": "response"}
    message = {
        "id": "c",
        "request_type": "single_in",
        "response_type": "many_out",
        "connection_info": {"transport": "tcp_server", "info": json.dumps(info)},
        **fields,
    }
    return encode_frame(json.dumps(message).encode(), body)


async def test_a_request_without_headers_is_answered(server: ServerProcess) -> None:
    async with plain_client(server) as client, working(server), home() as caller:
        acknowledgement = await client.request(SUBJECT, request(caller), timeout=5)
        assert acknowledgement.data == b""
        answer = await asyncio.wait_for(caller.received.get(), 5)
        assert b'{"subject":"s","stream_type":"response"}' in answer
        assert answer.count(b'"complete_final":false') == 2
        assert b'{"complete_final":true}' in answer


@pytest.mark.parametrize("garbage", [b"", b"x", bytes(24), encode_frame(b"{}", b"1"), b"\xff" * 1000])
async def test_garbage_is_acknowledged_and_harms_nobody(server: ServerProcess, garbage: bytes) -> None:
    async with plain_client(server) as client, working(server) as worker, home() as caller:
        assert (await client.request(SUBJECT, garbage, timeout=5)).data == b""
        await client.publish(SUBJECT, garbage)  # nobody waits for the acknowledgement
        await client.request(SUBJECT, request(caller), timeout=5)
        assert b'"complete_final":true' in await asyncio.wait_for(caller.received.get(), 5)
        assert worker.connection.connected


async def test_what_cannot_be_served_is_said_at_home(server: ServerProcess) -> None:
    async with plain_client(server) as client, working(server), home() as caller:
        assert (await client.request(SUBJECT, request(caller, payload_codec="xml"), timeout=5)).data == b""
        assert b"xml" in await asyncio.wait_for(caller.received.get(), 5)


async def test_a_worker_at_capacity_says_so(server: ServerProcess) -> None:
    async def hold(request: Any, context: Context) -> AsyncIterator[Any]:
        await context.stopped()
        yield 1

    admission = Admission(AdmissionConfig(slots=1, queue=1))
    async with plain_client(server) as client, working(server, hold, admission), home() as caller:
        texts = [(await client.request(SUBJECT, request(caller), timeout=5)).data for _ in range(5)]
        assert texts[:2] == [b"", b""]
        assert all(text.startswith(b"Server overloaded:") for text in texts[2:])


async def test_a_draining_worker_leaves_its_subjects(server: ServerProcess) -> None:
    async with plain_client(server) as client, working(server) as worker, home() as caller:
        worker.drain()
        await worker.connection.settled()
        with pytest.raises(nats.errors.NoRespondersError):
            await client.request(SUBJECT, request(caller), timeout=5)


async def test_a_request_on_its_way_when_the_endpoint_leaves_is_refused(server: ServerProcess) -> None:
    async with plain_client(server) as client, working(server) as worker, home() as caller:
        await client.publish(SUBJECT, request(caller), reply="nowhere.to.go")
        await told(client)
        worker.unregister(PATH)  # the request has reached the server, and perhaps us
        assert await asyncio.wait_for(caller.received.get(), 5)


@pytest.mark.parametrize("namespace", ["with blank", "star*", "a>", "x" * 2000])
async def test_names_that_make_no_subject(server: ServerProcess, namespace: str) -> None:
    async with working(server) as worker:
        with pytest.raises(UsageError, match="cannot be served over NATS"):
            worker.describe(msgspec.structs.replace(record(), namespace=namespace), "1/x")


async def test_the_queue_group_gives_each_request_to_one(server: ServerProcess) -> None:
    async with plain_client(server) as other, working(server), calling(server) as client:
        taken = 0

        async def take(message: Msg) -> None:
            nonlocal taken
            taken += 1
            await message.respond(b"whatever")

        await other.subscribe(SUBJECT, queue="q", cb=take)
        await told(other)
        ended = [await drain_quietly(await ask(client, request={"n": 1}, id=str(number))) for number in range(40)]
        assert ended.count([0]) == 40 - taken
        assert 0 < taken < 40


async def drain_quietly(inbox: Inbox) -> list[Any]:
    try:
        return await drain(inbox)
    except StatorError:
        return []


@pytest.fixture
def trusted(tmp_path: Path) -> tuple[Tls, Tls]:
    """Two processes of one authority."""
    authority = Authority(tmp_path)
    return tls_of(authority, "worker"), tls_of(authority, "caller")


async def test_answers_are_encrypted_where_tls_is_set(server: ServerProcess, trusted: tuple[Tls, Tls]) -> None:
    async with working(server, tls=trusted[0]), calling(server, tls=trusted[1]) as client:
        assert await drain(await ask(client, request={"n": 100})) == list(range(100))


@pytest.mark.parametrize("alone", ["worker", "caller"])
async def test_where_one_speaks_tls_alone_there_are_no_answers(
    server: ServerProcess, trusted: tuple[Tls, Tls], alone: str
) -> None:
    there, here = (trusted[0], None) if alone == "worker" else (None, trusted[1])
    async with working(server, tls=there), calling(server, tls=here) as client:
        error = await refusal(await ask(client, request={"n": 1}, call_home=0.5))
        assert isinstance(error, Timeout | Disconnected)
        assert error.phase == "call home"


# -- the service


async def test_nats_tools_find_the_service(server: ServerProcess) -> None:
    async with plain_client(server) as client, working(server) as worker:

        async def question(subject: str) -> dict[str, Any]:
            return json.loads((await client.request(subject, b"", timeout=5)).data)

        found = await question("$SRV.PING")
        assert (found["name"], found["version"], found["type"]) == ("test_backend", "0.0.1", "io.nats.micro.v1.ping_response")
        assert await question("$SRV.PING.test_backend") == found
        assert await question(f"$SRV.PING.test_backend.{found['id']}") == found
        info = await question("$SRV.INFO.test_backend")
        assert [endpoint["subject"] for endpoint in info["endpoints"]] == [SUBJECT]
        assert info["endpoints"][0]["name"] == f"test_backend-generate-{INSTANCE:x}"
        await client.request(SUBJECT, b"garbage", timeout=5)
        stats = await question("$SRV.STATS.test_backend")
        assert stats["endpoints"][0]["num_requests"] == 1
        other = msgspec.structs.replace(record(), endpoint="other")
        worker.register("1/other", Serving(count, name="test.backend.other"))
        worker.describe(other, "1/other")
        assert len((await question("$SRV.INFO.test_backend"))["endpoints"]) == 2
        worker.unregister(PATH)
        assert len((await question("$SRV.INFO.test_backend"))["endpoints"]) == 1
        worker.unregister("1/other")
        await worker.connection.settled()
        with pytest.raises(nats.errors.NoRespondersError):
            await question("$SRV.PING.test_backend")


# -- connecting


async def test_a_worker_does_not_start_without_a_server() -> None:
    nowhere = NatsConfig(servers=("nats://user:hidden@127.0.0.1:1",))
    with pytest.raises(ConnectFailed, match=r"127\.0\.0\.1:1") as caught:
        await NatsServer.listen(nowhere, plane_host(), version="0.0.1")
    assert "hidden" not in str(caught.value)


async def test_a_caller_starts_without_a_server_and_fails_fast() -> None:
    nowhere = NatsConfig(servers=("nats://127.0.0.1:1",))
    client = await NatsClient.start(nowhere, plane_host())
    try:
        await eventually(lambda: client.connection.away_for > 0.5, what="it is no blink any more")
        began = asyncio.get_running_loop().time()
        with pytest.raises(ConnectFailed, match="NATS is away") as caught:
            await ask(client)
        assert asyncio.get_running_loop().time() - began < 0.1
        assert (caught.value.phase, caught.value.retryable) == ("connect", True)
    finally:
        await client.aclose()


class Recoveries:
    """Notes whom the plane calls well again."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def suspect(self, instance: int) -> None: ...

    def recovered(self, instance: int) -> None:
        self.seen.append(instance)

    def lost(self, instance: int, reason: str) -> None: ...

    def draining(self, instance: int) -> None: ...


async def test_instances_that_could_not_be_asked_without_nats_are_well_when_it_is_back(tmp_path: Path) -> None:
    recoveries = Recoveries()
    with nats_server(tmp_path) as own:
        client = await NatsClient.start(config(own), plane_host(observer=recoveries))
        try:
            assert recoveries.seen == []
            await asyncio.to_thread(own.stop)
            await eventually(lambda: client.connection.away_for > 0.5, what="it is away")
            for _ in range(3):
                with pytest.raises(ConnectFailed):
                    await ask(client)
            await asyncio.to_thread(own.start)
            await eventually(lambda: client.connection.connected, what="it is back")
            assert recoveries.seen == [INSTANCE]
        finally:
            await client.aclose()


async def test_an_end_before_the_connection_was_made(server: ServerProcess) -> None:
    for ticks in range(0, 60, 3):
        starting = asyncio.get_running_loop().create_task(NatsClient.start(config(server), plane_host()))
        for _ in range(ticks):
            await asyncio.sleep(0.0005)
        starting.cancel()
        try:
            await (await starting).aclose()
        except asyncio.CancelledError:
            pass
    await eventually(lambda: len(asyncio.all_tasks()) == 1, what="nothing is left")


async def test_answers_that_nobody_elsewhere_could_bring(server: ServerProcess, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    own = NatsConfig(servers=("nats://192.0.2.1:4222", server.url), connect_timeout=0.2)
    await (await NatsClient.start(own, plane_host())).aclose()
    assert "set host (STATOR_HOST)" in caplog.text
