"""TwoPart frames, whole and in pieces."""

import pytest

from stator.errors import PeerProtocolError
from stator.protocol.partial import Partial
from stator.protocol.two_part import PREFIX_SIZE, TwoPartParser, decode_message, encode_frame
from stator.testing.growth import LINEAR, Growth
from stator.testing.recorded import recorded, recorded_names


def frames_of(data: bytes, limit: int = 2**20) -> list[tuple[bytes, bytes]]:
    return list(TwoPartParser(limit=limit).receive_data(data))


@pytest.mark.parametrize("name", recorded_names("3") + recorded_names("05") + recorded_names("06") + recorded_names("07"))
def test_recorded_connections_are_read_and_written_to_the_byte(name: str) -> None:
    data = recorded(name)
    frames = frames_of(data)
    assert frames
    assert b"".join(encode_frame(header, payload) for header, payload in frames) == data


def test_a_wrong_checksum_is_accepted() -> None:
    frame = bytearray(encode_frame(b"h", b"data"))
    frame[16:24] = b"\xff" * 8
    assert frames_of(bytes(frame)) == [(b"h", b"data")]
    assert decode_message(bytes(frame)) == (b"h", b"data")


def test_byte_by_byte() -> None:
    data = recorded("30-")
    parser = TwoPartParser(limit=1000)
    got = [frame for n in range(len(data)) for frame in parser.receive_data(data[n : n + 1])]
    assert got == frames_of(data)
    assert parser.unfinished == 0


def test_frames_before_an_oversized_one_are_given_out() -> None:
    parser = TwoPartParser(limit=100)
    frames = parser.receive_data(encode_frame(data=b"x" * 100) + encode_frame(data=b"x" * 101))
    assert next(frames) == (b"", b"x" * 100)
    with pytest.raises(PeerProtocolError, match="101 bytes is larger than the limit of 100"):
        next(frames)
    with pytest.raises(PeerProtocolError, match="101 bytes"):
        list(parser.receive_data(encode_frame(data=b"fine")))


def test_the_limit_is_checked_before_anything_is_kept() -> None:
    parser = TwoPartParser(limit=1000)
    huge = (2**63).to_bytes(8, "big")
    with pytest.raises(PeerProtocolError, match="larger than the limit of 1000"):
        list(parser.receive_data(huge + huge + bytes(8) + b"x" * 100))
    assert parser.unfinished == 0


def test_header_and_data_count_together() -> None:
    with pytest.raises(PeerProtocolError):
        frames_of(encode_frame(b"x" * 60, b"x" * 60), limit=100)


def test_a_message_ignores_what_follows_and_refuses_to_be_short() -> None:
    message = encode_frame(b"head", b"data")
    assert decode_message(message + b"more") == (b"head", b"data")
    for short in (b"", message[:10], message[:PREFIX_SIZE], message[:-1]):
        with pytest.raises(PeerProtocolError, match="short"):
            decode_message(short)


@pytest.mark.load
def test_time_is_linear_in_the_size() -> None:
    def parse(megabytes: int) -> None:
        parser = TwoPartParser(limit=2**30)
        data = encode_frame(data=bytes(megabytes * 2**20))
        frames = [frame for n in range(0, len(data), 1500) for frame in parser.receive_data(data[n : n + 1500])]
        assert len(frames) == 1

    growth = Growth()
    for _ in growth.rounds(5):
        with growth.small():
            parse(5)
        with growth.large():
            parse(15)
    assert growth.ratio <= LINEAR, growth


def test_partial_waits_for_what_the_next_step_needs() -> None:
    partial = Partial()
    assert partial.join(b"abc") == b"abc"
    partial.keep(b"abc", 1, 5)
    assert partial.join(b"d") is None
    assert len(partial) == 3
    assert partial.join(b"ef") == b"bcdef"
    assert len(partial) == 0
