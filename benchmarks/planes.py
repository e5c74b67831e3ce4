"""What does each plane carry between two processes, what does TLS cost, and what NATS in between."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from benchmarks.contenders import NATIVE_TCP, REFERENCES, RUNTIMES, Contender, choose, reference, stator
from benchmarks.exercises import ITEMS, LATENCY, REQUESTS, measure
from benchmarks.report import Plan, Report, Row, Samples, Target
from stator.testing.certificates import Authority
from stator.testing.nats_server import nats_server

__all__ = ["answer"]

_TLS = {
    "STATOR_TLS_CERT_PATH": "{certificates}/process.pem",
    "STATOR_TLS_KEY_PATH": "{certificates}/process-key.pem",
    "STATOR_TLS_CA_CERT_PATH": "{certificates}/ca.pem",
    "STATOR_TLS_CLIENT_CA_CERT_PATH": "{certificates}/ca.pem",
    "STATOR_TLS_SERVER_NAME": "stator",
}
_HTTP2 = {"STATOR_PLANE": "compatible", "STATOR_REQUEST_PLANE": "http2"}
_ON_NATS = {"DYN_REQUEST_PLANE": "nats", "NATS_SERVER": "{nats}"}

_NATIVE, _COMPATIBLE = choose(RUNTIMES, ("stator-native", "stator-compatible"))
_NATIVE_TLS = stator("stator-native-tls", "Stator native, TLS", **_TLS, STATOR_PLANE="native", STATOR_NATIVE_UNIX="false")
_COMPATIBLE_TLS = stator("stator-compatible-tls", "Stator compatible, TLS", **_TLS, STATOR_PLANE="compatible")
_HTTP2_PLAIN = stator("stator-http2", "Stator HTTP/2", **_HTTP2)
_HTTP2_TLS = stator("stator-http2-tls", "Stator HTTP/2, TLS", **_HTTP2, **_TLS)
_NATS = stator(
    "stator-nats",
    "Stator NATS",
    STATOR_PLANE="compatible",
    STATOR_REQUEST_PLANE="nats",
    STATOR_NATS_SERVERS="{nats}",
)
_REFERENCES_ON_NATS = (
    reference("1.3.1", ".venv-reference", "NATS", **_ON_NATS),
    reference("1.6.1", ".venv-reference-1.6.1", "NATS", **_ON_NATS),
)
_CONTENDERS = (
    *REFERENCES,
    *_REFERENCES_ON_NATS,
    _NATIVE,
    NATIVE_TCP,
    _NATIVE_TLS,
    _COMPATIBLE,
    _COMPATIBLE_TLS,
    _NATS,
    _HTTP2_PLAIN,
    _HTTP2_TLS,
)
_PAIRS = ((_NATIVE_TLS, NATIVE_TCP), (_COMPATIBLE_TLS, _COMPATIBLE), (_HTTP2_TLS, _HTTP2_PLAIN))
"""with TLS, and the same without"""
_EXERCISES = (ITEMS, REQUESTS, LATENCY)


def _cost(row: Row) -> Row:
    return Row(name=f"tls_{row.name}", title=f"with TLS ÷ without: {row.title}", metric="ratio", unit="×", digits=2)


def _target(
    row: str, contender: Contender, sense: Literal["at least", "at most"], limit: float, wording: str, *peers: Contender
) -> Target:
    return Target(
        row=row,
        contender=contender.name,
        sense=sense,
        limit=limit,
        wording=wording,
        against=tuple(peer.name for peer in peers),
    )


_TARGETS = (
    _target("items", _NATIVE_TLS, "at least", 0.4, "≥ 0.4× without TLS", NATIVE_TCP),
    _target("requests", _NATIVE_TLS, "at least", 0.5, "≥ 0.5× without TLS", NATIVE_TCP),
    _target("latency", _NATIVE_TLS, "at most", 2.0, "≤ 2× without TLS", NATIVE_TCP),
    _target("items", _NATS, "at least", 4.0, "≥ 4×", *_REFERENCES_ON_NATS),
    _target("requests", _NATS, "at least", 1.0, "≥ 1×", *_REFERENCES_ON_NATS),
    _target("latency", _NATS, "at most", 1.0, "≤ 1×", *_REFERENCES_ON_NATS),
    _target("items", _HTTP2_PLAIN, "at least", 1.0, "≥ 1× on TCP", *REFERENCES),
)

_METHOD = (
    "As in `runtime_planes`: two processes each on loopback, the same handler and client loop, uvloop, items of ~35 bytes, fresh "
    "processes in every repeat, contenders one after the other for each row, every answer compared.",
    "TLS is mutual: both sides show a certificate (ECDSA P-256) of one authority. The native plane and HTTP/2 keep their connections, so "
    "that a request pays for encryption alone; on the compatible plane every answer calls home over a connection of its own, and "
    "each begins with a handshake.",
    "Requests over NATS pass one server (plain, a process of its own on the same cores); answers call home over TCP, with the "
    "reference as with Stator.",
    "Discovery is a directory for everybody: it is not on the path of a request.",
    "`with TLS ÷ without` is taken inside one repeat.",
)


def answer(plan: Plan) -> Report:
    """Measure all chosen contenders."""
    contenders = choose(_CONTENDERS, plan.contenders)
    unavailable = dict[str, str]()
    with _places(unavailable, contenders) as places:
        samples = measure(_EXERCISES, contenders, plan, unavailable, places)
    rows = [exercise.row for exercise in _EXERCISES]
    costs = _costs(samples, rows, {contender.name for contender in contenders})
    names = {contender.name for contender in contenders}
    return Report(
        name="planes",
        question=(__doc__ or "").strip(),
        method=_METHOD,
        rows=[*rows, *costs],
        contenders=[(contender.name, contender.label) for contender in contenders],
        samples=samples,
        targets=[target for target in _TARGETS if target.contender in names],
        unavailable=unavailable,
    )


@contextmanager
def _places(unavailable: dict[str, str], contenders: list[Contender]) -> Iterator[Mapping[str, str]]:
    """Certificates, and a NATS server where one is needed; without it the contenders on NATS are put into `unavailable`."""
    on_nats = [each for each in contenders if "{nats}" in each.environment.values()]
    with tempfile.TemporaryDirectory(prefix="stator-bench-") as directory, ExitStack() as stack:
        Authority(Path(directory)).issue("process")
        places = {"certificates": directory, "nats": ""}
        if on_nats:
            try:
                places["nats"] = stack.enter_context(nats_server(Path(directory) / "nats")).url
            except (FileNotFoundError, RuntimeError) as error:
                unavailable.update({each.name: str(error).splitlines()[0] for each in on_nats})
        yield places


def _costs(samples: Samples, rows: list[Row], names: set[str]) -> list[Row]:
    """Rows of ratios, filled for the contenders that have TLS."""
    costs = [(row, _cost(row)) for row in rows]
    found = [pair for pair in _PAIRS if {each.name for each in pair} <= names]
    for closed, plain in found:
        for row, cost in costs:
            for repeat, ratio in samples.ratios(row.name, closed.name, plain.name, row.metric).items():
                samples.add(cost.name, closed.name, repeat, {"ratio": ratio})
    return [cost for _, cost in costs] if found else []
