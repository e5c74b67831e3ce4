"""However the bytes are cut, they mean the same: request bodies, frames, whole connections."""

import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from stator.errors import PeerProtocolError
from stator.protocol.call_home import KILL, SENTINEL, STOP
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.http2_exchange import Exchange
from stator.protocol.http2_frames import FrameScanner, Goaway, encode_goaway
from stator.protocol.http2_library import SessionLimits
from stator.protocol.http2_map import BodyReader, Fields, Inputs, Opening, encode_request, path_of, target_of
from stator.protocol.http2_session import Session
from stator.protocol.two_part import encode_frame
from stator.protocol.values import encode_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


def events(parts: list[bytes], limit: int = 10_000) -> list[Any]:
    """What a body says; inputs one by one, since they may come together or not."""
    reader = BodyReader(limit=limit)
    told: list[Any] = []
    try:
        for part in parts:
            for event in reader.receive_data(part):
                if isinstance(event, Inputs):
                    told += event.items
                elif isinstance(event, Opening):
                    told.append((event.head, bytes(event.payload)))
                else:
                    told.append(event)
    except PeerProtocolError as error:
        told.append(type(error))
    return told


CUTS = st.lists(st.integers(0, 10_000), max_size=8)


@given(value=JSON, words=st.lists(st.sampled_from([STOP, KILL]), max_size=3), cuts=CUTS)
def test_any_split_of_a_single_request(value: Any, words: list[bytes], cuts: list[int]) -> None:
    envelope = RequestEnvelope(id="r", payload=encode_json(value), metadata={"a": "ü"})
    body = b"".join((encode_request(envelope, limit=10_000), *words))
    whole = events([body])
    assert whole[0] == (whole[0][0], envelope.payload) and len(whole) == 1 + len(words)
    assert events(pieces(body, cuts)) == whole


@given(values=st.lists(JSON, max_size=6), last=st.sampled_from([b"", SENTINEL, SENTINEL + STOP]), cuts=CUTS)
def test_any_split_of_inputs(values: list[Any], last: bytes, cuts: list[int]) -> None:
    head = encode_request(RequestEnvelope(id="r", payload=b"", streams_in=True), limit=10_000)
    body = b"".join((head, *(encode_frame(data=encode_json(value)) for value in values), last))
    whole = events([body])
    assert whole[1 : 1 + len(values)] == values
    assert events(pieces(body, cuts)) == whole


@given(data=st.binary(max_size=300), cuts=CUTS)
def test_any_split_of_anything(data: bytes, cuts: list[int]) -> None:
    assert events(pieces(data, cuts), limit=200) == events([data], limit=200)


@given(path=st.text(min_size=1, max_size=30).filter(lambda text: text.isprintable() or "\n" in text))
def test_any_path_comes_back(path: str) -> None:
    assert path_of("/v1/rpc", target_of("/v1/rpc", path)) == path


FRAMES = st.lists(
    st.one_of(
        st.builds(
            lambda body, kind: len(body).to_bytes(3, "big") + bytes((kind, 0)) + bytes(4) + body,
            st.binary(max_size=50),
            st.sampled_from([0, 3, 4, 6, 8, 20]),
        ),
        st.builds(
            lambda last, reason: encode_goaway(Goaway(last=last, reason=reason)),
            st.integers(0, 2**31 - 1),
            st.text(max_size=20),
        ),
    ),
    max_size=8,
)


@given(frames=FRAMES, cuts=CUTS)
def test_any_split_of_frames_with_goodbyes_between_them(frames: list[bytes], cuts: list[int]) -> None:
    def scan(parts: list[bytes]) -> tuple[bytes, list[Goaway], int]:
        scanner = FrameScanner(max_frame=1000, max_block=1000, preface=False)
        found = [piece for part in parts for piece in scanner.receive_data(part)]
        passed = b"".join(piece for piece in found if isinstance(piece, bytes))
        return passed, [piece for piece in found if isinstance(piece, Goaway)], scanner.idle_frames

    data = b"".join(frames)
    passed, taken, counted = scan([data])
    assert scan(pieces(data, cuts)) == (passed, taken, counted)
    assert passed == b"".join(frame for frame in frames if frame[3] != 7)
    assert len(taken) == sum(frame[3] == 7 for frame in frames)


class Echo(Exchange):
    """Sends back what it gets (worker), or keeps it (caller)."""

    def __init__(self, session: Session | None = None) -> None:
        super().__init__()
        self.server = session
        self.received = b""
        self.over = False

    def headers(self, fields: Fields) -> None:
        if self.server is not None:
            self.server.respond(self, [(b":status", b"200")])

    def data(self, data: bytes) -> None:
        self.received += data
        self.release()
        if self.server is not None:
            self.push(data)

    def ended(self) -> None:
        self.over = True
        self.finish()


@settings(max_examples=25, deadline=None)
@given(
    bodies=st.lists(st.integers(0, 100_000), min_size=1, max_size=4),
    steps=st.lists(st.sampled_from([1, 10, 1000, 9_001, 100_000]), min_size=1, max_size=6),
)
def test_any_split_of_a_connection(bodies: list[int], steps: list[int]) -> None:
    """Every stream brings back what was sent, whatever the windows and however the bytes arrive."""
    limits = SessionLimits(window=65_535, connection_window=80_000, streams=10)
    client = Session(limits=limits, wake=lambda: None, now=0.0)
    server: Session = Session(limits=limits, wake=lambda: None, now=0.0, accept=lambda fields: Echo(server))
    client.receive_data(server.data_to_send(), 0.0)
    echoes: list[tuple[Echo, bytes]] = []
    for number, size in enumerate(bodies):
        body = bytes((number,)) * size
        echo = Echo()
        client.open(echo, [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/")])
        echo.push(body)
        echo.finish()
        echoes.append((echo, body))
    turn = 0
    while True:
        moved = False
        for source, sink in ((client, server), (server, client)):
            data = source.data_to_send()
            while data:
                step = steps[turn % len(steps)] if turn < 3000 else len(data)
                turn += 1
                sink.receive_data(data[:step], 0.0)
                data = data[step:]
                moved = True
        if not moved:
            break
    assert [echo.received for echo, _ in echoes] == [body for _, body in echoes]
    assert all(echo.over for echo, _ in echoes)
    assert not client.streams and not server.streams
