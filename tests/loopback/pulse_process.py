"""A process with a pulse and a way to pass its time. Usage: pulse_process.py HOW; says the pulse's port, then does it until killed.

`idle` runs its event loop; `sleep`, `busy` and `native` block it: in the kernel, in Python, in calls of C that hold the interpreter.
"""

import asyncio
import sys
import time

from stator.tasks import SystemClock
from stator.transports.native.pulse import Pulse


async def main(how: str) -> None:
    pulse = Pulse("127.0.0.1", "a" * 32, SystemClock())
    pulse.start(asyncio.get_running_loop())
    print(pulse.port, flush=True)
    await asyncio.sleep(0.2)
    if how == "idle":
        await asyncio.sleep(600)
    if how == "sleep":
        time.sleep(600)
    while how == "busy":
        pass
    while how == "native":
        sum(range(2_000_000))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
