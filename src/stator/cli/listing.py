"""`stator ls`: what discovery knows."""

import sys
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stator.cli.joining import Joining
from stator.discovery import DiscoveryStatus
from stator.protocol.ids import format_instance_id
from stator.protocol.records import EndpointRecord, ModelRecord, NativeAddress, Query, Transport
from stator.runtime import Runtime
from stator.tasks import SystemClock

__all__ = ["list_cluster", "where"]

_WIDE = 1000
"""columns, where the output is no terminal"""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One instance of one endpoint."""

    endpoint: str
    instance: str
    model: str
    address: str
    native: str
    device: str
    seen: float | None
    """seconds since its owner's last sign of life; None: unknown"""
    stale: float | None
    """seconds since discovery has not answered: all this was so then; None: it answers"""


async def list_cluster(joining: Joining, *, as_json: bool) -> int:
    """Print the instances. Returns the exit status."""
    async with Runtime.connect(**joining.settings) as runtime:
        discovery = runtime.discovery
        endpoints = await discovery.list(Query(EndpointRecord.bucket))
        models = await discovery.list(Query(ModelRecord.bucket))
        seen = await discovery.last_seen(Query(EndpointRecord.bucket))
        status = discovery.status
    now = SystemClock().wall()
    names = _names(models)
    rows = [
        Row(
            endpoint=str(record.endpoint_id),
            instance=format_instance_id(record.instance_id),
            model=names.get((record.endpoint_id.segments, record.instance_id), ""),
            address=_compatible(record.transport),
            native=record.stator.address if isinstance(record.stator, NativeAddress) else "",
            device=record.device_type or "",
            seen=max(0.0, now - seen[record.key]) if record.key in seen else None,
            stale=None if status.stale_since is None else max(0.0, now - status.stale_since),
        )
        for record in endpoints
        if isinstance(record, EndpointRecord)
    ]
    if as_json:
        for row in rows:
            sys.stdout.write(msgspec.json.encode(row).decode() + "\n")
        return 0
    _print(rows, where(status, now))
    return 0


def where(status: DiscoveryStatus, now: float) -> str:
    """The place of the records for people, and since when they are only what was known, seen from `now` (wall-clock seconds)."""
    place = f"{status.backend} {status.location}".strip()
    if status.stale_since is None:
        return place
    return f"{place}, which has not answered for {max(0.0, now - status.stale_since):.1f} s: {status.reason}"


def _compatible(transport: Transport) -> str:
    """Where requests of the compatible plane go; a NATS subject says that it is one."""
    return transport.tcp or (f"nats {transport.nats_tcp}" if transport.nats_tcp else transport.http or "")


def _names(models: list[Any]) -> dict[tuple[tuple[str, ...], int], str]:
    names: dict[tuple[tuple[str, ...], int], str] = {}
    for record in models:
        if isinstance(record, ModelRecord) and not isinstance(record.model_suffix, str):
            names[record.endpoint_id.segments, record.instance_id] = str(record.card_json.get("display_name", ""))
    return names


def _print(rows: list[Row], location: str) -> None:
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDE  # whoever reads it is no person: one line per instance
    if not rows:
        console.print(f"nothing is registered ({escape(location)})", soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    for title in ("endpoint", "instance", "model", "native plane", "compatible plane", "device", "seen"):
        table.add_column(title, overflow="fold")
    for row in rows:
        age = "" if row.seen is None else f"{row.seen:.1f} s ago"
        table.add_row(row.endpoint, row.instance, escape(row.model), row.native or "–", row.address or "–", row.device, age)
    console.print(table)
    console.print(f"[dim]{len(rows)} instance{'' if len(rows) == 1 else 's'} ({escape(location)})[/]", soft_wrap=True)
