"""Both ends of a response stream, without a connection."""

from typing import Any

import msgspec
import pytest

from stator.errors import (
    ConnectFailed,
    Disconnected,
    EngineError,
    Overloaded,
    PeerProtocolError,
    StatorError,
    StreamIncomplete,
)
from stator.protocol.annotated import Annotated
from stator.protocol.call_home import KILL, PROLOGUE, SENTINEL, STOP, Control, HandshakeReader
from stator.protocol.envelope import Codec
from stator.protocol.item_frame import FINAL, encode_item
from stator.protocol.response_stream import WINDOW, ResponseReader, ResponseWriter
from stator.protocol.stream import Phase, Receiver
from stator.protocol.two_part import encode_frame
from stator.testing.recorded import recorded

INSTANCE = 42
CODECS: list[Codec] = ["json", "msgpack"]


def item(text: str) -> bytes:
    """An item frame, written by hand."""
    return encode_frame(data=text.encode())


class Client:
    """A reader and the receiver it drives."""

    def __init__(self, *, codec: Codec = "json", item_type: Any = Any, **options: Any) -> None:
        self.receiver = Receiver(instance=INSTANCE, item_type=item_type)
        self.reader = ResponseReader(self.receiver, codec=codec, **options)
        self.reader.connected()

    def feed(self, *frames: bytes) -> "Client":
        self.reader.receive_data(b"".join(frames))
        return self

    @property
    def items(self) -> list[Any]:
        return list(self.receiver.items)

    def error(self) -> StatorError:
        assert self.receiver.ended
        assert self.receiver.error is not None
        return self.receiver.error


def behind_handshake(name: str) -> bytes:
    found = HandshakeReader().receive_data(recorded(name))
    assert found is not None
    return found[1]


# -- the worker's end


@pytest.mark.parametrize(
    ("name", "codec", "items", "error"),
    [
        ("30-worker-stream-json-ok", "json", 2, None),
        ("31-worker-stream-msgpack-ok", "msgpack", 2, None),
        ("32-worker-stream-error-first", "json", 0, EngineError("ValueError: boom before first", kind="InvalidArgument")),
        ("33-worker-stream-error-mid", "json", 1, EngineError("ValueError: boom mid", kind="InvalidArgument")),
    ],
)
def test_recorded_streams_are_written_to_the_byte(name: str, codec: Codec, items: int, error: StatorError | None) -> None:
    writer = ResponseWriter(subject=f"subj-{name}", codec=codec)
    writer.accept()
    for number in range(items):
        writer.send({"token_ids": [number], "text": "tok"})
    writer.end(error)
    assert b"".join(writer.data_to_send()) == recorded(name)
    assert writer.data_to_send() == []


def test_the_handshake_is_there_from_the_beginning() -> None:
    (hello,) = ResponseWriter(subject="subj-34-worker-stream-prologue-error", codec="json").data_to_send()
    assert recorded("34-").startswith(hello)


def test_a_value_that_cannot_be_sent_leaves_nothing_behind() -> None:
    writer = ResponseWriter(subject="s", codec="json")
    writer.data_to_send()
    with pytest.raises(EngineError):
        writer.send({"a": object()})
    assert writer.data_to_send() == []


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("large", ["x" * 70_000, ["y" * 2_000_000]])
def test_a_large_item_is_not_copied_into_its_neighbours(codec: Codec, large: Any) -> None:
    writer = ResponseWriter(subject="s", codec=codec)
    writer.accept()
    for value in (1, large, 2):
        writer.send(value)
    pieces = writer.data_to_send()
    assert len(pieces) > 3
    writer.end()
    assert len(writer.data_to_send()) == 1
    found = HandshakeReader().receive_data(b"".join(pieces))
    assert found is not None
    client = Client(codec=codec).feed(found[1])
    assert client.items == [1, large, 2]


def test_a_refusal_ends_the_stream() -> None:
    writer = ResponseWriter(subject="s", codec="json")
    writer.data_to_send()
    writer.refuse(Overloaded("full"))
    assert type(Client().feed(*writer.data_to_send()).error()) is Overloaded


def test_the_worker_hears_the_client() -> None:
    writer = ResponseWriter(subject="s", codec="json")
    assert writer.receive_data(recorded("05-")[:-1]) == []
    assert writer.receive_data(recorded("05-")[-1:] + recorded("06-")) == [Control.STOP, Control.KILL]


# -- the client's end


