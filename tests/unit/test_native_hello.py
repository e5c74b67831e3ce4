"""HELLO and GOAWAY: versions, codecs, fields nobody knows, and what cannot be read."""

from typing import Any

import msgspec
import pytest

from stator.errors import ConnectFailed, PeerProtocolError
from stator.protocol.native.frames import GOAWAY, HELLO, frame
from stator.protocol.native.hello import Goaway, Hello, Limits, read_goaway, read_hello
from stator.testing.native_pair import CLIENT_PROCESS, WORKER_PROCESS, NativePair, read_frames

GOOD: dict[str, Any] = {
    "versions": [1, 1],
    "features": 0,
    "codecs": ["json"],
    "process": "a" * 32,
    "role": "worker",
    "nonce": "",
    "limits": {"frame": 65536, "item": 134217728, "request": 33554432, "streams": 65536},
}


def hello(**changes: Any) -> bytes:
    return msgspec.json.encode({**GOOD, **changes})


def ours(**changes: Any) -> Hello:
    return Hello(process=CLIENT_PROCESS, role="client", **changes)


def test_the_layout_is_the_documented_one() -> None:
    written = Hello(process="a" * 32, role="worker").encode()
    assert msgspec.json.decode(written) == GOOD
    assert read_hello(written) == Hello(process="a" * 32, role="worker")
    assert msgspec.json.decode(Goaway(last=7, code="protocol", reason="bad").encode()) == {
        "last": 7,
        "code": "protocol",
        "reason": "bad",
    }


def test_unknown_fields_are_ignored() -> None:
    data = hello(future={"a": [1]}, limits={**GOOD["limits"], "colours": 3})
    assert read_hello(data) == read_hello(hello())


def test_missing_fields_have_defaults() -> None:
    peer = read_hello(b'{"process": "x", "role": "client"}')
    assert peer.limits == Limits() and peer.versions == (1, 1) and peer.codecs == ("json",)


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"role": "worker"}',
        b'{"process": "x"}',
        b"[" * 4000,
        hello(role="spectator"),
        hello(process=7),
        hello(process=None),
        hello(versions=[1]),
        hello(versions="1"),
        hello(versions=[1, 2, 3]),
        hello(codecs="json"),
        hello(codecs=[1]),
        hello(features="all"),
        hello(limits=[]),
        hello(limits={"item": 0}),
        hello(limits={"request": -1}),
        hello(limits={"streams": 0}),
        hello(limits={"frame": 4096}),
        hello(limits={"item": 1e400}),
        hello(nonce="x" * 4096),
    ],
)
def test_what_is_no_hello_is_refused(bad: bytes) -> None:
    with pytest.raises(PeerProtocolError, match="HELLO"):
        read_hello(bad)


@pytest.mark.parametrize(
    ("mine", "theirs", "agreed"), [((1, 1), (1, 1), 1), ((1, 3), (2, 5), 3), ((2, 9), (1, 4), 4), ((1, 1), (1, 9), 1)]
)
def test_the_highest_common_version_is_spoken(mine: tuple[int, int], theirs: tuple[int, int], agreed: int) -> None:
    assert ours(versions=mine).agree(read_hello(hello(versions=list(theirs)))) == agreed
    assert ours(versions=theirs).agree(read_hello(hello(versions=list(mine)))) == agreed


@pytest.mark.parametrize(("mine", "theirs"), [((1, 1), (2, 3)), ((4, 5), (1, 3)), ((1, 1), (0, 0)), ((1, 1), (9, 1))])
def test_no_common_version_is_a_failed_connect(mine: tuple[int, int], theirs: tuple[int, int]) -> None:
    with pytest.raises(ConnectFailed, match="no common version") as caught:
        ours(versions=mine).agree(read_hello(hello(versions=list(theirs))))
    assert caught.value.phase == "connect"


@pytest.mark.parametrize("codecs", [[], ["msgpack"], ["JSON"]])
def test_no_common_codec_is_a_failed_connect(codecs: list[str]) -> None:
    with pytest.raises(ConnectFailed, match="no common codec"):
        ours().agree(read_hello(hello(codecs=codecs)))


def test_one_common_codec_is_enough() -> None:
    assert ours().agree(read_hello(hello(codecs=["msgpack", "json"]))) == 1


def test_hello_is_the_first_frame_of_both_and_nothing_follows_it() -> None:
    pair = NativePair(greet=False)
    for session, process in ((pair.client, CLIENT_PROCESS), (pair.server, WORKER_PROCESS)):
        frames = read_frames(session.outgoing.data_to_send())
        assert [each.kind for each in frames] == [HELLO]
        assert read_hello(frames[0].payload).process == process
        assert frames[0].flags == 0x80 and frames[0].stream == 0
    pair.server.drain()
    assert pair.server.outgoing.data_to_send() == b""  # GOAWAY waits for the client's HELLO


def test_a_worker_that_drains_says_so_after_hello() -> None:
    pair = NativePair(greet=False)
    pair.server.drain()
    pair.settle()
    assert [each.kind for each in pair.down.frames] == [HELLO, GOAWAY]
    assert pair.client.gone is not None and pair.client.gone.drains and pair.away == 1


def test_goaway_in_place_of_hello_is_a_failed_connect_with_its_reason() -> None:
    pair = NativePair(greet=False)
    goaway = Goaway(code="overloaded", reason="too many connections")
    with pytest.raises(ConnectFailed, match="overloaded too many connections") as caught:
        pair.client.receive_data(frame(GOAWAY, payload=goaway.encode()), 0.0)
    assert caught.value.phase == "connect"
    pair.client.outgoing.data_to_send()
    pair.client.say_goodbye(Goaway(code="protocol"))
    assert pair.client.outgoing.data_to_send() == b""  # a GOAWAY is not answered by one


@pytest.mark.parametrize("bad", [b"", b"{", b"[1]", b'{"last": "x"}', b"\xff"])
def test_a_goaway_that_cannot_be_read_still_ends_the_connection(bad: bytes) -> None:
    goaway = read_goaway(bad)
    assert goaway.code == "protocol" and not goaway.drains


def test_a_goaway_fits_whatever_its_reason_is() -> None:
    goaway = Goaway(code="protocol", reason="\ud800\x00" * 100_000)
    read = read_goaway(goaway.encode())
    assert read.code == "protocol" and len(read.reason) == 500 and read.reason.startswith("?\x00")
