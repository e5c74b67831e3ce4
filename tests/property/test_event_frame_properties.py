"""Any event there and back, and any damage to a message: an event or a `PeerProtocolError`, nothing else."""

from random import Random

from hypothesis import example, given
from hypothesis import strategies as st

from stator.errors import PeerProtocolError
from stator.protocol.event_frame import Event, decode_envelope, decode_frames, encode_envelope, encode_frames

U64 = st.integers(0, 2**64 - 1)
EVENTS = st.builds(
    Event,
    publisher_id=U64,
    sequence=U64,
    published_at=U64,
    topic=st.text(st.characters(exclude_categories=("Cs",))),
    payload=st.binary(max_size=300),
)


def written(event: Event) -> list[bytes]:
    return list(encode_frames(event, event.topic.encode()))


@given(EVENTS)
def test_there_and_back(event: Event) -> None:
    assert decode_envelope(encode_envelope(event)) == event
    assert decode_frames(written(event)) == event


@given(EVENTS, st.randoms(use_true_random=False), st.integers(1, 4))
def test_damaged_messages(event: Event, random: Random, times: int) -> None:
    frames = written(event)
    for _ in range(times):
        damage(frames, random)
    try:
        read = decode_frames(frames)
    except PeerProtocolError:
        return
    assert decode_frames(written(read)) == read


def damage(frames: list[bytes], random: Random) -> None:
    """Change, cut, lengthen, drop or repeat something."""
    if not frames:
        frames.append(random.randbytes(3))
        return
    place = random.randrange(len(frames))
    frame = bytearray(frames[place])
    match random.randrange(6):
        case 0 if frame:
            frame[random.randrange(len(frame))] = random.randrange(256)
        case 1:
            del frame[random.randrange(len(frame) + 1) :]
        case 2:
            frame += random.randbytes(random.randrange(1, 9))
        case 3:
            del frames[place]
            return
        case 4:
            frames.insert(place, bytes(frame))
            return
        case _:
            start = random.randrange(len(frame) + 1)
            frame[start:start] = random.randbytes(2)
    frames[place] = bytes(frame)


@given(st.lists(st.binary(max_size=40), max_size=6))
@example([b"", bytes(8), bytes(8), b"\x01\xff\xff\xff\xff"])
@example([b"", bytes(8), bytes(8), b"\x01\0\0\0\x05\xdd\xff\xff\xff\xff"])
def test_random_frames(frames: list[bytes]) -> None:
    try:
        decode_frames(frames)
    except PeerProtocolError:
        pass


@given(st.binary(max_size=60))
def test_random_envelopes(data: bytes) -> None:
    try:
        event = decode_envelope(data)
    except PeerProtocolError:
        return
    assert decode_envelope(encode_envelope(event)) == event
