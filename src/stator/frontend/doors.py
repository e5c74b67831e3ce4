"""Which routes need an API key, where keys are asked for (`http.api_keys_path`).

| routes | who may |
|---|---|
| `/health`, `/live` | everybody: probes have no keys |
| `/v1/…` | any key that is good now |
| all others (`/metrics`, `/busy_threshold`, what is added to the application) | clients on this machine, and keys with `admin = true` |

A route is known by what it was registered as, never by how a client spelt its path, and one that nobody thought of is an operator's.
"""

import ipaddress

from aiohttp import web

from stator.frontend.key_account import KeyAccount
from stator.frontend.key_ring import KeyRing

__all__ = ["enter", "is_local"]

_OPEN = ("/health", "/live")
_MODELS = "/v1/"


def enter(request: web.Request, keys: KeyRing) -> KeyAccount | None:
    """Let a request through to its handler; whose it is, None where nobody asks. Raises `Rejected` with 401 or 403."""
    resource = request.match_info.route.resource
    path = request.path if resource is None else resource.canonical
    if path in _OPEN:
        return None
    if not path.startswith(_MODELS) and is_local(request):
        return None
    account = keys.account_of(request.headers, _peer(request))
    if not path.startswith(_MODELS) and not account.record.admin:
        text = "This route is for clients on the same machine and for API keys with `admin = true`."
        raise account.forbidden("admin", text, code="admin_only")
    return account


def is_local(request: web.Request) -> bool:
    """Whether the connection comes from this machine. Headers that proxies set are not looked at: anybody can set them."""
    try:
        address = ipaddress.ip_address(_peer(request).partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _peer(request: web.Request) -> str:
    """The address at the other end of the connection; "?" if there is none."""
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    return str(peer[0]) if isinstance(peer, tuple) and peer else "?"  # pyright: ignore[reportUnknownArgumentType]  # of a socket
