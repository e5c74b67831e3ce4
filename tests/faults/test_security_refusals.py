"""Closed doors: who is not trusted is refused with a reason, on both sides, counted, and within the time of a handshake."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stator.errors import ConnectFailed, Disconnected, NotTrusted, StatorError, Timeout
from stator.protocol.native.frames import CRITICAL, GOAWAY, HELLO, OPEN, PROOF, frame
from stator.protocol.native.hello import PROVES, Hello, read_goaway
from stator.security import Tls, TlsConfig
from stator.tasks import SystemClock
from stator.testing.certificates import Authority, tls_of
from stator.testing.cluster import Cluster, echo
from stator.testing.native_pair import CLIENT_PROCESS
from stator.testing.native_sockets import RawPeer, native_address, plane_host, raw_listener, with_native
from stator.testing.plane_suite import Caller, PlanePair, count, eventually
from stator.transports.inbox import PhaseLimits
from stator.transports.native import NativeClient, NativeConfig, NativeServer
from stator.transports.plane import PlaneHost
from stator.transports.tcp import CompatibleClient, CompatibleServer, TcpConfig

pytestmark = pytest.mark.timeout(30)

SECRET, OTHER = "correct horse battery staple", "another secret, as long as that"


class Certificates:
    """Processes, good and bad."""

    def __init__(self, directory: Path) -> None:
        for name in ("ours", "theirs"):
            (directory / name).mkdir()
        self.ours, self.theirs = Authority(directory / "ours"), Authority(directory / "theirs")

    def good(self, **options: Any) -> Tls:
        return tls_of(self.ours, "good", **options)

    def with_certificate(self, pair: tuple[Path, Path], *, mutual: bool = True) -> Tls:
        config = TlsConfig(
            cert_path=pair[0],
            key_path=pair[1],
            ca_cert_path=self.ours.path,
            client_ca_cert_path=self.ours.path if mutual else None,
            server_name="stator",
            handshake_timeout=1.0,
        )
        return Tls(config, clock=SystemClock())

    def foreign(self) -> Tls:
        """Of an authority that others do not know; it trusts ours."""
        return self.with_certificate(self.theirs.issue("foreign"))

    def expired(self) -> Tls:
        return self.with_certificate(self.ours.issue("expired", begins=timedelta(days=-9), ends=timedelta(days=-1)))

    def misnamed(self) -> Tls:
        return self.with_certificate(self.ours.issue("misnamed", hosts=("elsewhere", "10.1.2.3")))

    def nameless(self) -> Tls:
        """Trusts ours and has no certificate to show."""
        config = TlsConfig(ca_cert_path=self.ours.path, server_name="stator", handshake_timeout=1.0)
        return Tls(config, clock=SystemClock())


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@asynccontextmanager
async def native(here: PlaneHost, there: PlaneHost, config: NativeConfig | None = None) -> AsyncIterator[Caller]:
    server = await NativeServer.listen(config or NativeConfig(connect_timeout=1.0), here)
    client = await NativeClient.start(config or NativeConfig(connect_timeout=2.0), there)
    try:
        pair = PlanePair(server=server, client=client, cut=lambda: None, open_streams=lambda: 0)
        yield Caller(pair, here.wheel, count, "generate")
        await eventually(lambda: not server._greeting, what="nobody waits at the door")  # pyright: ignore[reportPrivateUsage]
        assert server.open_streams == client.open_streams == 0
    finally:
        await client.aclose()
        await server.aclose()


@asynccontextmanager
async def compatible(here: PlaneHost, there: PlaneHost, config: None = None) -> AsyncIterator[Caller]:
    """The worker's request connection."""
    server = await CompatibleServer.listen(TcpConfig(), here)
    listening = msgspec.structs.replace(there, tls=there.tls if there.tls is None or there.tls.listens else None)
    client = await CompatibleClient.start(TcpConfig(connect_timeout=2.0, request_timeout=2.0), listening)
    client._host = there  # pyright: ignore[reportPrivateUsage] (a process without certificate cannot be called home: not the matter here)
    try:
        pair = PlanePair(server=server, client=client, cut=lambda: None, open_streams=lambda: 0)
        yield Caller(pair, here.wheel, count, "generate")
        await eventually(lambda: not server._connections, what="nobody waits at the door")  # pyright: ignore[reportPrivateUsage]
    finally:
        await client.aclose()
        await server.aclose()


