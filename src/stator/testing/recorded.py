"""Bytes recorded from running peers: each file holds exactly what one side put on a socket.

The peer is Dynamo 1.3.1 unless the name says otherwise. Numbers: 01–07 a client, 20–24 a worker's acknowledgements, 30–37 a
worker's call-home connections, 40–42 a client and a worker over NATS, 50–52 discovery records, 60 a client of 1.6.1.
"""

from importlib.resources import files

__all__ = ["recorded", "recorded_names"]

_FOLDER = files("stator.testing") / "recorded"


def recorded_names(prefix: str = "") -> list[str]:
    """The names that begin with `prefix`, sorted."""
    return sorted(entry.name for entry in _FOLDER.iterdir() if entry.name.startswith(prefix))


def recorded(prefix: str) -> bytes:
    """The one recording whose name begins with `prefix`, such as "30-"; `LookupError` if there is none or several."""
    names = recorded_names(prefix)
    if len(names) != 1:
        raise LookupError(f"{len(names)} recordings begin with {prefix!r}: {names}")
    return (_FOLDER / names[0]).read_bytes()
