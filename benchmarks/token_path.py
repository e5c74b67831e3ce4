"""What does one token cost inside one process: nanoseconds per item for each step of its way.

Every function named `step_…` is a step: it imports what it needs, prepares a batch of `BATCH` items and returns the work to be
timed together with the result the work must have. This is the only benchmark that imports more than Stator's public names.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

import msgspec

from benchmarks.handler import expected_items
from benchmarks.report import Plan, Report, Row, Samples

__all__ = ["BATCH", "answer"]

BATCH = 64
Work = Callable[[], Any]
Step = Callable[[], tuple[Work, Any]]

_ITEMS = expected_items(BATCH)
_ENCODED = [msgspec.json.encode(item) for item in _ITEMS]
_SECONDS, _QUICK_SECONDS = 0.1, 0.005
_CONTENDER = "stator"

_METHOD = (
    f"One process, one thread, no event loop; batches of {BATCH} items of ~35 bytes, the figure is per item.",
    "The result of each step is compared with what it must be before the clock starts; steps alternate inside each repeat.",
    "`floor …` is the codec alone, for comparison.",
)


def answer(plan: Plan) -> Report:
    """Time every step of this module."""
    samples, unavailable = Samples(), dict[str, str]()
    works = dict[str, Work]()
    for name, step in _discover().items():
        try:
            work, expected = step()
            result = work()
        except Exception as error:
            unavailable[name] = f"{type(error).__name__}: {error}"
            continue
        if result == expected:
            works[name] = work
        else:
            unavailable[name] = "wrong answer"
    seconds = _QUICK_SECONDS if plan.quick else _SECONDS
    for repeat in range(plan.repeats):
        for name, work in works.items():
            samples.add(name, _CONTENDER, repeat, {"ns": _nanoseconds(work, seconds)})
    return Report(
        name="token_path",
        question=(__doc__ or "").partition("\n")[0],
        method=_METHOD,
        rows=[Row(name=name, title=name.replace("_", " "), metric="ns", unit="ns") for name in works],
        contenders=[(_CONTENDER, "Stator")],
        samples=samples,
        unavailable=unavailable,
    )


def _discover() -> dict[str, Step]:
    return {name.removeprefix("step_"): step for name, step in globals().items() if name.startswith("step_")}


def _nanoseconds(work: Work, seconds: float) -> float:
    """Per item, over at least `seconds`."""
    batches, took = 1, 0.0
    while took < seconds:
        batches = max(batches * 2, int(batches * seconds / took) if took else 1)
        began = time.perf_counter()
        for _ in itertools.repeat(None, batches):
            work()
        took = time.perf_counter() - began
    return took / batches / BATCH * 1e9


def step_floor_encode() -> tuple[Work, Any]:
    encode = msgspec.json.Encoder().encode
    return lambda: [encode(item) for item in _ITEMS], _ENCODED


def step_floor_decode() -> tuple[Work, Any]:
    decode = msgspec.json.Decoder().decode
    return lambda: [decode(data) for data in _ENCODED], _ITEMS


def step_encode_value() -> tuple[Work, Any]:
    """With the checks of the data model."""
    from stator.protocol.values import encode_json

    return lambda: [encode_json(item) for item in _ITEMS], _ENCODED


def step_native_stream() -> tuple[Work, Any]:
    """Worker's session to client's session: encode, frame, unframe, decode, credit; no socket."""
    from stator.protocol.values import encode_json

    worker, stream, client, receiver = _native_pair()

    def work() -> list[Any]:
        for item in _ITEMS:
            stream.push(encode_json(item))
        client.receive_data(worker.outgoing.data_to_send(), 0.0)
        items = list(receiver.items)
        receiver.items.clear()
        client_stream.taken()
        worker.receive_data(client.outgoing.data_to_send(), 0.0)
        return items

    (client_stream,) = client.streams.values()
    return work, _ITEMS


def step_native_frames_in() -> tuple[Work, Any]:
    """One ITEMS frame per item, as paced streams bring them: unframe only."""
    from stator.protocol.native.frames import ITEMS, FrameReader, frame

    data = b"".join(frame(ITEMS, 1, item, count=1) for item in _ENCODED)
    reader = FrameReader()
    return lambda: [payload for *_, payload in reader.feed(data)], _ENCODED


def step_compatible_out() -> tuple[Work, Any]:
    """Encode and wrap, as the worker's end of a call-home stream does."""
    from stator.protocol.response_stream import ResponseWriter

    writer = ResponseWriter(subject="benchmark", codec="json")
    writer.accept()
    writer.data_to_send()

    def work() -> int:
        for item in _ITEMS:
            writer.send(item)
        return sum(map(len, writer.data_to_send()))

    return work, work()


