"""Frames before the library reads them: GOAWAY is taken out, lengths are checked, what costs nothing is counted."""

from struct import pack

import pytest

from stator.protocol.http2_frames import PREFACE, ErrorCode, FrameScanner, FrameViolation, Goaway, encode_goaway

DATA, HEADERS, RST, SETTINGS, PING, GOAWAY, WINDOW, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 1) -> bytes:
    return pack(">I", len(payload))[1:] + bytes((kind, flags)) + pack(">I", stream) + payload


def scanner(*, max_frame: int = 1000, max_block: int = 2000, preface: bool = False) -> FrameScanner:
    return FrameScanner(max_frame=max_frame, max_block=max_block, preface=preface)


def scan(data: bytes, step: int, **limits: bool) -> tuple[bytes, list[Goaway]]:
    """What the library gets, and what is taken out, when `data` comes in pieces of `step` bytes."""
    subject = scanner(**limits)
    passed, taken = b"", []
    for start in range(0, len(data), step):
        for piece in subject.receive_data(data[start : start + step]):
            if isinstance(piece, Goaway):
                taken.append(piece)
            else:
                passed += piece
    return passed, taken


BEFORE = frame(SETTINGS, b"123456") + frame(DATA, b"x" * 300)
BEHIND = frame(DATA, b"y") + frame(DATA)


@pytest.mark.parametrize("step", [1, 2, 7, 8, 9, 10, 11, 100, 10_000])
def test_goaway_is_taken_out_wherever_it_stands(step: int) -> None:
    first, second = Goaway(last=5, code=0, reason="draining"), Goaway(last=2**31 - 1, code=11)
    data = BEFORE + encode_goaway(first) + encode_goaway(second) + BEHIND + encode_goaway(first)
    assert scan(data, step) == (BEFORE + BEHIND, [first, second, first])


def test_a_piece_without_goaway_passes_uncopied() -> None:
    data = BEFORE + BEHIND
    (piece,) = scanner().receive_data(data)
    assert piece is data


@pytest.mark.parametrize("step", [1, 5, 24, 30, 1000])
def test_a_preface_is_not_a_frame(step: int) -> None:
    assert scan(PREFACE + BEFORE, step, preface=True) == (PREFACE + BEFORE, [])


def test_a_reason_is_cut() -> None:
    (_, goaway) = scanner(max_frame=10_000).receive_data(frame(PING, b"12345678") + encode_goaway(Goaway(reason="ü" * 2000)))
    assert isinstance(goaway, Goaway) and goaway.reason == "ü" * 500


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(DATA, b"x" * 1001), ErrorCode.FRAME_SIZE_ERROR),
        (frame(GOAWAY, b"1234567"), ErrorCode.FRAME_SIZE_ERROR),
        (b"HTTP/1.1 400 Bad Request\r\n", ErrorCode.FRAME_SIZE_ERROR),
        (frame(HEADERS, b"x" * 900) + frame(CONTINUATION, b"x" * 900) * 2, ErrorCode.ENHANCE_YOUR_CALM),
    ],
)
def test_what_is_too_long_is_refused_before_it_is_there(data: bytes, code: int) -> None:
    subject = scanner()
    with pytest.raises(FrameViolation) as caught:
        for start in range(0, len(data), 9):
            subject.receive_data(data[start : start + 9])
    assert caught.value.wire_code == code


def test_a_header_block_that_ends_begins_anew() -> None:
    block = frame(HEADERS, b"x" * 900) + frame(CONTINUATION, b"x" * 900, flags=4)
    assert scan(block * 5, 100) == (block * 5, [])


def test_frames_that_carry_nothing_are_counted() -> None:
    subject = scanner()
    subject.receive_data(frame(RST, b"1234") + frame(PING, b"12345678") + frame(SETTINGS, stream=0) + frame(DATA))
    assert subject.idle_frames == 4
    subject.receive_data(frame(DATA, b"x") + frame(DATA, flags=1) + frame(WINDOW, b"1234") + frame(HEADERS, b"x", flags=4))
    assert subject.idle_frames == 4
    subject.receive_data(frame(HEADERS) + frame(CONTINUATION))
    assert subject.idle_frames == 6
