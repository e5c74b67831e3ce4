"""What a client of the compatible plane sends, whatever it goes by: the control message and the value (`spec/10 §2`)."""

import msgspec

from stator.protocol.control_message import CallHomeAddress, ConnectionInfo, ControlMessage, encode_control_message
from stator.protocol.envelope import Codec, RequestEnvelope
from stator.protocol.records import EndpointRecord
from stator.protocol.two_part import message_parts
from stator.protocol.values import from_json
from stator.transports.tcp.call_home import ExpectedStream

__all__ = ["codec_of", "request_parts"]


def codec_of(record: EndpointRecord, default: Codec) -> Codec:
    """The record's codec if it names one that is known (`spec/10 §8`), else `default`."""
    match record.request_plane_codec:
        case "json":
            return "json"
        case "msgpack":
            return "msgpack"
        case _:
            return default


def request_parts(envelope: RequestEnvelope, stream: ExpectedStream, codec: Codec) -> tuple[bytes, bytes, bytes]:
    """The TwoPart message of a request in its parts; it says that `stream` and its inputs are at home at their listener.

    Raises `UsageError` when the control message is too large.
    """
    home = CallHomeAddress(address=stream.home.address, subject=stream.subject, context=envelope.id)
    message = ControlMessage(id=envelope.id, payload_codec=codec, connection_info=ConnectionInfo.of(home))
    payload = from_json(envelope.payload, codec) if stream.inputs is None else b""
    if stream.inputs is not None:
        inputs = msgspec.structs.replace(home, subject=stream.inputs.subject, stream_type="request")
        message = msgspec.structs.replace(
            message, request_type="many_in", request_stream_connection_info=ConnectionInfo.of(inputs)
        )
    if envelope.metadata:
        message = msgspec.structs.replace(message, metadata=dict(sorted(envelope.metadata.items())))
    return message_parts(encode_control_message(message), payload)
