"""How a process joins the cluster, as the command line says it."""

from typing import Annotated, Any

import msgspec
import typer

from stator import settings
from stator.config import Config
from stator.discovery import DiscoveryFactory
from stator.errors import UsageError
from stator.runtime.config import RuntimeConfig
from stator.runtime.discovery_choice import choose_discovery, discovery_name

__all__ = ["CompatibleOption", "DiscoveryOption", "Joining", "PlaneOption", "RequestPlaneOption", "check_joining"]

CompatibleOption = Annotated[
    bool, typer.Option("--compatible", help="Speak with processes of the reference although a cluster secret is set.")
]
DiscoveryOption = Annotated[
    str | None,
    typer.Option(
        "--discovery",
        metavar="NAME[://PLACE]",
        help="Who knows who is there: etcd://host:2379,host2:2379, file:///directory, kubernetes, memory [default: file].",
    ),
]
PlaneOption = Annotated[
    str | None, typer.Option("--plane", help="How requests travel: auto, native, compatible [default: auto].")
]
RequestPlaneOption = Annotated[
    str | None,
    typer.Option("--request-plane", help="What workers take compatible requests by: tcp, nats, http2 [default: tcp]."),
]


class Joining(msgspec.Struct, frozen=True, kw_only=True):
    """What was said; None: nothing, so that the settings decide."""

    discovery: str | None = None
    plane: str | None = None
    request_plane: str | None = None
    compatible: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `Runtime.connect`."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value not in (None, False)}

    @property
    def variables(self) -> dict[str, str | None]:
        """The same for child processes. Their command lines say nothing of it."""
        return {
            f"STATOR_{name.upper()}": str(value).lower() if value is True else value for name, value in self.settings.items()
        }


def check_joining(joining: Joining, *, isolated: bool) -> tuple[DiscoveryFactory, Config]:
    """The discovery that several processes of this machine would meet in. Reads the disk.

    Raises `ConfigError` for settings and `UsageError` where the processes would not find each other.
    """
    config = settings.load(RuntimeConfig, joining.settings)
    found = choose_discovery(config.discovery, {})
    name = discovery_name(config.discovery)
    if name == "memory" or config.plane == "memory":
        what = "discovery" if name == "memory" else "plane"
        raise UsageError(f"{what} = memory is for the parts of one process, and serve starts several; use another one")
    if isolated and (name != "file" or joining.discovery is not None):
        raise UsageError(f"--isolated makes a directory for discovery, and discovery = {config.discovery} is another place")
    return found
