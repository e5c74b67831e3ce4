"""How a process gets to the API server: as the service account of its pod, or by a kubeconfig. Credentials follow their files.

Everything here reads files and belongs into a thread.
"""

import ipaddress
import logging
import os
import ssl
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from stator import settings
from stator.config import Secret
from stator.discovery.kubernetes_config import KubernetesConfig
from stator.discovery.kubernetes_kubeconfig import Access, Material, read_kubeconfig
from stator.errors import ConfigError

__all__ = ["Credentials", "Ticket", "find_access"]

logger = logging.getLogger(__name__)

Stamp = tuple[int, int, int]


def find_access(config: KubernetesConfig) -> Access:
    """The kubeconfig that the settings name, else the service account, else `~/.kube/config`. Raises `ConfigError`."""
    if config.kubeconfig:
        return read_kubeconfig(Path(part).expanduser() for part in config.kubeconfig.split(os.pathsep) if part)
    if config.host:
        return _in_cluster(config)
    personal = settings.personal_kubeconfig()
    if personal is not None:
        return read_kubeconfig([personal])
    raise ConfigError(
        "no Kubernetes API server is known: this is no pod (KUBERNETES_SERVICE_HOST is not set) and there is no ~/.kube/config; "
        "set KUBECONFIG, or choose another discovery"
    )


def _in_cluster(config: KubernetesConfig) -> Access:
    account = Path(config.service_account)
    for name in ("token", "ca.crt"):
        if not (account / name).is_file():
            raise ConfigError(
                f"the service account has no {name} in {str(account)!r}; "
                "set automountServiceAccountToken: true for the pod, or KUBECONFIG"
            )
    return Access(
        server=f"https://{_bracketed(config.host)}:{config.port}",
        ca=Material(file=account / "ca.crt"),
        token=Material(file=account / "token"),
        namespace=_text_of(account / "namespace"),
    )


def _bracketed(host: str) -> str:
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """What one request carries."""

    token: Secret
    """empty: none"""
    context: ssl.SSLContext | None
    """None: the server speaks plain HTTP"""


class Credentials:
    """The current token and certificates. `current` looks at the files' stamps and reads again what has changed."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._ticket: Ticket | None = None
        self._stamps: dict[Path, Stamp] = {}
        host = urlsplit(access.server).hostname or ""
        if access.server.startswith("http://") and access.token and not (host == "localhost" or host.startswith("127.")):
            logger.warning("the token goes to %s without TLS: anybody on the way can read it", access.server)

    def current(self, *, renew: bool = False) -> Ticket:
        """Raises `ConfigError` when a file cannot be used and none could before; `renew` reads everything again."""
        stamps = self._look()
        ticket = self._ticket
        if ticket is not None and stamps == self._stamps and not renew:
            return ticket
        try:
            ticket = Ticket(token=self._token(), context=self._context())
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError; a file may be caught while it is exchanged
            if self._ticket is None:
                raise ConfigError(f"the credentials for {self._access.server} cannot be used: {_reason(error)}") from error
            logger.warning("changed credentials cannot be used, the old ones stay: %s", _reason(error))
            return self._ticket
        self._ticket, self._stamps = ticket, stamps
        return ticket

    def _look(self) -> dict[Path, Stamp]:
        access = self._access
        stamps: dict[Path, Stamp] = {}
        for material in (access.ca, access.certificate, access.key, access.token):
            if material.file is not None:
                try:
                    found = material.file.stat()
                    stamps[material.file] = (found.st_mtime_ns, found.st_size, found.st_ino)
                except OSError:
                    stamps[material.file] = (0, 0, 0)
        return stamps

    def _token(self) -> Secret:
        token = Secret(_content(self._access.token).strip())
        if self._access.token and not token:
            raise ValueError(f"the token in {str(self._access.token.file)!r} is empty")
        if not token.reveal().isascii() or any(character.isspace() for character in token.reveal()):
            raise ValueError("the token is no token: it has blanks or characters beyond ASCII")
        return token

    def _context(self) -> ssl.SSLContext | None:
        access = self._access
        if access.server.startswith("http://"):
            return None
        context = ssl.create_default_context(cadata=_content(access.ca) or None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if access.certificate and access.key:
            with tempfile.TemporaryDirectory(prefix="stator-") as directory:  # mode 0700; ssl takes nothing but files
                paths: list[str] = []
                for name, material in (("crt", access.certificate), ("key", access.key)):
                    path = Path(directory, name)
                    path.touch(mode=0o600)
                    path.write_text(_content(material), "ascii")
                    paths.append(str(path))
                context.load_cert_chain(*paths)
        return context


def _content(material: Material) -> str:
    return material.file.read_text("ascii") if material.file is not None else material.text.reveal()


def _reason(error: Exception) -> str:
    """Without what a file contained."""
    if isinstance(error, UnicodeError):
        return "a file is not ASCII text"
    if isinstance(error, ssl.SSLError):
        return f"not PEM, or key and certificate do not belong together ({error.reason})"
    return str(error)
