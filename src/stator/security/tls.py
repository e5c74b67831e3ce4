"""The certificates of a process: contexts for those who listen and dial, and new ones when the files change."""

import asyncio
import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from stator.clock import Clock
from stator.errors import ConfigError
from stator.security.config import TlsConfig
from stator.security.validity import read_validity

__all__ = ["Alpn", "Tls"]

logger = logging.getLogger(__name__)

Alpn = tuple[str, ...]
"""protocols to negotiate, best first; empty: none"""

_LOOK = 1.0
"""seconds between looks at the files"""

_REMIND = 86400.0
"""seconds between two warnings about the end of one certificate"""

_Stamp = tuple[tuple[int, int, int] | None, ...]
"""modification time, size and inode of each file; None: not there"""


class Tls:
    """Contexts made of one `TlsConfig`. Whoever accepts or dials asks for a context each time: it is the current one.

    Building one reads the files, and so does the first call with other `alpn`: not for the event loop. Raises `ConfigError` naming the
    file that cannot be used. `follow` (or `look`) exchanges the contexts when files changed; as long as the new files cannot be used,
    because one of them is still being written, the old contexts stay.
    """

    def __init__(self, config: TlsConfig, *, clock: Clock) -> None:
        self.config = config
        self._clock = clock
        self._server: dict[Alpn, ssl.SSLContext] = {}
        self._client: dict[Alpn, ssl.SSLContext] = {}
        self._stamp = _stamp(config.files)
        self._complained = False
        self._reminded: dict[Path, float] = {}
        self._load()
        self._remind()

    @property
    def server_name(self) -> str:
        """What the certificate of whoever is dialled must name; "": the host that was dialled."""
        return self.config.server_name

    @property
    def mutual(self) -> bool:
        """Whether listeners demand a certificate."""
        return self.config.client_ca_cert_path is not None

    @property
    def listens(self) -> bool:
        """Whether there is a certificate to listen with."""
        return self.config.cert_path is not None

    def server_context(self, alpn: Alpn = ()) -> ssl.SSLContext:
        """For a connection that was accepted. Raises `ConfigError` when this process has no certificate."""
        context = self._server.get(alpn)
        if context is None:
            context = self._server[alpn] = _server_context(self.config, alpn)
        return context

    def client_context(self, alpn: Alpn = ()) -> ssl.SSLContext:
        """For a connection that is being made; verifies the other side and its name."""
        context = self._client.get(alpn)
        if context is None:
            context = self._client[alpn] = _client_context(self.config, alpn)
        return context

    # -- files that change

    async def follow(self) -> NoReturn:
        """Look at the files every second, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK)
            await asyncio.to_thread(self.look)

    def look(self) -> bool:
        """Use the files anew if they changed; whether that was so. Warns of certificates that end soon. Reads the disk; never raises."""
        self._remind()
        stamp = _stamp(self.config.files)
        if stamp == self._stamp:
            return False
        self._stamp = stamp  # from before reading: what changes meanwhile is seen by the next look
        try:
            self._load()
        except ConfigError as error:
            if not self._complained:
                logger.warning("the certificates in use stay, the changed files cannot be used: %s", error)
            self._complained = True
            return False
        self._complained = False
        self._reminded.clear()
        self._remind()
        logger.info("certificates were read again")
        return True

    def _load(self) -> None:
        """New contexts in place of all there are; none is exchanged when one cannot be made."""
        config = self.config
        server = {alpn: _server_context(config, alpn) for alpn in (self._server or {(): None})} if self.listens else {}
        client = {alpn: _client_context(config, alpn) for alpn in (self._client or {(): None})}
        self._server, self._client = server, client

    def _remind(self) -> None:
        now = self._clock.wall()
        for path in {self.config.cert_path, self.config.client_cert_path} - {None}:
            assert path is not None
            if now - self._reminded.get(path, -_REMIND) < _REMIND:
                continue
            try:
                validity = read_validity(path.read_text("utf-8"))
            except (OSError, ValueError):
                continue  # whoever loads it says so
            if now >= validity.ends:
                logger.warning("the certificate %s has expired; others refuse it", path)
            elif validity.ending(now):
                logger.warning("the certificate %s expires in %.1f hours", path, (validity.ends - now) / 3600)
            else:
                continue
            self._reminded[path] = now


def _stamp(files: tuple[Path, ...]) -> _Stamp:
    return tuple(map(_stamp_of, files))


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _server_context(config: TlsConfig, alpn: Alpn) -> ssl.SSLContext:
    if config.cert_path is None or config.key_path is None:
        raise ConfigError("TLS is set and this process has no certificate to listen with; set tls.cert_path and tls.key_path")
    context = _context(ssl.PROTOCOL_TLS_SERVER, alpn)
    context.num_tickets = 0  # nobody resumes: each connection is verified in full
    _own(context, config.cert_path, config.key_path)
    if config.client_ca_cert_path is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        _trust(context, config.client_ca_cert_path)
    return context


def _client_context(config: TlsConfig, alpn: Alpn) -> ssl.SSLContext:
    context = _context(ssl.PROTOCOL_TLS_CLIENT, alpn)  # verifies, names included
    cert, key = (config.client_cert_path or config.cert_path), (config.client_key_path or config.key_path)
    if cert is not None and key is not None:
        _own(context, cert, key)
    if config.ca_cert_path is not None:
        _trust(context, config.ca_cert_path)
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


def _context(protocol: int, alpn: Alpn) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def _own(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    _use(lambda: context.load_cert_chain(cert, key, password=_no_password), f"{cert} with {key}")


def _trust(context: ssl.SSLContext, path: Path) -> None:
    _use(lambda: context.load_verify_locations(path), str(path))


def _use(load: Callable[[], object], what: str) -> None:
    try:
        load()
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        reason = (isinstance(error, ssl.SSLError) and error.reason) or getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot use {what}: {reason}") from error


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one that is not, readable by this user alone")
