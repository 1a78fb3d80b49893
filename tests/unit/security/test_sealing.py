"""Sealing: only who holds a key reads or makes a payload, and keys can be rotated."""

from __future__ import annotations

import base64

import pytest
from cryptography.fernet import Fernet
from hypothesis import given, settings
from hypothesis import strategies as st

from leoflow_celery.errors import ConfigurationError, Unsealable
from leoflow_celery.security import Sealer

OLD, NEW, FOREIGN = (Fernet.generate_key().decode() for _ in range(3))
CANARY = "canary-7f3a"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
)


@settings(max_examples=30, deadline=None)
@given(value=st.dictionaries(st.text(), JSON))
def test_what_was_sealed_comes_back(value: dict[str, object]) -> None:
    sealer = Sealer(NEW)
    assert sealer.open(sealer.seal(value)) == value


def test_bytes_come_back() -> None:
    sealer = Sealer(NEW)
    assert sealer.open_bytes(sealer.seal_bytes(b"\x00\xff")) == b"\x00\xff"


def test_nothing_is_readable_and_no_two_seals_are_alike() -> None:
    sealer = Sealer(NEW)
    sealed = [sealer.seal({"agent_token": CANARY}) for _ in range(2)]
    assert sealed[0] != sealed[1]
    for text in sealed:
        assert CANARY not in text
        assert CANARY.encode() not in base64.urlsafe_b64decode(text)


def test_keys_rotate_newest_first() -> None:
    old, both, new = Sealer(OLD), Sealer(f" {NEW} , {OLD} ,"), Sealer(NEW)
    assert both.open(old.seal({"a": 1})) == {"a": 1}
    assert new.open(both.seal({"a": 1})) == {"a": 1}
    with pytest.raises(Unsealable):
        old.open(both.seal({"a": 1}))


@pytest.mark.parametrize("sealed", ["", "not sealed", "é", "gAAAAA==", Sealer(FOREIGN).seal({"a": CANARY})])
def test_what_was_not_sealed_with_our_keys(sealed: str) -> None:
    with pytest.raises(Unsealable, match="LEOFLOW_SEAL_KEYS"):
        Sealer(f"{NEW},{OLD}").open(sealed)


def test_a_changed_payload_is_refused() -> None:
    sealed = Sealer(NEW).seal({"a": 1})
    middle = len(sealed) // 2
    changed = sealed[:middle] + ("A" if sealed[middle] != "A" else "B") + sealed[middle + 1 :]
    with pytest.raises(Unsealable):
        Sealer(NEW).open(changed)


@pytest.mark.parametrize("content", [b"[1]", b'"text"', b"not json", b"\xff", b""])
def test_a_payload_that_is_no_object_is_refused(content: bytes) -> None:
    sealer = Sealer(NEW)
    with pytest.raises(Unsealable, match="not a JSON object"):
        sealer.open(sealer.seal_bytes(content))


@pytest.mark.parametrize("keys", ["", " , ", "no-key", pytest.param(f"{NEW},no-key", id="a-key,no-key"), "é" * 44])
def test_keys_that_are_none_are_named_and_not_shown(keys: str) -> None:
    with pytest.raises(ConfigurationError, match="LEOFLOW_SEAL_KEYS") as error:
        Sealer(keys)
    assert "no-key" not in str(error.value)
    assert NEW not in str(error.value)
