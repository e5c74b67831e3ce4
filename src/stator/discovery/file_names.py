"""Names of the files that hold records: the key below its bucket, every byte but `A-Za-z0-9` as `%XX` (`spec/20 §4.1`)."""

from random import Random
from urllib.parse import unquote_to_bytes

from stator.errors import PeerProtocolError, UsageError
from stator.protocol.records import RecordKey

__all__ = ["MAX_NAME", "file_name", "is_temporary", "read_file_name", "temporary_name"]

MAX_NAME = 255
"""bytes in a file name on Linux"""

_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
_TEMPORARY = ".tmp_"


def file_name(key: RecordKey) -> str:
    """The name for `key`; `UsageError` when it is longer than a file name may be or no Unicode text."""
    try:
        path = key.path.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the names in {str(key)!r} are not valid text") from error
    name = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in path)
    if len(name) > MAX_NAME:
        raise UsageError(f"the names in {key} are too long for file discovery: {len(name)} of {MAX_NAME} bytes once encoded")
    return name


def read_file_name(bucket: str, name: str) -> RecordKey:
    """The key of a file in `bucket`; `PeerProtocolError` unless it is exactly the name that `file_name` gives to that key."""
    try:
        key = RecordKey.parse(bucket, unquote_to_bytes(name).decode())
        exact = file_name(key) == name
    except (UnicodeError, UsageError) as error:
        raise PeerProtocolError(f"{name!r} is not the file name of a record: {error}") from error
    if not exact:
        raise PeerProtocolError(f"{name!r} is not the file name of a record: it should be {file_name(key)!r}")
    return key


def temporary_name(random: Random) -> str:
    """A name for a file that is still being written: `.tmp_` and 16 hex digits. Readers ignore it."""
    return f"{_TEMPORARY}{random.getrandbits(64):016x}"


def is_temporary(name: str) -> bool:
    """Whether a file of this name is still being written, or was left behind by a writer that died."""
    return name.startswith(_TEMPORARY)
