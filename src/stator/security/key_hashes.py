"""API keys: made at random, stored as hashes, found without telling how near a guess was.

A key is `sk-` and 256 random bits. That is why its plain SHA-256 may be stored: salt and a slow hash protect what people can think of,
and nobody guesses 256 bits. It makes one look-up cheap whatever the number of keys, and a wrong key as cheap as a right one. Keys that
come from elsewhere must be as random (128 bits at least): `printf %s "$KEY" | sha256sum` gives their hash.
"""

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable
from secrets import token_bytes
from typing import Generic, TypeVar

from stator.config import Secret

__all__ = ["KEY_PREFIX", "KeyIndex", "hash_text", "new_key", "parse_hash"]

T = TypeVar("T")

KEY_PREFIX = "sk-"
_KEY_BYTES = 32
_LONGEST = 512
"""bytes of a key that is presented; longer ones are wrong, and not hashed"""
_HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")
_HANDLE = 16
"""bytes of a hash by which it is looked up; the others are compared in constant time"""
_NOTHING = bytes(hashlib.sha256().digest_size)


def new_key(random: Callable[[int], bytes] = token_bytes) -> Secret:
    """A fresh key, in hexadecimal; `random` gives as many bytes as it is asked for."""
    return Secret(KEY_PREFIX + random(_KEY_BYTES).hex())


def hash_text(key: Secret) -> str:
    """What is stored of `key`: `sha256:` and 64 hexadecimal digits."""
    return f"sha256:{_digest(key.reveal().encode()).hex()}"


def parse_hash(text: str) -> bytes:
    """The 32 bytes of a stored hash. Raises `ValueError`, whose text does not have `text` in it: it might be a key."""
    match = _HASH.fullmatch(text)
    if match is None:
        raise ValueError("expected sha256: and 64 hexadecimal digits, as `stator keys add` writes it")
    return bytes.fromhex(match[1])


class KeyIndex(Generic[T]):
    """What belongs to each of the keys with these hashes (as from `parse_hash`). Of two equal hashes the last one counts."""

    __slots__ = ("_entries",)

    def __init__(self, entries: Iterable[tuple[bytes, T]] = ()) -> None:
        self._entries = {digest[:_HANDLE]: (digest, value) for digest, value in entries}

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: str) -> T | None:
        """What belongs to `key`, None if it is no key of ours. Nothing of it is kept, and each wrong key costs the same."""
        data = key.encode("utf-8", "surrogateescape")
        digest = _digest(data[:_LONGEST])
        entry = self._entries.get(digest[:_HANDLE])
        same = hmac.compare_digest(digest, _NOTHING if entry is None else entry[0])
        return entry[1] if entry is not None and same and len(data) <= _LONGEST else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
