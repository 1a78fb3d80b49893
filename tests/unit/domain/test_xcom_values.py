"""The limits of an XCom value, to the byte, and what a refusal may say."""

from __future__ import annotations

import pytest

from leoflow_celery.domain.xcom import MAX_VALUE_BYTES, XComKey, XComValue, check_value, parse_value, shown_value
from leoflow_celery.errors import XComRejected

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def refused(value: bytes, **more: object) -> XComRejected:
    with pytest.raises(XComRejected) as caught:
        check_value(value, **more)  # type: ignore[arg-type]
    return caught.value


def test_exactly_256_kib_are_accepted_and_not_a_byte_more() -> None:
    value = b'"' + b"x" * (MAX_VALUE_BYTES - 2) + b'"'
    assert len(value) == 262_144
    check_value(value)
    error = refused(value[:-1] + b'x"')
    assert error.reason == "payload_too_large"
    assert str(error) == "the value has 262145 bytes, the limit is 262144"


@pytest.mark.parametrize(
    "value",
    [
        *(b"", b"{", b"NaN", b"[Infinity]", b"-Infinity", b"\xff", b"'x'", b"[" * 100_000),
        *(b'"\xed\xa0\x80"', '"a"'.encode("utf-16"), b'"\\ud800"', b"1e999", b"1" * 5_000, b"1" * 310, b"1e999999"),
        *(b'{"a": 1, "a": 2}', b'[{"b": {"\\u0061": 1, "a": 1}}]'),
        *(b"[" * 101 + b"]" * 101, b'{"a":' * 101 + b"1" + b"}" * 101),
    ],
    ids=lambda v: repr(v[:12]),
)
def test_what_is_no_json_is_refused(value: bytes) -> None:
    assert refused(value).reason == "invalid_xcom"


@pytest.mark.parametrize("value", [b"null", b"0", b'"x"', b"[1, 2.5]", b'{"a": {}}', b" true ", '"é"'.encode()])
def test_any_json_is_accepted(value: bytes) -> None:
    check_value(value)


def test_a_content_type_with_parameters_is_json_all_the_same() -> None:
    assert refused(b"{", content_type="Application/JSON; charset=utf-8").reason == "invalid_xcom"


def test_bytes_of_another_type_are_only_weighed() -> None:
    check_value(b"\xff\x00", content_type="application/octet-stream", schema=SCHEMA)
    assert refused(b"12345", content_type="text/plain", max_bytes=4).reason == "payload_too_large"


def test_a_value_is_checked_against_its_schema() -> None:
    check_value(b'{"n": 1}', schema=SCHEMA)
    error = refused(b'{"n": "c4n4ry"}', schema=SCHEMA)
    assert error.reason == "schema_mismatch"
    assert str(error) == "n breaks the rule 'type' of xcom_schema"
    assert "the value breaks the rule 'required'" in str(refused(b"{}", schema=SCHEMA))


def test_a_hundred_levels_are_accepted_whatever_the_schema() -> None:
    check_value(b"[" * 100 + b"]" * 100, schema={"$ref": "#/$defs/t", "$defs": {"t": {"items": {"$ref": "#/$defs/t"}}}})


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"$ref": "#/definitions/none"}, "xcom_schema: refers to what it does not hold"),
        ({"type": "number-ish"}, "xcom_schema: is not a JSON Schema"),
    ],
)
def test_a_schema_that_cannot_be_applied_is_named_as_the_culprit(schema: dict[str, object], text: str) -> None:
    error = refused(b"1" * 300, schema=schema)
    assert error.reason == "schema_mismatch"
    assert str(error).startswith(text)


def test_a_value_of_another_type_is_read_as_text() -> None:
    assert parse_value(XComValue(b"[1]")) == [1]
    assert parse_value(XComValue(b"a\xff", "text/plain")) == "a\ufffd"


@pytest.mark.parametrize("value", [b"{", b"[" * 5_000 + b"]" * 5_000, b"\xff"])
def test_json_that_is_none_is_no_value_but_can_be_looked_at(value: bytes) -> None:
    with pytest.raises(XComRejected) as caught:
        parse_value(XComValue(value))
    assert caught.value.reason == "invalid_xcom"
    assert shown_value(XComValue(value)) == value.decode(errors="replace")


def test_a_redis_key_is_the_contracts() -> None:
    assert XComKey("acme", "sales", "manual:1", "load").redis_key() == "xcom:acme:sales:manual:1:load:return_value"


def test_two_values_never_share_a_redis_key() -> None:
    assert XComKey("a", "b", "r:t", "k", "x").redis_key() != XComKey("a", "b", "r", "t", "k:x").redis_key()
    assert XComKey("a", "b", "r", "t", "k:x").redis_key() != XComKey("a", "b", "r", "t", "k%3Ax").redis_key()
