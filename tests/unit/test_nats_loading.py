"""What is imported before NATS is used: nothing of its library, nor of what signs logins."""

import subprocess
import sys

import pytest

from stator.protocol.records import EndpointRecord, Transport
from stator.transports.nats import NatsPlane

pytestmark = pytest.mark.timeout(30)


def test_the_library_is_loaded_at_first_use() -> None:
    code = """
import sys
from stator.runtime.plugins import load_plugin
load_plugin("stator.transports", "nats")()
load_plugin("stator.events", "nats")
print(sorted({"nats", "cryptography"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(("transport", "reaches"), [(Transport(nats_tcp="a.b-1"), True), (Transport(tcp="h:1/p"), False)])
def test_whom_it_reaches(transport: Transport, reaches: bool) -> None:
    record = EndpointRecord(component="c", endpoint="e", namespace="n", instance_id=1, transport=transport)
    assert NatsPlane().reaches(record) is reaches