async def refused(caller: Caller, within: float = 3.5) -> StatorError:
    """What the caller hears."""
    started = asyncio.get_running_loop().time()
    with pytest.raises((ConnectFailed, Disconnected, Timeout)) as caught:
        async with asyncio.timeout(within + 5):
            await caller.collect({"n": 1}, limits=PhaseLimits(connect=3, accept=3, call_home=3))
    assert asyncio.get_running_loop().time() - started < within
    assert caller.contexts == [], "a handler was called"
    return caught.value


TLS_CASES: dict[str, tuple[Callable[[Certificates], Tls | None], Callable[[Certificates], Tls | None], str, str, str]] = {
    # worker, client, what the client counts, what the worker counts, a word of the client's error
    "plaintext to tls": (Certificates.good, lambda _: None, "refused|encrypted", "plaintext", "TLS"),
    "tls to plaintext": (lambda _: None, Certificates.good, "plaintext", "encrypted", "does not speak TLS|something else"),
    "worker of another authority": (Certificates.foreign, Certificates.good, "untrusted", "untrusted", "not trusted"),
    "client of another authority": (Certificates.good, Certificates.foreign, "untrusted", "untrusted", "authority"),
    "worker's certificate expired": (Certificates.expired, Certificates.good, "expired", "expired", "not valid at this time"),
    "client's certificate expired": (Certificates.good, Certificates.expired, "expired", "expired", "expired"),
    "client without certificate": (Certificates.good, Certificates.nameless, "no_certificate", "no_certificate", "certificate"),
    "worker of another name": (Certificates.misnamed, Certificates.good, "wrong_name", "bad_certificate", "another name"),
}


