"""The TLS context towards etcd, from files or from the texts that the reference's variables hold."""

import os
import ssl
from collections.abc import Generator
from contextlib import contextmanager

from stator.discovery.etcd_config import EtcdConfig
from stator.errors import ConfigError

__all__ = ["changed_context", "client_context", "file_times"]


def client_context(config: EtcdConfig) -> ssl.SSLContext | None:
    """A fresh context, or None if no member is asked over TLS. Reads files, not for the event loop.

    Raises `ConfigError` naming the setting whose certificate or key cannot be used.
    """
    if not any(url.startswith("https://") for url in config.urls):
        return None
    try:
        context = ssl.create_default_context(cafile=config.ca_path, cadata=config.ca_text or None)
    except (OSError, ValueError) as error:
        where = f"etcd.ca_path = {str(config.ca_path)!r}" if config.ca_path else "etcd.ca_text (ETCD_AUTH_CA)"
        hint = "" if config.ca_path else "; it must hold PEM text, not a path"
        raise ConfigError(f"{where} holds no certificates: {_reason(error)}{hint}") from error
    if config.cert_path is not None or config.cert_text:
        _load_own(context, config)
    return context


def file_times(config: EtcdConfig) -> tuple[float, ...]:
    """When the files were written, in wall-clock seconds; 0 for what is not there. Not for the event loop."""
    times: list[float] = []
    for path in (config.ca_path, config.cert_path, config.key_path):
        try:
            times.append(0.0 if path is None else path.stat().st_mtime)
        except OSError:
            times.append(0.0)
    return tuple(times)


def changed_context(config: EtcdConfig, times: tuple[float, ...]) -> tuple[ssl.SSLContext | None, tuple[float, ...]]:
    """A context from files that have changed since `times`, or None; and the times now. Like `client_context`."""
    now = file_times(config)
    return (None if now == times else client_context(config)), now


def _load_own(context: ssl.SSLContext, config: EtcdConfig) -> None:
    try:
        if config.cert_path is not None:
            with _key_file(config) as key:
                context.load_cert_chain(config.cert_path, key)
        else:
            with _as_file(f"{config.cert_text}\n{config.key_text.reveal()}\n") as path:
                context.load_cert_chain(path)
    except (OSError, ValueError) as error:
        where = (
            f"etcd.cert_path = {str(config.cert_path)!r}"
            if config.cert_path
            else "etcd.cert_text and etcd.key_text (ETCD_AUTH_CLIENT_CERT, ETCD_AUTH_CLIENT_KEY; PEM texts, not paths)"
        )
        raise ConfigError(f"{where}: no usable pair of certificate and key: {_reason(error)}") from error


@contextmanager
def _key_file(config: EtcdConfig) -> Generator[str | None, None, None]:
    if config.key_path is None and config.key_text:
        with _as_file(config.key_text.reveal()) as path:
            yield path
    else:
        yield None if config.key_path is None else str(config.key_path)


@contextmanager
def _as_file(text: str) -> Generator[str, None, None]:
    """A path to `text` that is in memory alone; the ssl module reads certificates from files only."""
    descriptor = os.memfd_create("stator-etcd", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(text.encode())
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
