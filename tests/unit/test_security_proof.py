"""The cluster secret on the native plane: who knows it is served, nobody else is, and nothing of it is said."""

import hashlib
import hmac

import pytest

from stator.config import Secret
from stator.errors import ConnectFailed, NotTrusted, PeerProtocolError
from stator.protocol.native.frames import CRITICAL, GOAWAY, HELLO, OPEN, PING, PROOF, frame
from stator.protocol.native.hello import Goaway
from stator.protocol.native.proof import PROOF_SIZE, make_proof, proves
from stator.testing.native_pair import NativePair, read_frames

SECRET = "correct horse battery staple"


def pair(client: str = SECRET, server: str = SECRET, nonces: tuple[str, str] = ("1" * 32, "2" * 32)) -> NativePair:
    return NativePair(client_secret=client, server_secret=server, nonces=nonces, greet=False)


def test_both_sides_prove_it_and_streams_open() -> None:
    known = pair()
    known.settle()
    assert [each.kind for each in known.up.frames] == [HELLO, PROOF]
    assert [each.kind for each in known.down.frames] == [HELLO, PROOF]
    assert all(each.flags == CRITICAL and each.stream == 0 for each in (*known.up.frames, *known.down.frames))
    assert known.client.peer is not None and known.server.peer is not None
    known.open({"n": 1})
    known.settle()
    assert [call.request.body for call in known.calls] == [{"n": 1}]


def test_the_layout_is_the_documented_one() -> None:
    known = pair()
    known.settle()
    client, worker = known.up.frames[0].payload, known.down.frames[0].payload
    for role, wire in ((b"c", known.up), (b"w", known.down)):
        message = b"stator native proof 1\0" + role + hashlib.sha256(client).digest() + hashlib.sha256(worker).digest()
        assert wire.frames[1].payload == hmac.new(SECRET.encode(), message, "sha256").digest()
    assert len(known.up.frames[1].payload) == PROOF_SIZE


def test_the_client_proves_first() -> None:
    known = pair()
    known.up.load()
    known.up.carry()
    known.down.load()
    known.down.load()
    assert [each.kind for each in known.down.frames] == [HELLO]  # nothing to guess the secret from


def test_nothing_of_the_secret_is_said() -> None:
    known = pair()
    known.settle()
    said = b"".join(each.payload for wire in (known.up, known.down) for each in wire.frames)
    for form in (SECRET.encode(), hashlib.sha256(SECRET.encode()).digest(), SECRET.encode().hex().encode()):
        assert form not in said
    assert SECRET not in repr(vars(known.client)) + repr(vars(known.server))


def refusal_of(one: NativePair) -> tuple[NotTrusted, NotTrusted]:
    """What the client and the worker each say about the other; the connection ends."""
    found: dict[str, NotTrusted] = {}
    for _ in range(4):
        for wire in (one.up, one.down):
            wire.load()
            try:
                wire.carry()
            except NotTrusted as error:
                name = wire.sink.hello.role
                found.setdefault(name, error)
                wire.sink.say_goodbye(Goaway(code=error.code, reason=error.message))
    return found["client"], found["worker"]


@pytest.mark.parametrize(
    ("client", "server", "client_says", "worker_says"),
    [
        (SECRET, "another secret, as long", "refused", "secret_wrong"),
        (SECRET, "", "secret_missing", "secret_unset"),
        ("", SECRET, "secret_unset", "secret_missing"),
    ],
)
def test_who_does_not_know_it_is_refused_and_both_sides_say_why(
    client: str, server: str, client_says: str, worker_says: str
) -> None:
    one = pair(client, server)
    at_client, at_worker = refusal_of(one)
    assert (at_client.reason, at_worker.reason) == (client_says, worker_says)
    assert "secret" in at_client.message and "secret" in at_worker.message
    assert one.client.peer is None and one.server.peer is None
    assert not {PROOF} & {each.kind for each in one.down.frames}
    for error in (at_client, at_worker):
        assert isinstance(error, ConnectFailed) and error.phase == "connect"
        assert SECRET not in str(error)


