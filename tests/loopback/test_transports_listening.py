"""Where planes listen, and what they tell others about it."""

import asyncio

import msgspec
import pytest

from stator.errors import ConfigError, ConnectFailed
from stator.testing.native_sockets import plane_host
from stator.transports.listening import listen, own_place
from stator.transports.plane import PlaneHost

pytestmark = pytest.mark.timeout(10)


async def placed(own: str, host: PlaneHost) -> tuple[str, str]:
    return await own_place(own, host, what="letters are taken", setting="post.host")


def reachable(advertised: str = "worker-1") -> PlaneHost:
    """A process that others may reach."""
    return msgspec.structs.replace(plane_host(), bind_host="0.0.0.0", advertise_host=advertised)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("", ("0.0.0.0", "worker-1")),
        ("192.0.2.7", ("192.0.2.7", "192.0.2.7")),
        ("127.0.0.1", ("127.0.0.1", "127.0.0.1")),
        ("::", ("::", "worker-1")),
    ],
)
async def test_an_address_of_its_own_is_bound_and_unless_it_is_a_wildcard_advertised(
    own: str, expected: tuple[str, str]
) -> None:
    assert await placed(own, reachable()) == expected


async def test_a_name_of_its_own_is_looked_up() -> None:
    bound, advertised = await placed("localhost", plane_host())
    assert bound == advertised and bound in ("127.0.0.1", "::1")


@pytest.mark.parametrize("own", ["0.0.0.0", "192.0.2.7"])
async def test_nothing_is_reachable_by_others_while_its_process_is_not(own: str) -> None:
    text = rf"letters are taken on {own}, which is reachable by others, while host = 127.0.0.1 is not; .* leave post.host empty"
    with pytest.raises(ConfigError, match=text):
        await placed(own, plane_host())


async def test_an_address_that_is_taken_is_named() -> None:
    async with await listen(asyncio.Protocol, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        with pytest.raises(ConnectFailed, match=rf"cannot listen on 127.0.0.1:{port}: .*in use"):
            await listen(asyncio.Protocol, "127.0.0.1", port)
        with pytest.raises(ConnectFailed, match=rf"cannot wait for answers on 127.0.0.1:{port}"):
            await listen(asyncio.Protocol, "127.0.0.1", port, purpose="wait for answers")
