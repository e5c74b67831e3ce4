"""Keys and their hashes."""

import hashlib
import hmac

import pytest

from stator.config import Secret
from stator.security import key_hashes
from stator.security.key_hashes import KeyIndex, hash_text, new_key, parse_hash


def index_of(*keys: str) -> KeyIndex[str]:
    return KeyIndex((hashlib.sha256(key.encode()).digest(), key) for key in keys)


def test_a_key_is_256_random_bits_and_secret() -> None:
    key = new_key(lambda size: bytes(range(size)))
    assert key.reveal() == "sk-" + bytes(range(32)).hex()
    assert "sk-" not in repr(key) + str(key)
    assert len({new_key().reveal() for _ in range(100)}) == 100


def test_a_stored_hash_is_plain_sha256() -> None:
    text = hash_text(Secret("sk-abc"))
    assert text == "sha256:" + hashlib.sha256(b"sk-abc").hexdigest()
    assert parse_hash(text) == hashlib.sha256(b"sk-abc").digest()
    assert parse_hash(text.upper().replace("SHA", "sha")) == parse_hash(text)


@pytest.mark.parametrize(
    "bad", ["", "sk-0123456789abcdef", "sha256:", "sha256:" + "0" * 63, "sha256:" + "g" * 64, "md5:" + "0" * 64]
)
def test_what_is_no_hash_is_refused_and_not_repeated(bad: str) -> None:
    with pytest.raises(ValueError, match="expected sha256") as raised:
        parse_hash(bad)
    assert not bad or bad == "sha256:" or bad not in str(raised.value)


def test_keys_are_found_and_others_are_not() -> None:
    index = index_of("sk-one", "sk-two")
    assert len(index) == 2
    assert index.find("sk-one") == "sk-one"
    assert index.find("sk-two") == "sk-two"
    for wrong in ("", "sk-", "sk-one ", "SK-ONE", "sk-on", "sk-onee", "\udcff", "sk-one\0"):
        assert index.find(wrong) is None
    assert index_of().find("sk-one") is None


def test_a_very_long_key_is_wrong_even_if_its_beginning_is_not() -> None:
    long = "k" * 512
    index = index_of(long)
    assert index.find(long) == long
    assert index.find(long + "k") is None


def test_each_attempt_hashes_and_compares_once_whatever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(len(one) + len(other))
        return real(one, other)

    real = hmac.compare_digest
    monkeypatch.setattr(key_hashes.hmac, "compare_digest", compare)
    index = index_of("sk-one")
    for key in ("sk-one", "sk-wrong", "", "x" * 10_000):
        index.find(key)
    assert compared == [64] * 4


def test_half_a_hash_is_not_enough() -> None:
    digest = hashlib.sha256(b"sk-one").digest()
    index = KeyIndex([(digest[:16] + bytes(16), "other")])
    assert index.find("sk-one") is None
