"""An engine's commands on the status server (`spec/45 §11`)."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, cast

from stator.health import EngineRoutes
from stator.worker.engine import EngineCommand
from stator.worker.host import ServedEndpoint

__all__ = ["PAUSING", "RESUMING", "EngineCommands"]

logger = logging.getLogger(__name__)

PAUSING = frozenset({"sleep", "pause_generation", "release_memory_occupation"})
"""controls before which the endpoint leaves discovery"""
RESUMING = frozenset({"wake_up", "resume_generation", "resume_memory_occupation"})
"""controls after which it comes back, if they succeed"""


class EngineCommands:
    """`/engine/control/NAME` and `/engine/update/NAME`, from `offer` to `withdraw`.

    Pausing and resuming commands run one at a time. A pause that fails leaves the endpoint out of discovery, for nobody knows how far it
    came: a resuming command, or the same once more, decides.
    """

    def __init__(
        self, routes: EngineRoutes, controls: Mapping[str, EngineCommand], updates: Mapping[str, EngineCommand]
    ) -> None:
        self._routes = routes
        self._controls = dict(controls)
        self._updates = dict(updates)
        self._turn = asyncio.Lock()
        self._names: list[str] = []
        self._over = False

    def offer(self, served: ServedEndpoint) -> None:
        """From now on."""
        for name, command in self._controls.items():
            self._register(f"control/{name}", self._control(name, command, served))
        for name, command in self._updates.items():
            self._register(f"update/{name}", command)

    def withdraw(self) -> None:
        """No more, and one that still runs brings nothing back. Idempotent."""
        self._over = True
        while self._names:
            self._routes.unregister(self._names.pop())

    def _register(self, name: str, command: EngineCommand) -> None:
        self._routes.register(name, command)
        self._names.append(name)

    def _control(self, name: str, command: EngineCommand, served: ServedEndpoint) -> EngineCommand:
        if name in PAUSING:

            async def pause(body: Any) -> Any:
                async with self._turn:
                    await served.unregister()
                    logger.info("the engine is told to %s", name)
                    return await command(body)

            return pause
        if name in RESUMING:

            async def resume(body: Any) -> Any:
                async with self._turn:
                    answer = await command(body)
                    if succeeded(answer) and not self._over:
                        await served.register()
                        logger.info("the engine goes on after %s", name)
                    return answer

            return resume
        return command


def succeeded(answer: Any) -> bool:
    """Whether a command's answer is none of the two that say it failed."""
    if not isinstance(answer, dict):
        return True
    said = cast(dict[str, Any], answer)
    return said.get("status") != "error" and said.get("success") is not False