def step_compatible_in() -> tuple[Work, Any]:
    """Unwrap and decode, as the client's end of a call-home stream does."""
    from stator.protocol.response_stream import ResponseReader, ResponseWriter
    from stator.protocol.stream import Receiver

    receiver = Receiver()
    reader = ResponseReader(receiver, codec="json", window=BATCH)
    reader.connected()
    writer = ResponseWriter(subject="benchmark", codec="json")
    writer.data_to_send()  # the handshake is not the reader's business
    writer.accept()
    reader.receive_data(b"".join(writer.data_to_send()))
    for item in _ITEMS:
        writer.send(item)
    data = b"".join(writer.data_to_send())

    def work() -> list[Any]:
        reader.receive_data(data)
        items = list(receiver.items)
        receiver.items.clear()
        return items

    return work, _ITEMS


def step_decode_output() -> tuple[Work, Any]:
    """One engine output, typed, per item."""
    from stator.llm.output import EngineOutput, decode_output, encode_output

    outputs = [EngineOutput(token_ids=[i]) for i in range(BATCH)]
    data = [encode_output(output) for output in outputs]
    return lambda: [decode_output(item) for item in data], outputs


def step_detokenize() -> tuple[Work, Any]:
    """The byte tokenizer's table, one token at a time."""
    from stator.llm.detokenizer import open_detokenizer
    from stator.llm.tokenizer import ByteTokenizer

    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("stator " * BATCH)[:BATCH]
    push = open_detokenizer(tokenizer).push
    return lambda: "".join(map(push, ids)), ("stator " * BATCH)[:BATCH]


def step_postprocess() -> tuple[Work, Any]:
    """Engine outputs to text deltas."""
    from stator.llm.output import EngineOutput
    from stator.llm.postprocess import Postprocessor
    from stator.llm.request import PreprocessedRequest
    from stator.llm.tokenizer import ByteTokenizer

    tokenizer = ByteTokenizer()
    outputs = [EngineOutput(token_ids=[token]) for token in tokenizer.encode("stator " * BATCH)[:BATCH]]
    post = Postprocessor(tokenizer, PreprocessedRequest(token_ids=[1]))
    return lambda: "".join(delta.text for delta in post.push_many(outputs)), ("stator " * BATCH)[:BATCH]


def step_sse_events() -> tuple[Work, Any]:
    """Text deltas to the bytes of chat chunks."""
    from stator.frontend.chunks import CHAT_SHAPE, ChunkWriter
    from stator.llm.postprocess import TextDelta

    writer = ChunkWriter(CHAT_SHAPE, id="benchmark", created=0, model="tiny", choices=1, include_usage=False)
    writer.write([], 0, [TextDelta("", 0)])  # the first chunk has the role
    deltas = [TextDelta(" token", 1) for _ in range(BATCH)]

    def work() -> int:
        out: list[bytes] = []
        writer.write(out, 0, deltas)
        return b"".join(out).count(b"data: ")

    return work, BATCH


def _native_pair() -> tuple[Any, Any, Any, Any]:
    """Two greeted sessions with one accepted stream between them."""
    from stator.protocol.envelope import RequestEnvelope
    from stator.protocol.native.budget import ByteBudget
    from stator.protocol.native.client import ClientSession
    from stator.protocol.native.hello import Hello
    from stator.protocol.native.liveness import LivenessLimits
    from stator.protocol.native.server import ServerSession
    from stator.protocol.stream import Receiver

    streams: list[Any] = []

    class Control:
        def stop(self) -> None: ...

        def kill(self) -> None: ...

    def sink(request: Any, stream: Any) -> Control:
        streams.append(stream)
        return Control()

    def nothing() -> None: ...

    shared: dict[str, Any] = {
        "limits": LivenessLimits(),
        "now": 0.0,
        "wake": nothing,
        "hurry": nothing,
        "greeted": nothing,
    }
    worker = ServerSession(
        hello=Hello(process="0" * 32, role="worker"), budget=ByteBudget(), lookup=lambda path: sink, **shared
    )
    client = ClientSession(hello=Hello(process="1" * 32, role="client"), budget=ByteBudget(), **shared)
    client.receive_data(worker.outgoing.data_to_send(), 0.0)
    worker.receive_data(client.outgoing.data_to_send(), 0.0)
    receiver = Receiver()
    client.open("0/generate", RequestEnvelope(id="benchmark", payload=b"{}"), receiver)
    worker.receive_data(client.outgoing.data_to_send(), 0.0)
    streams[0].accept()
    return worker, streams[0], client, receiver
