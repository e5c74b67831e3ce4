"""Addresses of this host."""

import pytest

from stator.errors import ConfigError
from stator.transports.address import is_local, is_loopback, is_wildcard, join_host_port, numeric_host


def test_which_addresses_are_here() -> None:
    assert is_local("127.0.0.1")
    assert is_local("127.9.9.9")
    assert not is_local("192.0.2.1")
    assert is_local("a-name-of-which-nothing-is-known")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("10.0.0.1")
    assert is_wildcard("0.0.0.0")
    assert is_wildcard("::")
    assert join_host_port("::1", 5) == "[::1]:5"


async def test_names_are_looked_up() -> None:
    assert await numeric_host("10.1.2.3") == "10.1.2.3"
    assert is_loopback(await numeric_host("localhost"))
    with pytest.raises(ConfigError, match="neither an IP address nor a name"):
        await numeric_host("no-such-host.invalid")
