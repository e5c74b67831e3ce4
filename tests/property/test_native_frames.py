"""Frames of the native plane: any split of the bytes gives the same frames, writing and reading are inverse, nothing oversized is kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.errors import PeerProtocolError
from stator.protocol.native.frames import HEADER_SIZE, MAX_PAYLOAD, FrameReader, frame, pack_header

Fields = tuple[int, int, int, int, bytes]

SIZES = st.one_of(st.integers(0, 40), st.sampled_from([255, 256, MAX_PAYLOAD - 1, MAX_PAYLOAD]))


@st.composite
def frames(draw: st.DrawFn) -> Fields:
    size = draw(SIZES)
    return (
        draw(st.integers(0, 255)),
        draw(st.integers(0, 255)),
        draw(st.integers(0, 2**16 - 1)),
        draw(st.integers(0, 2**32 - 1)),
        bytes([draw(st.integers(0, 255))]) * size,
    )


def written(fields: list[Fields]) -> bytes:
    return b"".join(frame(kind, stream, payload, flags=flags, count=count) for kind, flags, count, stream, payload in fields)


@given(st.lists(frames(), max_size=6))
def test_reading_undoes_writing(fields: list[Fields]) -> None:
    reader = FrameReader()
    assert list(reader.feed(written(fields))) == fields
    assert reader.buffered == 0


@given(st.lists(frames(), max_size=5), st.lists(st.integers(1, 70_000), max_size=30))
def test_any_split_gives_the_same_frames(fields: list[Fields], cuts: list[int]) -> None:
    data = written(fields)
    reader = FrameReader()
    got: list[Fields] = []
    position = 0
    for size in cuts:
        got.extend(reader.feed(data[position : position + size]))
        position += size
        assert reader.buffered < HEADER_SIZE + MAX_PAYLOAD
    got.extend(reader.feed(data[position:]))
    assert got == fields


@given(st.lists(frames().filter(lambda fields: len(fields[4]) < 50), max_size=8))
def test_byte_by_byte(fields: list[Fields]) -> None:
    reader = FrameReader()
    data = written(fields)
    got = [each for position in range(len(data)) for each in reader.feed(data[position : position + 1])]
    assert got == fields


@given(st.lists(frames(), max_size=3), st.integers(MAX_PAYLOAD + 1, 2**32 - 1), st.integers(1, 5000))
def test_a_frame_that_is_too_long_is_refused_by_its_header(fields: list[Fields], length: int, chunk: int) -> None:
    data = written(fields) + pack_header(length, 5, 0, 0, 1)
    reader = FrameReader()
    got: list[Fields] = []
    with pytest.raises(PeerProtocolError, match="announces"):  # no byte of the payload was needed to say so
        for position in range(0, len(data), chunk):
            got.extend(reader.feed(data[position : position + chunk]))
    assert got == fields


@given(st.binary(max_size=200), st.lists(st.integers(1, 50), min_size=1, max_size=10))
def test_random_bytes_are_frames_or_refused(data: bytes, sizes: list[int]) -> None:
    whole, parts = FrameReader(), FrameReader()

    def read(reader: FrameReader, chunks: list[bytes]) -> list[Fields | str]:
        got: list[Fields | str] = []
        try:
            for chunk in chunks:
                got.extend(reader.feed(chunk))
        except PeerProtocolError as error:
            got.append(error.message)
        return got

    chunks: list[bytes] = []
    position = 0
    while position < len(data):
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(data[position : position + size])
        position += size
    assert read(whole, [data]) == read(parts, chunks)
