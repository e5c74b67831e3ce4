"""Who a process is in a Kubernetes cluster: the name of its metadata object and the instance id made from it (`spec/20 §4.4`)."""

import logging
import re
from pathlib import Path

import msgspec

from stator.discovery.kubernetes_config import KubernetesConfig
from stator.errors import ConfigError

__all__ = ["Identity", "instance_id_of", "object_name", "read_identity"]

logger = logging.getLogger(__name__)

_MASK = 2**64 - 1
_ID_MASK = 2**53 - 1
"""ids survive readers that take every JSON number for a double"""
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_MAIN = "main"
"""the container whose object is called like the pod alone"""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """This process, as Kubernetes knows it. Without `pod` it can only look on."""

    namespace: str
    pod: str = ""
    uid: str = ""
    container: str = ""
    """empty in pod mode"""

    @property
    def name(self) -> str:
        """The name of the metadata object."""
        return object_name(self.pod, self.container)

    def check_can_register(self) -> None:
        """Raise `ConfigError` if it is not known which pod this is."""
        for value, variable in ((self.pod, "POD_NAME"), (self.uid, "POD_UID")):
            if not value:
                raise ConfigError(
                    f"{variable} not available from file or environment: this process cannot register. "
                    "Let the downward API set it (deploy/kubernetes/ shows how)"
                )


def object_name(pod: str, container: str = "") -> str:
    """What the metadata object of a pod, or of a container in it, is called."""
    return pod if container in ("", _MAIN) else f"{pod}-{container}"


def instance_id_of(name: str) -> int:
    """The 53-bit instance id of the process whose metadata object is called `name`."""
    return _siphash_1_3(name.encode() + b"\xff") & _ID_MASK


def read_identity(config: KubernetesConfig, fallback_namespace: str) -> Identity:
    """Who we are. Reads files, which win over the settings. Raises `ConfigError` naming what is missing or malformed."""
    pod = _podinfo(config, "pod_name") or config.pod_name
    uid = _podinfo(config, "pod_uid") or config.pod_uid
    namespace = _podinfo(config, "pod_namespace") or config.namespace or fallback_namespace
    if not namespace:
        logger.warning("POD_NAMESPACE is not set: the namespace is taken to be 'default'")
        namespace = "default"
    container = config.container if config.mode == "container" else ""
    if config.mode == "container" and pod and not container:
        raise ConfigError("CONTAINER_NAME is not set, which container mode needs; set it to the container's name in the pod")
    for what, value in (("pod name", pod), ("namespace", namespace), ("container name", container)):
        if value and not _NAME.fullmatch(value):
            raise ConfigError(f"{what} {value!r} is not one that Kubernetes gives: small letters, digits, '-' and '.'")
    return Identity(namespace=namespace, pod=pod, uid=uid, container=container)


def _podinfo(config: KubernetesConfig, name: str) -> str:
    if not config.podinfo:
        return ""
    try:
        return Path(config.podinfo, name).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _rotate(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (64 - bits))) & _MASK


def _round(a: int, b: int, c: int, d: int) -> tuple[int, int, int, int]:
    a = (a + b) & _MASK
    b = _rotate(b, 13) ^ a
    a = _rotate(a, 32)
    c = (c + d) & _MASK
    d = _rotate(d, 16) ^ c
    a = (a + d) & _MASK
    d = _rotate(d, 21) ^ a
    c = (c + b) & _MASK
    b = _rotate(b, 17) ^ c
    return a, b, _rotate(c, 32), d


def _siphash_1_3(data: bytes) -> int:
    """SipHash with one round per word, three at the end and the key (0, 0)."""
    a, b, c, d = 0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573
    whole = len(data) // 8 * 8
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, whole, 8)]
    words.append((len(data) & 0xFF) << 56 | int.from_bytes(data[whole:], "little"))
    for word in words:
        a, b, c, d = _round(a, b, c, d ^ word)
        a ^= word
    c ^= 0xFF
    for _ in range(3):
        a, b, c, d = _round(a, b, c, d)
    return a ^ b ^ c ^ d
