"""How a component shows itself to NATS tools: the micro-service answers to `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS` (`spec/10 §6`)."""

from typing import Any, Literal, get_args

import msgspec

__all__ = ["Service", "ServiceEndpoint", "Verb"]

Verb = Literal["PING", "INFO", "STATS"]

_encode = msgspec.json.Encoder().encode


class ServiceEndpoint(msgspec.Struct, kw_only=True):
    """One endpoint of one instance, and what it has done since it is there."""

    name: str
    subject: str
    queue_group: str
    num_requests: int = 0
    num_errors: int = 0
    last_error: str = ""
    processing_time: int = 0
    """nanoseconds in which requests were taken; answering them is not in it, as in the reference"""

    def count(self, error: str, nanoseconds: int) -> None:
        """A request was taken, or refused with `error`."""
        self.num_requests += 1
        self.processing_time += nanoseconds
        if error:
            self.num_errors += 1
            self.last_error = error


class Service:
    """One component of this process."""

    def __init__(self, *, namespace: str, component: str, id: str, version: str, started: str) -> None:
        """`started` is an RFC 3339 time."""
        self.name = f"{namespace}_{component}"
        self.id = id
        self._version = version
        self._started = started
        self._description = f"Dynamo component {component} in namespace {namespace}"
        self.endpoints: dict[str, ServiceEndpoint] = {}
        """by subject"""

    def subjects(self, verb: Verb) -> tuple[str, str, str]:
        """Where the service is asked: with everybody, with those of its name, alone."""
        return f"$SRV.{verb}", f"$SRV.{verb}.{self.name}", f"$SRV.{verb}.{self.name}.{self.id}"

    def answer(self, verb: Verb) -> bytes:
        """The JSON answer."""
        assert verb in get_args(Verb)
        kind = f"io.nats.micro.v1.{verb.lower()}_response"
        answer: dict[str, Any] = {
            "type": kind,
            "name": self.name,
            "id": self.id,
            "version": self._version,
        }
        match verb:
            case "PING":
                answer["metadata"] = {}
            case "INFO":
                answer |= {"description": self._description, "metadata": {}}
                answer["endpoints"] = [_shown(each) for each in self.endpoints.values()]
            case "STATS":  # without metadata, as the reference's
                answer |= {"started": self._started, "endpoints": [_counted(each) for each in self.endpoints.values()]}
        return _encode(answer)


def _shown(endpoint: ServiceEndpoint) -> dict[str, Any]:
    return {"name": endpoint.name, "subject": endpoint.subject, "queue_group": endpoint.queue_group, "metadata": {}}


def _counted(endpoint: ServiceEndpoint) -> dict[str, Any]:
    requests = endpoint.num_requests
    return {
        "name": endpoint.name,
        "subject": endpoint.subject,
        "queue_group": endpoint.queue_group,
        "num_requests": requests,
        "num_errors": endpoint.num_errors,
        "last_error": endpoint.last_error,
        "processing_time": endpoint.processing_time,
        "average_processing_time": endpoint.processing_time // requests if requests else 0,
    }