@pytest.mark.parametrize(("name", "codec"), [("30-", "json"), ("31-", "msgpack")])
def test_recorded_streams_are_read(name: str, codec: Codec) -> None:
    client = Client(codec=codec).feed(behind_handshake(name))
    assert client.items == [{"token_ids": [0], "text": "tok"}, {"token_ids": [1], "text": "tok"}]
    assert client.receiver.ended
    assert client.receiver.error is None
    assert client.reader.closed
    assert client.reader.data_to_send() == b""


@pytest.mark.parametrize(("name", "items", "text"), [("32-", 0, "boom before first"), ("33-", 1, "boom mid")])
def test_recorded_errors_are_read(name: str, items: int, text: str) -> None:
    client = Client().feed(behind_handshake(name))
    assert len(client.items) == items
    error = client.error()
    assert isinstance(error, EngineError)
    assert (error.kind, error.instance) == ("InvalidArgument", INSTANCE)
    assert text in error.message
    assert client.reader.closed
    assert client.reader.data_to_send() == b""


def test_a_recorded_refusal_is_read() -> None:
    error = Client().feed(behind_handshake("34-")).error()
    assert isinstance(error, ConnectFailed)
    assert error.retryable


def test_a_recorded_stop_ends_quietly() -> None:
    client = Client()
    client.reader.stop()
    client.feed(behind_handshake("35-"))
    assert client.reader.data_to_send() == STOP
    assert not client.receiver.ended
    client.reader.receive_eof()
    assert len(client.items) == 4
    assert client.receiver.ended
    assert client.receiver.error is None


def test_the_same_bytes_without_a_stop_are_a_truncated_stream() -> None:
    client = Client().feed(behind_handshake("35-"))
    client.reader.receive_eof()
    assert len(client.items) == 4
    assert isinstance(client.error(), StreamIncomplete)


def test_a_recorded_bidirectional_response() -> None:
    client = Client().feed(behind_handshake("36-"))
    assert client.items == [{"echo": {"x": 1}, "n": 1}, {"total": 1}]
    assert client.receiver.error is None


def test_phases_follow_the_frames() -> None:
    client = Client()
    assert client.receiver.phase is Phase.PROLOGUE
    client.feed(PROLOGUE)
    assert client.receiver.phase is Phase.FIRST_ITEM
    client.feed(encode_item(1, "json"))
    assert client.receiver.phase is Phase.ITEMS
    client.feed(FINAL["json"])
    assert client.receiver.phase is Phase.ITEMS
    client.feed(SENTINEL)
    assert client.receiver.phase is Phase.ENDED


def test_one_chunk_is_one_call() -> None:
    calls: list[int] = []

    class Counting(Receiver):
        def receive(self, items: Any) -> bool:
            calls.append(len(items))
            return super().receive(items)

    reader = ResponseReader(Counting())
    reader.receive_data(PROLOGUE + encode_item(1, "json") * 50)
    reader.receive_data(encode_item(2, "json") * 3 + FINAL["json"] + SENTINEL)
    assert calls == [50, 3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"data":{"data":1},"complete_final":false}', [1]),
        ('{ "complete_final" : false, "data" : { "data" : 1 } }', [1]),
        ('{"data":{"data":1,"new":2},"complete_final":false,"newer":3}', [1]),
        ('[{"data":1},false]', [1]),
        ('{"data":{"data":null},"complete_final":false}', [None]),
        ('{"data":{},"complete_final":false}', [None]),
        ('{"data":{"event":"ping"},"complete_final":false}', [Annotated(event="ping")]),
        ('{"data":{"data":1,"id":"a"},"complete_final":false}', [Annotated(data=1, id="a")]),
        ('{"data":{"comment":["c"]},"complete_final":false}', [Annotated(comment=["c"])]),
    ],
)
def test_forms_of_an_item(text: str, expected: list[Any]) -> None:
    client = Client().feed(PROLOGUE, item(text))
    assert client.items == expected
    client.feed(FINAL["json"], SENTINEL)
    assert client.receiver.error is None


@pytest.mark.parametrize("text", ['{"data":{"data":9},"complete_final":true}', '[{"data":9},true]'])
def test_the_final_frame_may_carry_the_last_item(text: str) -> None:
    client = Client().feed(PROLOGUE, item(text), SENTINEL)
    assert client.items == [9]
    assert client.receiver.ended
    assert client.receiver.error is None


