"""A worker on the HTTP/2 plane beside clients of the reference, which know no such record."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from interop.peers import discovery_root, needs_reference, peer, records_in
from stator.runtime import Runtime
from stator.runtime.plugins import load_plugin

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]

ENDPOINT = "demo.backend.meshed"


def says(word: str) -> Any:
    async def handler(request: Any) -> AsyncIterator[Any]:
        yield word

    return handler


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    load_plugin("stator.transports", "http2")
    return discovery_root(tmp_path_factory)


async def test_a_client_of_the_reference_passes_over_an_http_worker_and_finds_the_other(root: Path) -> None:
    common: dict[str, Any] = {"discovery": "file", "file__root": str(root)}
    with peer("peer_client.py", root) as client:
        async with (
            Runtime.connect(plane="compatible", request_plane="http2", **common) as meshed,
            meshed.endpoint(ENDPOINT).serving(says("http")),
            Runtime.connect(plane="compatible", request_plane="tcp", **common) as plain,
            plain.endpoint(ENDPOINT).serving(says("tcp")),
            Runtime.connect(plane="auto", **common) as caller,
        ):
            written = [record.transport for record in records_in(root)]
            assert sorted([transport.http is not None, transport.tcp is not None] for transport in written) == [
                [False, True],
                [True, False],
            ]
            answers = [await client.ask(endpoint=ENDPOINT, request=number) for number in range(10)]
            assert [(answer["items"], answer["error"]) for answer in answers] == [(["tcp"], None)] * 10
            ours = await caller.endpoint(ENDPOINT).client(policy="round_robin")
            await ours.wait_for_instances(2)
            heard = [(await ours.generate(number).collect())[0] for number in range(10)]
            assert sorted(heard) == ["http"] * 5 + ["tcp"] * 5
