"""When a certificate begins and ends to be valid, read from its PEM file: the standard library shows that only of a peer's certificate."""

import ssl
from collections.abc import Iterator
from datetime import UTC, datetime

import msgspec

__all__ = ["Validity", "read_validity"]

_SEQUENCE, _VERSION = 0x30, 0xA0
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18
_END = "-----END CERTIFICATE-----"
_BEGIN = "-----BEGIN CERTIFICATE-----"


class Validity(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds since the epoch."""

    begins: float
    ends: float

    def ending(self, now: float) -> bool:
        """Whether less than a tenth of the time is left, and less than two weeks."""
        return self.ends - now < min((self.ends - self.begins) / 10, 14 * 86400.0)


def read_validity(pem: str) -> Validity:
    """Of the first certificate in `pem`, which in a chain is that of the process. `ValueError` if there is none."""
    start = pem.find(_BEGIN)
    end = pem.find(_END, start)
    if start < 0 or end < 0:
        raise ValueError("no certificate found")
    try:
        return _validity(ssl.PEM_cert_to_DER_cert(pem[start : end + len(_END)]))
    except (IndexError, StopIteration, UnicodeDecodeError) as error:
        raise ValueError("not a certificate") from error


def _validity(der: bytes) -> Validity:
    """RFC 5280 §4.1: the certificate begins with `tbs`, that with `[0] version?, serial, algorithm, issuer, validity { from, to }`."""
    _, certificate = next(_elements(der))
    _, to_be_signed = next(_elements(certificate))
    fields = [element for element in _elements(to_be_signed) if element[0] != _VERSION]
    tag, validity = fields[3]
    times = list(_elements(validity))
    if tag != _SEQUENCE or len(times) != 2:
        raise ValueError("not a certificate")
    return Validity(begins=_time(*times[0]), ends=_time(*times[1]))


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The elements that follow each other in `data`, as tag and content."""
    position = 0
    while position < len(data):
        tag, size = data[position], data[position + 1]
        position += 2
        if size & 0x80:
            count = size & 0x7F
            size = int.from_bytes(data[position : position + count], "big")
            position += count
        yield tag, data[position : position + size]
        position += size


def _time(tag: int, content: bytes) -> float:
    if tag not in (_UTC_TIME, _GENERALIZED_TIME):
        raise ValueError("not a certificate")
    text = content.decode("ascii")
    if tag == _UTC_TIME:  # two digits: 1950 to 2049
        text = ("20" if int(text[:2]) < 50 else "19") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()
