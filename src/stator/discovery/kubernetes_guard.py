"""Whether our metadata object is still as we wrote it. Somebody may delete or change it; then it is applied again, but not for a fight."""

import asyncio
import logging
from collections.abc import Mapping

from stator.discovery.kubernetes_objects import Metadata
from stator.discovery.kubernetes_reflector import Reflector
from stator.discovery.kubernetes_writer import MetadataWriter
from stator.protocol.records import Record, RecordKey, decode_record, encode_record

__all__ = ["Guard"]

logger = logging.getLogger(__name__)

_INTERVAL = 5.0
"""seconds between two restorations: more often would be a fight with whoever changes it"""


class Guard:
    """`check` compares what the API server said last of the object called `name` with `owned`."""

    def __init__(
        self, name: str, *, writer: MetadataWriter, metadata: Reflector[Metadata], owned: Mapping[RecordKey, Record]
    ) -> None:
        self._name = name
        self._writer = writer
        self._metadata = metadata
        self._owned = owned
        self._seen = False
        self._restored_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    def check(self) -> None:
        """Have the object applied again if somebody has changed or deleted it."""
        if not self._owned or not self._writer.clean:
            return
        version, found = self._metadata.items.get(self._name, ("", None))
        if found is not None and (version == self._writer.version or version in self._writer.versions):
            self._seen = True
            return
        if not self._seen and not self._metadata.has_reached(self._writer.version, since=self._writer.applied_at):
            return  # news of our own apply are on their way
        if found is not None and found.records == _as_read(self._owned):
            return  # the rest of the object is not ours
        now = asyncio.get_running_loop().time()
        if now < self._restored_at + _INTERVAL:
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(self._restored_at + _INTERVAL - now, self._again)
            return
        self._restored_at = now
        self._seen = False
        logger.warning(
            "somebody has %s DynamoWorkerMetadata %s; it is applied again. If another process of this pod did, use container mode",
            "deleted" if found is None else "changed",
            self._name,
        )
        self._writer.touch()

    def _again(self) -> None:
        self._timer = None
        self.check()

    def close(self) -> None:
        """Look no more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()


def _as_read(records: Mapping[RecordKey, Record]) -> dict[RecordKey, Record]:
    """As they are after a way through JSON."""
    return {key: decode_record(encode_record(record)) for key, record in records.items()}