@pytest.mark.parametrize("plane", [native, compatible], ids=["native", "compatible"])
@pytest.mark.parametrize("case", TLS_CASES.values(), ids=list(TLS_CASES))
async def test_tls_that_does_not_fit(
    case: Any, plane: Any, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    worker, client, client_counts, worker_counts, word = case
    worker_tls, client_tls = await asyncio.to_thread(lambda: (worker(certificates), client(certificates)))
    here, there = plane_host(tls=worker_tls), plane_host(CLIENT_PROCESS, tls=client_tls)
    async with plane(here, there) as caller:
        error = await refused(caller)
        assert isinstance(error, NotTrusted), repr(error)
        assert any(each in error.message for each in word.split("|")), error.message
        await eventually(lambda: bool(here.refusals.counts) and bool(there.refusals.counts), what="both have counted it")
    assert {reason for _, reason in there.refusals.counts} <= set(client_counts.split("|")), there.refusals.counts
    assert set(here.refusals.counts) == {("accepting", worker_counts)}, here.refusals.counts
    said = [entry.getMessage() for entry in caplog.records]
    assert any("127.0.0.1" in text for text in said), said


@pytest.mark.parametrize("role", ["worker", "client"])
@pytest.mark.parametrize("tls", [False, True])
async def test_silence_at_the_door_has_an_end(role: str, tls: bool, certificates: Certificates) -> None:
    mine = await asyncio.to_thread(certificates.good) if tls else None
    here, there = plane_host(tls=mine, secret=SECRET), plane_host(CLIENT_PROCESS, tls=mine, secret=SECRET)
    async with native(here, there) as caller:
        address = native_address(caller.record).address
        if role == "client":
            async with await RawPeer.connect(address) as silent:
                await silent.until_closed(within=3.0)
            await eventually(lambda: here.refusals.of("timeout") == 1)
        else:
            async with raw_listener() as listener:
                error = await refused_at(caller, listener.address)
                assert isinstance(error, Timeout | NotTrusted)


async def refused_at(caller: Caller, address: str) -> StatorError:
    record = with_native(caller.record, address=address)
    with pytest.raises(StatorError) as caught:
        async with asyncio.timeout(6):
            await caller.collect({"n": 1}, record=record)
    return caught.value


# -- the cluster secret


@pytest.mark.parametrize("unix", [False, True])
@pytest.mark.parametrize(
    ("client", "worker", "client_counts", "worker_counts"),
    [
        (OTHER, SECRET, "refused", "secret_wrong"),
        ("", SECRET, "secret_unset", "secret_missing"),
        (SECRET, "", "secret_missing", "secret_unset"),
    ],
)
async def test_a_secret_that_does_not_fit(
    client: str, worker: str, client_counts: str, worker_counts: str, unix: bool, tmp_path: Path
) -> None:
    here = plane_host(secret=worker, directory=tmp_path if unix else None)
    there = plane_host(CLIENT_PROCESS, secret=client)
    async with native(here, there, NativeConfig(unix=unix, connect_timeout=2.0)) as caller:
        error = await refused(caller, within=1.0)
        assert isinstance(error, NotTrusted) and "secret" in error.message
        assert error.phase == "connect" and error.instance
        await eventually(lambda: bool(here.refusals.counts))
    assert here.refusals.counts == {("accepting", worker_counts): 1}
    assert there.refusals.counts == {("dialling", client_counts): 1}


async def test_who_knows_the_secret_is_served() -> None:
    here, there = plane_host(secret=SECRET), plane_host(CLIENT_PROCESS, secret=SECRET)
    async with native(here, there) as caller:
        assert await caller.collect({"n": 2}) == [0, 1]
    assert here.refusals.counts == there.refusals.counts == {}


async def test_a_client_without_the_secret_cannot_open_a_stream() -> None:
    here = plane_host(secret=SECRET)
    async with native(here, plane_host(CLIENT_PROCESS)) as caller:
        for hello in (
            Hello(process=CLIENT_PROCESS, role="client"),
            Hello(process=CLIENT_PROCESS, role="client", features=PROVES, nonce="0" * 32),
        ):
            async with await RawPeer.connect(native_address(caller.record).address) as peer:
                await peer.say(
                    frame(HELLO, payload=hello.encode(), flags=CRITICAL),
                    frame(OPEN, 1, b"\x00\x01\x00\x00\x00\x02[]null"),
                )
                frames = await peer.until_closed()
                assert [each.kind for each in frames] == [HELLO, GOAWAY]
                assert read_goaway(frames[-1].payload).code == "not_trusted"
        assert caller.contexts == []
        await eventually(
            lambda: here.refusals.counts == {("accepting", "secret_missing"): 1, ("accepting", "secret_unproved"): 1}
        )


async def test_a_replayed_handshake_is_refused() -> None:
    """What a client that knew the secret said, said again by somebody who listened."""
    here, there = plane_host(secret=SECRET), plane_host(CLIENT_PROCESS, secret=SECRET)
    heard: list[bytes] = []
    async with native(here, there) as caller:
        address = native_address(caller.record).address
        host, _, port = address.rpartition(":")

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            onward = await asyncio.open_connection(host, int(port))

            async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, keep: bool) -> None:
                while data := await source.read(65536):
                    if keep:
                        heard.append(data)
                    sink.write(data)
                sink.close()

            await asyncio.gather(pump(reader, onward[1], True), pump(onward[0], writer, False), return_exceptions=True)

        listener = await asyncio.start_server(relay, "127.0.0.1", 0)
        try:
            through = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
            assert await caller.collect({"n": 1}, record=with_native(caller.record, address=through)) == [0]
        finally:
            listener.close()
        calls = len(caller.contexts)
        async with await RawPeer.connect(address) as thief:
            await thief.say(b"".join(heard))
            frames = await thief.until_closed()
        assert [each.kind for each in frames] == [HELLO, GOAWAY]
        assert len(caller.contexts) == calls
        await eventually(lambda: here.refusals.counts == {("accepting", "secret_wrong"): 1})


async def test_a_worker_that_does_not_know_the_secret_learns_nothing_and_gets_no_request() -> None:
    """Somebody took the worker's address and its process id."""
    there = plane_host(CLIENT_PROCESS, secret=SECRET)
    async with native(plane_host(secret=SECRET), there) as caller, raw_listener() as listener:
        process = native_address(caller.record).process
        asking = asyncio.get_running_loop().create_task(refused_at(caller, listener.address))
        async with await listener.accepted() as thief:
            hello = Hello(process=process, role="worker", features=PROVES, nonce="0" * 32)
            await thief.say(frame(HELLO, payload=hello.encode(), flags=CRITICAL))
            proof = await thief.until(PROOF)
            assert len(proof.payload) == 32
            await thief.say(frame(PROOF, payload=proof.payload, flags=CRITICAL))  # its own proof, sent back
            await thief.until_closed()
            assert {each.kind for each in thief.frames} == {HELLO, PROOF, GOAWAY}
        assert isinstance(await asking, NotTrusted)
        assert there.refusals.counts == {("dialling", "secret_wrong"): 1}


