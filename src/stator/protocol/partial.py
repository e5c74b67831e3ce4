"""Bytes of an unfinished frame, kept so that parsing stays linear in the bytes received."""

__all__ = ["Partial"]


class Partial:
    """What one received chunk leaves for the next. Every byte is copied at most a fixed number of times, however it was split.

    The parser says how many bytes its next step needs; until they are there, chunks are only appended, nothing is looked at.
    """

    __slots__ = ("_held", "_need")

    def __init__(self) -> None:
        self._held = bytearray()
        self._need = 0

    def __len__(self) -> int:
        return len(self._held)

    def join(self, data: bytes) -> bytes | None:
        """All bytes not yet parsed, or None while they are too few for the next step."""
        if not self._held:
            return data
        self._held += data
        if len(self._held) < self._need:
            return None
        whole = bytes(self._held)
        self._held = bytearray()
        return whole

    def keep(self, data: bytes, offset: int, need: int) -> None:
        """Keep `data` from `offset` on until `need` bytes are there."""
        if offset < len(data):
            self._held += memoryview(data)[offset:] if offset else data
        self._need = need
