"""Serving several endpoints from one process of the reference; run with the reference's own interpreter.

Of endpoints that it registers at the same time some are not kept alive, in about one process of ten: they are listed,
and gone 13 s later. So each is registered before the next one is; in a directory that is seen, elsewhere it has a second.
"""

import asyncio
import os
from pathlib import Path


def registered():
    """How many endpoints are listed in the directory of this process."""
    instances = Path(os.environ["DYN_FILE_KV"]) / "v1" / "instances"
    return sum(not path.name.startswith(".tmp_") for path in instances.glob("*"))


async def one_by_one(*starts):
    """Serve all of them until the process ends. Each start gives a future of the reference, which runs from there on."""
    tasks = []
    for start in starts:
        before = registered()
        tasks.append(asyncio.ensure_future(start()))
        if os.environ["DYN_DISCOVERY_BACKEND"] != "file":
            await asyncio.sleep(1)
            continue
        while registered() == before and not tasks[-1].done():
            await asyncio.sleep(0.01)
    await asyncio.gather(*tasks)