async def test_garbage_at_a_door_with_a_secret_is_counted() -> None:
    here = plane_host(secret=SECRET)
    async with native(here, plane_host(CLIENT_PROCESS)) as caller:
        for garbage in (b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n", b"\x00" * 64, b"\xff" * 64):
            async with await RawPeer.connect(native_address(caller.record).address) as peer:
                await peer.say(garbage)
                await peer.until_closed()
        await eventually(lambda: here.refusals.of("protocol") == 3, what=str(here.refusals.counts))


# -- a whole cluster


async def test_an_instance_that_is_not_trusted_is_avoided_and_never_reached_by_another_plane() -> None:
    async with Cluster.open("auto") as cluster:
        good = await cluster.worker(echo, cluster_secret=SECRET, compatible=True)
        bad = await cluster.worker(echo, cluster_secret=OTHER, compatible=True)
        client = await cluster.client(cluster_secret=SECRET, compatible=True)
        for number in range(6):
            assert await client.generate(number).collect() == [number]
        with pytest.raises(NotTrusted):
            await client.direct(1, bad.id).collect()
        states = {row.instance_id: row.state for row in client.explain()}
        assert states == {good.id: "free", bad.id: "inhibited"}
        assert client._services.network.fallbacks == {}  # pyright: ignore[reportPrivateUsage]
        page = client._services.meter.root.exposition().decode()  # pyright: ignore[reportPrivateUsage]
        line = next(line for line in page.splitlines() if line.startswith("stator_connections_refused_total{"))
        assert 'side="dialling"' in line and 'reason="refused"' in line
        page = bad.runtime.metrics.exposition().decode()
        assert 'reason="secret_wrong"' in page


async def test_with_a_secret_the_compatible_plane_is_closed() -> None:
    async with Cluster.open("auto", cluster_secret=SECRET) as cluster:
        worker = await cluster.worker(echo)
        assert worker.served.record.transport.tcp is None
        client = await cluster.client()
        assert await client.generate(1).collect() == [1]
        stranger = await cluster.join(plane="compatible", cluster_secret=None)
        other = await stranger.endpoint("test.backend.generate").client()
        await other.wait_for_instances()
        with pytest.raises(ConnectFailed, match="planes in use"):
            await other.generate(1).collect()


async def test_a_reference_worker_is_not_called_where_a_secret_is_set() -> None:
    """A record without native address, as anybody who can write to discovery can make one."""
    async with Cluster.open("auto", check=False) as cluster:
        worker = await cluster.worker(echo)
        record = msgspec.structs.replace(worker.served.record, stator=msgspec.UNSET)
        await worker.served.unregister()
        ghost = await cluster.join()
        await ghost.discovery.register(record)
        closed = await cluster.client(cluster_secret=SECRET)
        await closed.wait_for_instances(timeout=5)
        with pytest.raises(ConnectFailed, match="planes in use"):
            await closed.generate(1).collect()
        opened = await cluster.client(cluster_secret=SECRET, compatible=True)
        await opened.wait_for_instances(timeout=5)
        assert await opened.generate(1).collect() == [1]


async def test_the_pulse_says_no_more_than_that_a_process_lives() -> None:
    """UDP, neither encrypted nor proved: who knows the process id learns how late the loop is; the answer is shorter than the question."""
    here = plane_host(secret=SECRET)
    async with native(here, plane_host(CLIENT_PROCESS)) as caller:
        host, _, port = native_address(caller.record).pulse.rpartition(":")
        process = bytes.fromhex(native_address(caller.record).process)

        def ask(question: bytes) -> bytes:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
                asking.settimeout(0.5)
                asking.sendto(question, (host, int(port)))
                with suppress(TimeoutError):
                    return asking.recv(2048)
            return b""

        question = b"STP1" + b"12345678" + process
        answer = await asyncio.to_thread(ask, question)
        assert answer[:12] == b"stp112345678" and len(answer) == 16 < len(question)
        assert await asyncio.to_thread(ask, b"STP1" + b"12345678" + bytes(16)) == b""


def test_the_certificates_of_the_kit_are_what_they_say(certificates: Certificates) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        context = certificates.good().client_context()
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        dialled = context.wrap_bio(down, up, server_hostname="stator")
        accepted = certificates.foreign().server_context().wrap_bio(up, down, server_side=True)
        for _ in range(4):
            for side in (dialled, accepted):
                with suppress(ssl.SSLWantReadError):
                    side.do_handshake()
