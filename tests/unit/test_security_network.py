"""What a secret and certificates change about planes and listeners."""

import logging

import pytest

from stator.cli.joining import Joining
from stator.errors import ConfigError, ConnectFailed, NotTrusted
from stator.protocol.native.problem import decode_error, encode_error
from stator.runtime.config import RuntimeConfig
from stator.runtime.host import advertised_host, warn_of_open_doors
from stator.runtime.network import choose_planes
from stator.security import Refusals, Tls
from stator.testing.certificates import Authority, tls_of
from stator.testing.fake_plane import FakePlane, fail_to_connect, fake_record
from unit.test_runtime_network import World

pytestmark = pytest.mark.timeout(10)

SECRET = "correct horse battery staple"


def names(
    plane: str, request_plane: str = "tcp", *, secret: bool = True, closed: bool = True
) -> tuple[list[str], list[str], bool]:
    choice = choose_planes(plane, request_plane, lambda name: lambda: FakePlane(name), secret=secret, closed=closed)
    return [each.name for each in choice.planes], [each.name for each in choice.listening], choice.fall_back


@pytest.mark.parametrize("request_plane", ["tcp", "nats", "http2"])
@pytest.mark.parametrize("plane", ["auto", "native"])
def test_with_a_secret_only_the_native_plane_is_spoken(plane: str, request_plane: str) -> None:
    assert names(plane, request_plane) == (["native"], ["native"], False)


def test_with_permission_the_others_are_spoken_and_never_fallen_back_to() -> None:
    assert names("auto", closed=False) == (["native", "tcp", "nats", "http2"], ["native", "tcp"], False)
    assert names("auto", secret=False, closed=False)[2]


async def test_want_of_trust_is_no_reason_to_fall_back() -> None:
    world = World()
    world.native.default = fail_to_connect(NotTrusted("another secret", reason="secret_wrong"))
    for _ in range(2):
        with pytest.raises(NotTrusted):
            await world.open(fake_record(1))
    assert world.opened == ([1, 1], []) and world.network.fallbacks == {}


@pytest.fixture
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return tls_of(Authority(tmp_path_factory.mktemp("tls")), mutual=False)


def config(**values: object) -> RuntimeConfig:
    if "cluster_secret" in values:
        from stator.config import Secret

        values["cluster_secret"] = Secret(str(values["cluster_secret"]))
    return RuntimeConfig(**{"host": "10.1.2.3", **values})  # type: ignore[arg-type]


def test_a_secret_or_tls_permits_a_listener_beyond_loopback(tls: Tls) -> None:
    assert advertised_host(config(cluster_secret=SECRET)) == "10.1.2.3"
    assert advertised_host(config(), tls) == "10.1.2.3"
    assert advertised_host(config(cluster_secret=SECRET, compatible=True), tls) == "10.1.2.3"
    assert advertised_host(config(cluster_secret=SECRET, compatible=True, insecure_bind=True)) == "10.1.2.3"


@pytest.mark.parametrize(
    "values", [{}, {"cluster_secret": SECRET, "compatible": True}], ids=["nothing", "planes without proof"]
)
def test_nothing_else_does(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="STATOR_CLUSTER_SECRET") as caught:
        advertised_host(config(**values))
    assert SECRET not in caught.value.message


def test_what_is_open_is_said(tls: Tls, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    mutual = tls_of(Authority(tmp_path_factory.mktemp("mutual")))
    warn_of_open_doors(RuntimeConfig(), None)
    warn_of_open_doors(config(event_plane="nats"), mutual)
    warn_of_open_doors(config(event_plane="nats", cluster_secret=SECRET), tls)
    assert not caplog.records
    warn_of_open_doors(config(insecure_bind=True), None)
    warn_of_open_doors(config(event_plane="nats"), tls)
    warn_of_open_doors(config(event_plane="nats", cluster_secret=SECRET), None)
    warn_of_open_doors(config(cluster_secret=SECRET), mutual)
    said = ["may send requests", "events", "may send requests", "can be read", "events"]
    assert [word in entry.getMessage() for word, entry in zip(said, caplog.records, strict=True)] == [True] * 5


def test_the_command_line_permits_the_compatible_planes() -> None:
    said = Joining(compatible=True)
    assert said.settings == {"compatible": True} and said.variables == {"STATOR_COMPATIBLE": "true"}
    assert Joining().settings == Joining().variables == {}


def test_the_error_travels() -> None:
    found = decode_error(encode_error(NotTrusted("no", reason="secret_wrong")), instance=7)
    assert isinstance(found, NotTrusted) and isinstance(found, ConnectFailed)
    assert (found.code, found.instance, found.retryable) == ("not_trusted", 7, True)


def test_refusals_are_counted_by_side_and_reason() -> None:
    refusals = Refusals()
    for side, reason in (("accepting", "expired"), ("dialling", "expired"), ("accepting", "expired"), ("dialling", "tls")):
        refusals.count(side, reason)  # type: ignore[arg-type]
    assert refusals.counts == {("accepting", "expired"): 2, ("dialling", "expired"): 1, ("dialling", "tls"): 1}
    assert refusals.of("expired") == 3 and refusals.of("nothing") == 0