def test_a_final_frame_with_null_data() -> None:
    client = Client().feed(PROLOGUE, item('{"data":null,"complete_final":true}'), SENTINEL)
    assert client.items == []
    assert client.receiver.error is None


def test_an_empty_frame_is_skipped() -> None:
    client = Client().feed(
        PROLOGUE, encode_frame(), encode_item(1, "json"), encode_frame(), FINAL["json"], encode_frame(), SENTINEL
    )
    assert client.items == [1]
    assert client.receiver.error is None


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (item('{"data":null,"complete_final":false}'), "without an item"),
        (item('{"complete_final":false}'), "without an item"),
        (item('{"data":{"data":1}}'), "cannot be read"),
        (item('{"data":{"data":1},"complete_final":1}'), "cannot be read"),
        (item('{"data":5,"complete_final":false}'), "cannot be read"),
        (item("[1]"), "cannot be read"),
        (item("{"), "cannot be read"),
        (encode_frame(data=b"\xff"), "cannot be read"),
        (FINAL["json"] + encode_item(2, "json"), "after the final one"),
        (FINAL["json"] + FINAL["json"], "after the final one"),
    ],
)
def test_items_that_are_none_end_the_stream_with_an_error(bad: bytes, text: str) -> None:
    client = Client()
    with pytest.raises(PeerProtocolError, match=text):
        client.feed(PROLOGUE, encode_item(1, "json"), bad, encode_item(3, "json"))
    assert client.items == [1]
    assert isinstance(client.error(), PeerProtocolError)
    assert client.reader.closed
    assert client.reader.data_to_send() == KILL


@pytest.mark.parametrize(
    "bad",
    [
        encode_frame(b'"sentinel"', b"data"),
        encode_frame(b"header", b"data"),
        STOP,
        KILL,
        encode_frame(b'"pause"'),
        encode_frame(b"\xff"),
        b"\xff" * 24,
    ],
)
def test_frames_that_break_the_protocol_truncate_the_stream(bad: bytes) -> None:
    client = Client()
    with pytest.raises(PeerProtocolError):
        client.feed(PROLOGUE, encode_item(1, "json"), bad)
    assert client.items == [1]
    assert isinstance(client.error(), StreamIncomplete)
    assert client.reader.data_to_send() == KILL
    early = Client()
    with pytest.raises(PeerProtocolError):
        early.feed(PROLOGUE, bad)
    assert type(early.error()) is Disconnected


@pytest.mark.parametrize(
    "bad", [encode_item(1, "json"), encode_frame(), SENTINEL, encode_frame(b"[]"), encode_frame(b"{}", b"x")]
)
def test_a_malformed_prologue_lets_another_instance_try(bad: bytes) -> None:
    client = Client()
    with pytest.raises(PeerProtocolError, match="malformed prologue"):
        client.feed(bad)
    error = client.error()
    assert type(error) is Disconnected
    assert error.retryable


def test_an_end_before_the_prologue() -> None:
    client = Client()
    client.reader.receive_eof()
    assert type(client.error()) is Disconnected
    assert client.error().phase == "prologue"


def test_a_sentinel_without_final_is_truncation() -> None:
    assert isinstance(Client().feed(PROLOGUE, encode_item(1, "json"), SENTINEL).error(), StreamIncomplete)


def test_a_final_without_sentinel_is_complete_at_the_end_of_the_connection() -> None:
    client = Client().feed(PROLOGUE, FINAL["json"])
    assert not client.receiver.ended
    client.reader.receive_eof()
    assert client.receiver.ended
    assert client.receiver.error is None
    client.reader.receive_eof()


def test_the_end_inside_of_a_frame_is_truncation() -> None:
    client = Client().feed(PROLOGUE, encode_item(1, "json"), encode_item(2, "json")[:-1])
    client.reader.receive_eof()
    assert client.items == [1]
    assert isinstance(client.error(), StreamIncomplete)


