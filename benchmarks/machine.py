"""What the numbers were measured on: hardware and versions, without names of hosts, users or paths."""

import os
import platform
from importlib import metadata

from benchmarks.children import ROOT

__all__ = ["hardware", "versions"]

_PACKAGES = ("stator", "uvloop", "msgspec", "aiohttp", "tokenizers")
_REFERENCES = {"reference": ".venv-reference", "reference, newer": ".venv-reference-1.6.1"}


def hardware() -> dict[str, str]:
    """CPU model, cores this process may use, memory, kernel."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
    }


def versions() -> dict[str, str]:
    """Python, the packages on the measured path, and the references' own distributions."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        found[name] = _version(name, None)
    for label, folder in _REFERENCES.items():
        paths = [str(path) for path in (ROOT / folder).glob("lib/python*/site-packages")]
        found[label] = f"ai-dynamo-runtime {_version('ai-dynamo-runtime', paths)}"
    return found


def _version(name: str, paths: list[str] | None) -> str:
    found = metadata.distributions(name=name) if paths is None else metadata.distributions(name=name, path=paths)
    return next((distribution.version for distribution in found), "not installed")


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as cpuinfo:
        for line in cpuinfo:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
