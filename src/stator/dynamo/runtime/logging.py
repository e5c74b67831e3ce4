"""`dynamo.runtime.logging`: where the lines of a process go."""

from stator import settings
from stator.telemetry import LogConfig, configure_logging

__all__ = ["configure_dynamo_logging"]


def configure_dynamo_logging(service_name: str | None = None, worker_id: int | None = None) -> None:
    """Send the log of the process to stderr in Stator's form, by `STATOR_LOG` or `DYN_LOG` and the other settings of the log.

    The two names are accepted and not shown: every line names what it is about. Unlike the reference's, this touches no logger
    of vLLM or SGLang.
    """
    configure_logging(settings.load(LogConfig))