@pytest.mark.parametrize("kind", [OPEN, PING, HELLO])
def test_nothing_is_taken_from_a_client_before_its_proof(kind: int) -> None:
    one = pair()
    one.up.load()
    one.up.carry()
    with pytest.raises(NotTrusted, match="prove") as caught:
        one.server.receive_data(frame(kind, 1 if kind == OPEN else 0, b"whatever"), 0.0)
    assert caught.value.reason == "secret_unproved"
    assert not one.calls


def test_a_recorded_handshake_is_worth_nothing() -> None:
    first = pair()
    first.settle()
    again = pair(nonces=("1" * 32, "3" * 32))  # the worker's nonce is new, all else is as it was
    with pytest.raises(NotTrusted, match="another cluster secret") as caught:
        again.server.receive_data(
            b"".join(frame(each.kind, 0, each.payload, flags=each.flags) for each in first.up.frames), 0.0
        )
    assert caught.value.reason == "secret_wrong"
    other = pair(nonces=("4" * 32, "2" * 32))  # and the other way round
    with pytest.raises(NotTrusted, match="another cluster secret"):
        other.client.receive_data(
            b"".join(frame(each.kind, 0, each.payload, flags=each.flags) for each in first.down.frames), 0.0
        )


def test_a_proof_cannot_be_sent_back_to_who_made_it() -> None:
    one = pair()
    one.down.load()
    one.down.carry()  # the worker's HELLO: the client proves
    proof = read_frames(one.client.outgoing.data_to_send())[-1]
    assert proof.kind == PROOF
    with pytest.raises(NotTrusted):
        one.client.receive_data(frame(PROOF, payload=proof.payload, flags=CRITICAL), 0.0)


@pytest.mark.parametrize("shown", [b"", b"\0" * 32, b"x" * 31, b"x" * 33, b"x" * 60_000])
def test_bytes_that_are_no_proof(shown: bytes) -> None:
    one = pair()
    one.up.load()
    one.up.carry()
    with pytest.raises(NotTrusted):
        one.server.receive_data(frame(PROOF, payload=shown, flags=CRITICAL), 0.0)
    assert not proves(shown, Secret(SECRET), "client", client=b"a", worker=b"b")


def test_a_changed_hello_is_noticed() -> None:
    """What the HELLOs say is part of the proof: versions, features, limits."""
    one = pair()
    hello = read_frames(one.client.outgoing.data_to_send())[0].payload
    changed = hello.replace(b'"streams":65536', b'"streams":65535')
    assert changed != hello
    one.server.receive_data(frame(HELLO, payload=changed, flags=CRITICAL), 0.0)
    one.down.load()
    one.down.carry()
    one.up.load()
    with pytest.raises(NotTrusted, match="another cluster secret"):
        one.up.carry()


def test_roles_and_secrets_make_different_proofs() -> None:
    made = {
        make_proof(Secret(secret), role, client=client, worker=b"w")
        for secret in ("a", "b")
        for role in ("client", "worker")
        for client in (b"c", b"d")
    }
    assert len(made) == 8


def test_a_proof_where_there_is_no_secret_breaks_the_connection() -> None:
    plain = NativePair()
    for session in (plain.client, plain.server):
        with pytest.raises(PeerProtocolError, match="kind 14"):
            session.receive_data(frame(PROOF, payload=b"x" * 32, flags=CRITICAL), 0.0)


def test_without_a_secret_nothing_changes() -> None:
    plain = NativePair(greet=False)
    plain.settle()
    assert [each.kind for each in plain.up.frames] == [HELLO]
    assert b'"features":0' in plain.up.frames[0].payload and b'"nonce":""' in plain.up.frames[0].payload


def test_a_worker_that_drains_says_so_after_its_proof() -> None:
    one = pair()
    one.server.drain()
    one.settle()
    assert [each.kind for each in one.down.frames] == [HELLO, PROOF, GOAWAY]
    assert one.away == 1


@pytest.mark.parametrize("first", [b"\x16\x03\x01\x02\x00\x01", b"\x15\x03\x03\x00\x02\x02\x0a"])
@pytest.mark.parametrize("side", ["client", "server"])
def test_tls_where_none_is_set_is_recognised(first: bytes, side: str) -> None:
    plain = NativePair(greet=False)
    session = plain.client if side == "client" else plain.server
    with pytest.raises(NotTrusted, match="TLS") as caught:
        session.receive_data(first, 0.0)
    assert caught.value.reason == "encrypted"
