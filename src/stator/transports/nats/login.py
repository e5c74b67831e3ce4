"""Who we are to a NATS server, and how its connection is protected. Reads files: not for the event loop."""

import re
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from stator.config import Secret
from stator.errors import ConfigError
from stator.transports.nats.config import NatsConfig
from stator.transports.nats.nkeys import NatsKey, read_seed

__all__ = ["Login", "read_login"]

_PART = re.compile(r"-{3,} *BEGIN ([A-Z ]+?) *-{3,}\s*(\S+)\s*-{3,} *END \1 *-{3,}")
"""one block of a credentials file"""


class Login(msgspec.Struct, frozen=True, kw_only=True):
    """What a server is told. All empty: nothing but what its address says."""

    user: str | None = None
    password: Secret | None = None
    token: Secret | None = None
    key: NatsKey | None = None
    jwt: Secret | None = None
    tls: ssl.SSLContext | None = None


def read_login(config: NatsConfig, url: str) -> Login:
    """For the server at `url`. Raises `ConfigError` naming the setting and the file that is not right."""
    tls = _context(config) if config.insists_on_tls(url) else None
    if config.auth_username:
        return Login(user=config.auth_username, password=config.auth_password, tls=tls)
    if config.auth_token:
        return Login(token=config.auth_token, tls=tls)
    if config.auth_nkey:
        return Login(key=read_seed(config.auth_nkey.reveal(), source="nats.auth_nkey (NATS_AUTH_NKEY)"), tls=tls)
    if config.auth_credentials_file is not None:
        jwt, key = _credentials(config.auth_credentials_file)
        return Login(jwt=jwt, key=key, tls=tls)
    if urlsplit(url).username is not None:
        return Login(tls=tls)
    return Login(
        user="user", password=Secret("user"), tls=tls
    )  # the reference's (`spec/10 §6`); a server without login ignores it


def _credentials(path: Path) -> tuple[Secret, NatsKey]:
    source = f"nats.auth_credentials_file = {path}"
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} cannot be read: {error}") from error
    parts: dict[str, str] = dict(_PART.findall(text))
    if "NATS USER JWT" not in parts or "USER NKEY SEED" not in parts:
        raise ConfigError(f"{source} is no credentials file: it needs the blocks NATS USER JWT and USER NKEY SEED")
    return Secret(parts["NATS USER JWT"]), read_seed(parts["USER NKEY SEED"], source=source)


def _context(config: NatsConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=config.tls_ca)
        if config.tls_cert is not None:
            context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        files = ", ".join(str(path) for path in (config.tls_ca, config.tls_cert, config.tls_key) if path is not None)
        raise ConfigError(f"nats.tls_ca, nats.tls_cert, nats.tls_key ({files}) cannot be used: {error}") from error
    return context
