"""Sealing: only who holds a key reads or makes a payload, and keys can be rotated."""

from __future__ import annotations

import base64
import hmac
import zlib

import pytest
from cryptography.fernet import Fernet
from hypothesis import given, settings
from hypothesis import strategies as st

from leoflow_celery.errors import ConfigurationError, DecryptionFailed
from leoflow_celery.security import KeyRing, Sealer

OLD, NEW, FOREIGN = (Fernet.generate_key().decode() for _ in range(3))
CANARY = "canary-7f3a"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
)


def sealer_of(keys: str, scope: str = "docker") -> Sealer:
    return KeyRing(keys).sealer(scope)


@settings(max_examples=30, deadline=None)
@given(value=st.dictionaries(st.text(), JSON))
def test_what_was_sealed_comes_back(value: dict[str, object]) -> None:
    sealer = sealer_of(NEW)
    assert sealer.open(sealer.seal(value)) == value


def test_bytes_come_back() -> None:
    sealer = sealer_of(NEW)
    assert sealer.open_bytes(sealer.seal_bytes(b"\x00\xff")) == b"\x00\xff"


def test_nothing_is_readable_and_no_two_seals_are_alike() -> None:
    sealer = sealer_of(NEW)
    sealed = [sealer.seal({"agent_token": CANARY}) for _ in range(2)]
    assert sealed[0] != sealed[1]
    for text in sealed:
        assert CANARY not in text
        assert CANARY.encode() not in base64.urlsafe_b64decode(text)


def test_keys_rotate_newest_first() -> None:
    old, both, new = sealer_of(OLD), sealer_of(f" {NEW} , {OLD} ,"), sealer_of(NEW)
    assert both.open(old.seal({"a": 1})) == {"a": 1}
    assert new.open(both.seal({"a": 1})) == {"a": 1}
    with pytest.raises(DecryptionFailed):
        old.open(both.seal({"a": 1}))


@pytest.mark.parametrize("sealed", ["", "not sealed", "é", "gAAAAA==", sealer_of(FOREIGN).seal({"a": CANARY})])
def test_what_was_not_sealed_with_our_keys(sealed: str) -> None:
    with pytest.raises(DecryptionFailed, match="LEOFLOW_SEAL_KEYS"):
        sealer_of(f"{NEW},{OLD}").open(sealed)


def test_a_changed_payload_is_refused() -> None:
    sealed = sealer_of(NEW).seal({"a": 1})
    middle = len(sealed) // 2
    changed = sealed[:middle] + ("A" if sealed[middle] != "A" else "B") + sealed[middle + 1 :]
    with pytest.raises(DecryptionFailed):
        sealer_of(NEW).open(changed)


@pytest.mark.parametrize("content", [b"[1]", b'"text"', b"not json", b"\xff", b""])
def test_a_payload_that_is_no_object_is_refused(content: bytes) -> None:
    sealer = sealer_of(NEW)
    with pytest.raises(DecryptionFailed, match="not a JSON object"):
        sealer.open(sealer.seal_bytes(content))


@pytest.mark.parametrize("keys", ["", " , ", "no-key", pytest.param(f"{NEW},no-key", id="a-key,no-key"), "é" * 44])
def test_keys_that_are_none_are_named_and_not_shown(keys: str) -> None:
    with pytest.raises(ConfigurationError, match="LEOFLOW_SEAL_KEYS") as error:
        KeyRing(keys)
    assert "no-key" not in str(error.value)
    assert NEW not in str(error.value)


def test_the_key_of_a_scope_opens_what_its_scope_sealed_and_nothing_else() -> None:
    master = KeyRing(f"{NEW},{OLD}")
    worker = KeyRing(",".join(f"docker:{key}" for key in master.keys("docker")))
    for keys in (NEW, OLD):
        assert worker.sealer("docker").open(sealer_of(keys).seal({"a": 1})) == {"a": 1}
        with pytest.raises(DecryptionFailed, match="docker"):
            worker.sealer("docker").open(sealer_of(keys, "k8s").seal({"a": 1}))
    assert master.sealer("docker").open(worker.sealer("docker").seal({"b": 2})) == {"b": 2}
    with pytest.raises(ConfigurationError, match="leoflow keys --for k8s"):
        worker.sealer("k8s")


def test_a_derived_key_is_that_of_rfc_5869() -> None:
    """Other languages derive it as well, for a publisher that seals what it dispatches."""
    master = base64.urlsafe_b64encode(bytes(range(32))).decode()
    extracted = hmac.digest(b"\x00" * 32, bytes(range(32)), "sha256")
    expected = hmac.digest(extracted, b"leoflow/seal/1/dispatch\x01", "sha256")
    assert KeyRing(master).keys("dispatch") == [base64.urlsafe_b64encode(expected).decode()]


def test_rows_of_a_version_without_scopes_still_open() -> None:
    sealed = Fernet(NEW).encrypt(b'{"request": {}}').decode()
    assert sealer_of(NEW, "request").open(sealed) == {"request": {}}
    with pytest.raises(DecryptionFailed):
        sealer_of(NEW, "docker").open(sealed)


def test_a_large_object_travels_compressed_and_unpacks_to_no_more_than_the_limit() -> None:
    sealer = sealer_of(NEW)
    sealed = sealer.seal({"rows": ["x" * 100] * 10_000})
    assert len(sealed) < 50_000
    assert len(sealer.open(sealed)["rows"]) == 10_000
    bomb = sealer.seal_bytes(b"z" + zlib.compress(b'{"a": "' + b"x" * (65 * 1024 * 1024) + b'"}', 9))
    with pytest.raises(DecryptionFailed, match="not a JSON object"):
        sealer.open(bomb)
