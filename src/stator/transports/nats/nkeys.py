"""nkeys: Ed25519 keys as NATS writes them, in base32 with a role in front and a checksum behind.

A seed is `(S << 3 | role >> 5), (role & 31) << 3, 32 bytes, crc16`; a public key `role << 3 …, 32 bytes, crc16` (little-endian CRC).
Signing needs the package `cryptography`, which is imported when a key is used.
"""

import base64
import binascii
from collections.abc import Callable

import msgspec

from stator.errors import ConfigError

__all__ = ["NatsKey", "read_seed"]

_SEED = 18 << 3
_USER = 20 << 3
_SIZE = 32


class NatsKey(msgspec.Struct, frozen=True, kw_only=True):
    """Who we are (`public`), and how to prove it. Shows no secret."""

    public: str
    sign: Callable[[str], bytes]
    """the signature of a server's nonce, in base64"""

    def __repr__(self) -> str:
        return f"NatsKey({self.public})"


def read_seed(text: str, *, source: str) -> NatsKey:
    """The key of a seed (`SU…`). `ConfigError` names `source` for a text that is none, and the extra if `cryptography` is missing."""
    private = _private(text, source)
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError as error:
        raise ConfigError(f"{source} needs the package cryptography: pip install 'stator[certs]'") from error
    key = Ed25519PrivateKey.from_private_bytes(private)

    def sign(nonce: str) -> bytes:
        return base64.b64encode(key.sign(nonce.encode()))

    return NatsKey(public=_encode(bytes((_USER,)) + key.public_key().public_bytes_raw()), sign=sign)


def _private(text: str, source: str) -> bytes:
    """The 32 bytes of a user's seed. The text is a secret: no message repeats it."""
    text = text.strip()
    try:
        raw = base64.b32decode(text + "=" * (-len(text) % 8))
    except (ValueError, UnicodeEncodeError) as error:
        raise ConfigError(f"{source} is not the seed of an nkey: not base32") from error
    if len(raw) != 2 + _SIZE + 2 or raw[0] & 0xF8 != _SEED:
        raise ConfigError(f"{source} is not the seed of an nkey: those begin with S and have 58 letters")
    if binascii.crc_hqx(raw[:-2], 0) != int.from_bytes(raw[-2:], "little"):
        raise ConfigError(f"{source} is not the seed of an nkey: its checksum is wrong, so a letter of it is")
    role = (raw[0] & 7) << 5 | raw[1] >> 3
    if role != _USER:
        raise ConfigError(f"{source} is the seed of an nkey that is not a user's: those begin with SU")
    return raw[2:-2]


def _encode(raw: bytes) -> str:
    whole = raw + binascii.crc_hqx(raw, 0).to_bytes(2, "little")
    return base64.b32encode(whole).decode().rstrip("=")
