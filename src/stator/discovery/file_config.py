"""Settings of the file backend."""

from typing import Annotated, ClassVar, Literal

from stator.config import Config, Setting

__all__ = ["FileDiscoveryConfig"]


class FileDiscoveryConfig(Config, frozen=True, kw_only=True):
    """Where the files are and when an owner counts as dead. All processes that share a root must agree on `ttl`."""

    section: ClassVar[str] = "file"
    location: ClassVar[str] = "root"

    root: Annotated[
        str,
        Setting(
            doc="directory that the processes of one cluster share; empty: one per user, entered by this user alone",
            dyn="DYN_FILE_KV",
        ),
    ] = ""
    ttl: Annotated[
        float,
        Setting(
            doc="an owner silent for longer is dead; signs of life are given every third of it. The reference's is 10",
            unit="s",
            ge=0.3,
        ),
    ] = 10.0
    watching: Annotated[
        Literal["auto", "polling"],
        Setting(doc="how changes are noticed; polling is for network file systems, whose other hosts inotify does not see"),
    ] = "auto"
    poll_interval: Annotated[float, Setting(doc="time between two looks where inotify does not serve", unit="s", ge=0.05)] = 1.0
    answer_timeout: Annotated[
        float,
        Setting(
            doc="longest silence of the disk; after it a registration fails and lists answer what is known", unit="s", gt=0
        ),
    ] = 5.0
