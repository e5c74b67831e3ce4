"""The file backend is a discovery, whether it is told of changes or polls for them."""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest

from stator.discovery import FileDiscoveryConfig, open_file
from stator.discovery.file_names import file_name
from stator.protocol.records import RecordKey
from stator.tasks import SystemClock
from stator.testing.discovery_suite import Connect, StoredDiscoverySuite


class FileSuite(StoredDiscoverySuite):
    watching: Literal["auto", "polling"]

    @pytest.fixture(autouse=True)
    def private_root(self, tmp_path: Path) -> None:
        self.root = tmp_path / "root"

    @asynccontextmanager
    async def cluster(self) -> AsyncIterator[Connect]:
        config = FileDiscoveryConfig(root=str(self.root), watching=self.watching, poll_interval=0.05)
        yield lambda: open_file(config, clock=SystemClock(), random=Random())

    async def plant(self, key: RecordKey, data: bytes) -> None:
        await asyncio.to_thread(self._plant, self.root / key.bucket, key, data)

    @staticmethod
    def _plant(directory: Path, key: RecordKey, data: bytes) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / ".tmp_0123456789abcdef"
        temporary.write_bytes(data)
        os.rename(temporary, directory / file_name(key))


class TestFileDiscovery(FileSuite):
    watching = "auto"


class TestFileDiscoveryPolling(FileSuite):
    watching = "polling"


async def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "discovery.md"
    (example,) = re.findall(r"```python\n(.*?)```", await asyncio.to_thread(page.read_text), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, str(page), "exec"), names)
    async with asyncio.timeout(20):
        await names["main"](str(tmp_path))
