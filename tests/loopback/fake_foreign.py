"""What the stand-ins for vLLM and SGLang share: their tokens, their prefix caches with KV events, and how imports find them.

Token n of an answer is (sum of the prompt + n) % 500 + 5.
"""

import struct
import sys
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import msgspec
import pytest
import zmq

STEP = 0.001
"""seconds"""
EOS = 250
"""the tokenizer's own end of sequence"""


def next_token(prompt: Sequence[int], count: int) -> int:
    """The one after `count`."""
    return (sum(prompt) + count) % 500 + 5


def load_for(milliseconds: int) -> None:
    """Loading blocks; by other means than those the tests forbid."""
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.poll(milliseconds)


class PrefixCache:
    """Of one rank. With an `endpoint`, what it stores is published at its port + rank; each event has the `more` fields, too."""

    def __init__(self, rank: int, *, block_size: int, endpoint: str | None, more: Mapping[str, Any] | None = None) -> None:
        self._rank = rank
        self._size = block_size
        self._more = more or {}
        self._cached: set[tuple[int, ...]] = set()
        self._sequence = 0
        self._publisher = None if endpoint is None else _publisher(endpoint, rank)

    def look_up(self, ids: Sequence[int]) -> tuple[int, int]:
        """Tokens in whole blocks, and how many of them were here; the others are now."""
        looked_up = hit = 0
        parent = None
        for start in range(0, len(ids) - self._size + 1, self._size):
            prefix = tuple(ids[: start + self._size])
            name = hash(prefix)
            looked_up += self._size
            if prefix in self._cached:
                hit += self._size
            else:
                self._cached.add(prefix)
                self._store(name, parent, list(prefix[start:]))
            parent = name
        return looked_up, hit

    def _store(self, name: int, parent: int | None, ids: list[int]) -> None:
        if self._publisher is None:
            return
        event = {
            "type": "BlockStored",
            "block_hashes": [name],
            "parent_block_hash": parent,
            "token_ids": ids,
            "block_size": self._size,
            "lora_id": None,
            "medium": "GPU",
            **self._more,
        }
        batch = msgspec.msgpack.encode([time.time(), [event], self._rank])
        self._publisher.send_multipart([b"", struct.pack(">q", self._sequence), batch])
        self._sequence += 1

    def close(self) -> None:
        if self._publisher is not None:
            self._publisher.context.destroy(linger=0)


def _publisher(endpoint: str, rank: int) -> Any:
    address, _, port = endpoint.rpartition(":")
    assert "*" not in address, "binds all interfaces"
    socket = zmq.Context().socket(zmq.PUB)
    socket.connect(f"{address}:{int(port) + rank}")
    return socket


def install_modules(monkeypatch: pytest.MonkeyPatch, contents: Mapping[str, Mapping[str, Any]]) -> None:
    """Put modules with these contents where imports find them, the library's own name first, and have our side of the border
    imported afresh."""
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]  # a package
        for attribute, value in attributes.items():
            setattr(module, attribute, value)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, f"stator.engines.{next(iter(contents))}_library", raising=False)