def test_after_an_error_item_only_the_sentinel_matters() -> None:
    failed = item('{"data":{"event":"error","error":{"error_type":"ResourceExhausted","message":"m"}},"complete_final":false}')
    client = Client().feed(PROLOGUE, encode_item(1, "json"), failed)
    assert type(client.error()) is Overloaded
    assert not client.reader.closed
    client.feed(encode_item(2, "json"), FINAL["json"])
    assert client.items == [1]
    client.feed(SENTINEL)
    assert client.reader.closed
    assert client.reader.data_to_send() == b""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data":{"event":"error","comment":["a","b"]},"complete_final":false}', "a, b"),
        ('{"data":{"event":"error"},"complete_final":false}', "unknown error"),
        ('{"data":{"error":{"error_type":"Unknown","message":"quiet"}},"complete_final":false}', "quiet"),
        ('{"data":{"event":"error","error":{"error_type":"Brand new","message":"m"}},"complete_final":false}', "m"),
    ],
)
def test_forms_of_an_error_item(text: str, message: str) -> None:
    error = Client().feed(PROLOGUE, item(text)).error()
    assert isinstance(error, EngineError)
    assert error.message == message


def test_an_oversized_item_is_refused_before_it_arrives() -> None:
    client = Client(limit=1000)
    with pytest.raises(PeerProtocolError, match="1001 bytes is larger than the limit of 1000"):
        client.feed(PROLOGUE, encode_frame(data=b"x" * 1001)[:24])
    assert client.reader.closed


def test_items_of_a_type() -> None:
    class Token(msgspec.Struct):
        text: str

    client = Client(item_type=Token).feed(PROLOGUE, encode_item({"text": "a"}, "json"))
    assert client.items == [Token("a")]
    with pytest.raises(PeerProtocolError, match="Expected `str`"):
        client.feed(encode_item({"text": 5}, "json"))
    assert isinstance(client.error(), PeerProtocolError)


# -- what the client wants


def test_stop_waits_for_the_prologue_and_is_sent_once() -> None:
    client = Client()
    client.reader.stop()
    assert client.reader.data_to_send() == b""
    client.feed(PROLOGUE)
    assert client.reader.data_to_send() == STOP
    client.reader.stop()
    assert client.reader.data_to_send() == b""
    client.feed(encode_item(1, "json"), FINAL["json"], SENTINEL)
    assert client.items == [1]
    assert client.receiver.error is None


def test_kill_after_stop_is_a_second_frame() -> None:
    client = Client().feed(PROLOGUE)
    client.reader.stop()
    client.reader.kill()
    client.reader.kill()
    assert client.reader.data_to_send() == STOP + KILL
    assert client.reader.closed


def test_nothing_is_delivered_after_a_kill() -> None:
    client = Client().feed(PROLOGUE, encode_item(1, "json"))
    client.reader.kill()
    client.feed(encode_item(2, "json"), SENTINEL)
    client.reader.receive_eof()
    assert client.items == [1]
    assert not client.receiver.ended  # its owner ends it


# -- the window


def test_frames_beyond_the_window_wait() -> None:
    client = Client().feed(PROLOGUE, *(encode_item(n, "json") for n in range(3 * WINDOW)), FINAL["json"], SENTINEL)
    taken: list[Any] = []
    while not client.receiver.ended:
        assert client.reader.full
        assert len(client.items) == WINDOW
        client.reader.resume()
        assert len(client.items) == WINDOW
        taken += client.items
        client.receiver.items.clear()
        client.reader.resume()
    assert not client.reader.full
    assert [*taken, *client.items] == list(range(3 * WINDOW))


def test_the_end_of_the_connection_delivers_what_was_held() -> None:
    client = Client(window=2).feed(PROLOGUE, *(encode_item(n, "json") for n in range(5)))
    client.reader.receive_eof()
    assert client.items == [0, 1, 2, 3, 4]
    assert isinstance(client.error(), StreamIncomplete)


def test_data_that_comes_although_the_window_is_full_is_not_lost() -> None:
    client = Client(window=2).feed(PROLOGUE, *(encode_item(n, "json") for n in range(5)))
    client.feed(encode_item(5, "json"))
    assert client.items == [0, 1, 2, 3, 4]
    client.receiver.items.clear()
    client.reader.resume()
    assert client.items == [5]


@pytest.mark.parametrize("last", [item('{"data":{"event":"error"},"complete_final":false}'), FINAL["json"]])
def test_the_sentinel_needs_no_room_in_the_window(last: bytes) -> None:
    client = Client(window=3).feed(PROLOGUE, *(encode_item(n, "json") for n in range(2)), last)
    client.receiver.items.append("one more")
    client.feed(SENTINEL)
    assert client.reader.closed


def test_a_kill_drops_what_was_held() -> None:
    client = Client(window=2).feed(PROLOGUE, *(encode_item(n, "json") for n in range(5)))
    client.reader.kill()
    assert not client.reader.full
    client.reader.resume()
    assert client.items == [0, 1]
