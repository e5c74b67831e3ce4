"""Both ends of a request stream, without a connection (`spec/10 §5`)."""

from typing import Any

import msgspec
import pytest

from stator.errors import EngineError
from stator.protocol.call_home import KILL, SENTINEL, STOP, Control
from stator.protocol.envelope import Codec
from stator.protocol.request_stream import RequestReader, RequestWriter
from stator.protocol.stream import Receiver
from stator.protocol.two_part import encode_frame
from stator.testing.recorded import recorded

CODECS: list[Codec] = ["json", "msgpack"]


def item(text: str) -> bytes:
    """An input frame, written by hand."""
    return encode_frame(data=text.encode())


class Worker:
    """A reader and the receiver it drives."""

    def __init__(self, codec: Codec = "json", **options: Any) -> None:
        self.receiver = Receiver()
        self.reader = RequestReader(self.receiver, codec=codec, **options)

    def feed(self, *frames: bytes) -> Control | None:
        return self.reader.receive_data(b"".join(frames))

    def take(self) -> list[Any]:
        items = list(self.receiver.items)
        self.receiver.items.clear()
        return items


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_written_is_read(codec: Codec) -> None:
    writer, worker = RequestWriter(codec=codec), Worker(codec)
    values = [None, 0, "ü", [1, {"a": None}], {"data": 1}, 2**64 - 1]
    for value in values:
        writer.send(value)
    assert not writer.closed
    writer.end()
    assert writer.closed
    assert worker.feed(writer.data_to_send()) is None
    assert worker.take() == values
    assert worker.receiver.ended
    assert worker.receiver.error is None
    assert worker.reader.closed
    assert writer.data_to_send() == b""


def test_the_writer_puts_down_what_the_reference_does() -> None:
    writer = RequestWriter(codec="json")
    captured = recorded("07-")
    writer.send({"type": "session.update", "session": {"type": "realtime", "instructions": "x", "model": "rt"}})
    writer.send({"type": "input_audio_buffer.commit"})
    writer.send({"type": "response.create", "response": None})
    taken = writer.data_to_send()
    writer.stop()
    assert taken + writer.data_to_send() == captured


def test_the_recorded_inputs_are_read_and_the_stop_is_heard() -> None:
    worker = Worker()
    assert worker.feed(recorded("07-")) is Control.STOP
    assert [each["type"] for each in worker.take()] == ["session.update", "input_audio_buffer.commit", "response.create"]
    assert worker.receiver.ended
    assert worker.receiver.error is None
    assert worker.reader.receive_eof() is None


def test_a_stop_drops_what_was_not_taken() -> None:
    writer = RequestWriter(codec="json")
    writer.send(1)
    writer.stop()
    writer.end()
    assert writer.data_to_send() == STOP


def test_a_value_without_json_form_is_not_written() -> None:
    writer = RequestWriter(codec="json")
    with pytest.raises(EngineError):
        writer.send(object())
    assert writer.data_to_send() == b""


@pytest.mark.parametrize(
    "last",
    [
        pytest.param(KILL, id="kill"),
        pytest.param(encode_frame(b'"pause"'), id="unknown control"),
        pytest.param(encode_frame(b'""'), id="empty control"),
        pytest.param(encode_frame(b"{}"), id="control that is no text"),
        pytest.param(encode_frame(b"\xff"), id="control that is not utf-8"),
        pytest.param(encode_frame(b'"sentinel"', b"1"), id="header and data"),
        pytest.param(encode_frame(), id="empty frame"),
        pytest.param(item("{"), id="undecodable input"),
        pytest.param(b"\xff" * 24, id="length beyond the limit"),
    ],
)
def test_what_is_not_understood_kills_behind_the_inputs_before_it(last: bytes) -> None:
    worker = Worker()
    assert worker.feed(item("1"), item("2"), last, item("3")) is Control.KILL
    assert worker.take() == [1, 2]
    assert worker.receiver.error is not None
    assert worker.reader.closed
    assert worker.feed(item("4")) is None
    assert worker.take() == []


@pytest.mark.parametrize("sent", [b"", item("1"), item("1") + item("2")[:-1], SENTINEL[:-1]])
def test_an_end_without_control_kills(sent: bytes) -> None:
    worker = Worker()
    assert worker.feed(sent) is None
    assert worker.reader.receive_eof() is Control.KILL
    assert worker.receiver.error is not None


def test_the_end_of_the_inputs_is_no_kill() -> None:
    worker = Worker()
    assert worker.feed(item("1"), SENTINEL) is None
    assert worker.reader.receive_eof() is None
    assert worker.receiver.error is None


def test_inputs_beyond_the_window_wait_and_so_does_the_end() -> None:
    worker = Worker(window=2)
    assert worker.feed(*(item(str(number)) for number in range(5)), SENTINEL) is None
    assert worker.reader.full
    got = worker.take()
    assert got == [0, 1]
    while worker.reader.full:
        assert worker.reader.resume() is None
        assert len(worker.receiver.items) <= 2
        got += worker.take()
    assert got == [0, 1, 2, 3, 4]
    assert worker.receiver.ended


def test_a_full_window_stays_full_until_inputs_are_taken() -> None:
    worker = Worker(window=1)
    worker.feed(item("1"), item("2"))
    assert worker.reader.resume() is None
    assert worker.take() == [1]


def test_what_has_arrived_is_delivered_before_the_cut() -> None:
    worker = Worker(window=1)
    worker.feed(item("1"), item("2"), item("3"))
    assert worker.reader.receive_eof() is Control.KILL
    assert worker.take() == [1, 2, 3]


def test_a_stop_behind_a_full_window_is_heard_when_it_is_read() -> None:
    worker = Worker(window=1)
    assert worker.feed(item("1"), STOP) is None
    assert worker.take() == [1]
    assert worker.reader.resume() is Control.STOP


def test_an_input_above_the_limit_kills() -> None:
    worker = Worker(limit=100)
    assert worker.feed(item(msgspec.json.encode("x" * 200).decode())) is Control.KILL
