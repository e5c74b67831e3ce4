"""Who we are to a NATS server: settings, keys, credentials files; and that no secret shows itself."""

import base64
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from stator.config import Secret
from stator.errors import ConfigError
from stator.settings import load
from stator.transports.nats.config import NatsConfig
from stator.transports.nats.login import Login, read_login
from stator.transports.nats.nkeys import read_seed

pytestmark = pytest.mark.timeout(10)

URL = "nats://127.0.0.1:4222"
SEED = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"
PUBLIC = "UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4"
"""the pair of NATS's own documentation"""
CREDENTIALS = f"""-----BEGIN NATS USER JWT-----
header.claims.signature
------END NATS USER JWT------

************************* IMPORTANT *************************
NKEY Seed printed below can be used to sign and prove identity.

-----BEGIN USER NKEY SEED-----
{SEED}
------END USER NKEY SEED------
"""


def login(config: NatsConfig, url: str = URL) -> Login:
    return read_login(config, url)


# -- keys


def test_a_seed_is_the_documented_key() -> None:
    key = read_seed(f" {SEED}\n", source="here")
    assert key.public == PUBLIC
    raw = base64.b32decode(PUBLIC + "=" * (-len(PUBLIC) % 8))[1:33]
    Ed25519PublicKey.from_public_bytes(raw).verify(base64.b64decode(key.sign("nonce")), b"nonce")
    assert repr(key) == f"NatsKey({PUBLIC})"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "58 letters"),
        ("SU", "58 letters"),
        (SEED[:-1], "not base32"),
        (SEED[:-2], "58 letters|not base32"),
        (SEED.replace("SUACSSL3", "SUACSSL4"), "checksum"),
        (PUBLIC, "58 letters"),
        ("SAACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY", "checksum"),
        ("grüße", "not base32"),
    ],
)
def test_what_is_no_seed(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"here is not the seed of an nkey: .*({problem})") as caught:
        read_seed(text, source="here")
    assert not text or text not in str(caught.value)


def test_the_seed_of_an_account_is_not_a_users() -> None:
    import binascii

    raw = bytes((18 << 3, 0)) + bytes(32)  # role 0: an account
    text = base64.b32encode(raw + binascii.crc_hqx(raw, 0).to_bytes(2, "little")).decode()
    with pytest.raises(ConfigError, match="not a user's"):
        read_seed(text, source="here")


def test_without_cryptography_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    with pytest.raises(ConfigError, match=r"^nats.auth_nkey \(NATS_AUTH_NKEY\) needs .* pip install 'stator\[certs\]'$"):
        login(NatsConfig(auth_nkey=Secret(SEED)))
    assert login(NatsConfig(auth_token=Secret("t"))).token == Secret("t")  # which needs nothing


# -- kinds of login


def test_the_references_variables() -> None:
    both = load(NatsConfig, env={"NATS_AUTH_USERNAME": "me", "NATS_AUTH_PASSWORD": "pw"})
    assert login(both).user == "me"
    assert login(both).password == Secret("pw")
    assert login(load(NatsConfig, env={"NATS_AUTH_TOKEN": "tok"})).token == Secret("tok")
    key = login(load(NatsConfig, env={"NATS_AUTH_NKEY": SEED})).key
    assert key is not None
    assert key.public == PUBLIC
    assert load(NatsConfig, env={"DYN_NATS_REQUEST_TIMEOUT_SECS": "3"}).request_timeout == 3.0
    assert load(NatsConfig, env={}).request_timeout == 10.0


def test_without_a_login_it_is_the_references() -> None:
    assert (login(NatsConfig()).user, login(NatsConfig()).password) == ("user", Secret("user"))


def test_a_login_in_the_address_is_left_to_it() -> None:
    found = login(NatsConfig(), "nats://me:pw@127.0.0.1")
    assert (found.user, found.password, found.token) == (None, None, None)


def test_a_credentials_file_is_read_at_each_login(tmp_path: Path) -> None:
    path = tmp_path / "user.creds"
    path.write_text(CREDENTIALS)
    config = load(NatsConfig, env={"NATS_AUTH_CREDENTIALS_FILE": str(path)})
    found = login(config)
    assert found.key is not None
    assert (found.jwt, found.key.public) == (Secret("header.claims.signature"), PUBLIC)
    path.write_text(CREDENTIALS.replace("claims", "new"))
    assert login(config).jwt == Secret("header.new.signature")


@pytest.mark.parametrize(
    "text", ["", "nonsense", CREDENTIALS.partition("*")[0], CREDENTIALS.partition("IMPORTANT")[2], "\xff" * 10]
)
def test_what_is_no_credentials_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "user.creds"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"auth_credentials_file = .*user\.creds"):
        login(NatsConfig(auth_credentials_file=path))
    with pytest.raises(ConfigError, match="cannot be read"):
        login(NatsConfig(auth_credentials_file=tmp_path / "missing"))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"auth_username": "me"}, "belong together"),
        ({"auth_password": Secret("pw")}, "belong together"),
        ({"auth_token": Secret("t"), "auth_nkey": Secret(SEED)}, "nats.auth_token and nats.auth_nkey are different ways"),
        ({"tls_cert": Path("c")}, "tls_cert and nats.tls_key belong together"),
        ({"servers": ("ws://a:1",)}, "none of nats, tls"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        NatsConfig(**settings)  # type: ignore[arg-type] - whatever is said


def test_nothing_shows_a_secret(tmp_path: Path) -> None:
    path = tmp_path / "user.creds"
    path.write_text(CREDENTIALS)
    for config in (
        NatsConfig(auth_username="me", auth_password=Secret("hidden")),
        NatsConfig(auth_token=Secret("hidden")),
        NatsConfig(auth_nkey=Secret(SEED)),
        NatsConfig(auth_credentials_file=path),
        NatsConfig(servers=("nats://me:hidden@127.0.0.1:4222",)),
    ):
        shown = repr(config) + str(config) + config.shown + repr(login(config))
        for secret in ("hidden", SEED, "header.claims"):
            assert secret not in shown


# -- TLS


def test_when_tls_is_insisted_on() -> None:
    assert not NatsConfig().insists_on_tls(URL)
    assert NatsConfig().insists_on_tls("tls://127.0.0.1")
    assert NatsConfig(tls_ca=Path("ca")).insists_on_tls(URL)
    assert NatsConfig(tls_cert=Path("c"), tls_key=Path("k")).insists_on_tls(URL)
    assert NatsConfig(tls_first=True).insists_on_tls(URL)
    assert login(NatsConfig()).tls is None
    assert login(NatsConfig(), "tls://127.0.0.1").tls is not None


def test_certificates_that_cannot_be_read(tmp_path: Path) -> None:
    bad = tmp_path / "ca.pem"
    bad.write_text("nonsense")
    with pytest.raises(ConfigError, match=r"nats.tls_ca.*ca\.pem"):
        login(NatsConfig(tls_ca=bad))
    with pytest.raises(ConfigError, match=r"nats.tls_ca.*missing"):
        login(NatsConfig(tls_ca=tmp_path / "missing"))
