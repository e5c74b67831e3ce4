"""Bytes of an unfinished frame, kept so that parsing stays linear in the bytes received."""

__all__ = ["LARGE", "Data", "Partial"]

Data = bytes | memoryview
"""Payloads: a view where they are large, so that megabytes are not copied once more."""

LARGE = 65_536
"""bytes from which a payload is a view"""

_SMALL = 4096
_RUN = 65_536


class Partial:
    """What one received chunk leaves for the next. Every byte is copied at most three times, however it was split.

    The parser says how many bytes its next step needs; until they are there, chunks are only kept, nothing is looked at. Small chunks
    are gathered in runs, so that a sender of single bytes costs no more memory than it sent.
    """

    __slots__ = ("_chunks", "_held", "_need", "_run")

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._run = bytearray()
        self._held = 0
        self._need = 0

    def __len__(self) -> int:
        return self._held

    def join(self, data: bytes) -> bytes | None:
        """All bytes not yet parsed, or None while they are too few for the next step."""
        if not self._held:
            return data
        self._add(data)
        if self._held < self._need:
            return None
        if self._run:
            self._close_run()
        chunks, self._chunks = self._chunks, []
        self._held = 0
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def keep(self, data: bytes, offset: int, need: int) -> None:
        """Keep `data` from `offset` on until `need` bytes are there."""
        if offset < len(data):
            self._add(data[offset:] if offset else data)
        self._need = need

    def _add(self, data: bytes) -> None:
        self._held += len(data)
        if len(data) < _SMALL:
            self._run += data
            if len(self._run) >= _RUN:
                self._close_run()
        else:
            if self._run:
                self._close_run()
            self._chunks.append(data)

    def _close_run(self) -> None:
        self._chunks.append(bytes(self._run))
        self._run = bytearray()
