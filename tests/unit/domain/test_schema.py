"""What counts as a schema at the door. How values are held against one is in test_xcom_values."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest

from leoflow_celery.confined import TooCostly
from leoflow_celery.domain.schema import check_schema, violation

DRAFT_7 = "http://json-schema.org/draft-07/schema#"
PERSON = {"$ref": "#/$defs/person", "$defs": {"person": {"required": ["name"]}}}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "number-ish"}, 'is not a JSON Schema: "number-ish" is not valid'),
        ({"pattern": "("}, 'is not a JSON Schema: "(" is not a "regex"'),
        ({"$schema": 5}, 'is not a JSON Schema: 5 is not of type "string"'),
        ({"minimum": float("nan")}, "NaN, Infinity and integers of thousands of digits"),
        ({"title": "\ud800"}, "half a surrogate pair is no character"),
        ({"$ref": "#/definitions/none"}, "refers to what it does not hold (Pointer '/definitions/none')"),
        ({"properties": {"a": {"items": {"$ref": "#none"}}}}, "refers to what it does not hold (Anchor 'none')"),
        ({"$ref": "https://example.test/schema.json"}, "nothing is fetched; put that below $defs"),
        ({"enum": ["x" * 10_000], "type": 5}, "is not a JSON Schema"),
    ],
)
def test_what_no_value_can_be_held_against_is_refused(schema: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_schema(schema)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "schema",
    [
        {},
        PERSON,
        {"$schema": DRAFT_7, "$ref": "#/definitions/a", "definitions": {"a": {"type": "integer"}}},
        {"$schema": DRAFT_7, "$ref": DRAFT_7},
        {"$ref": "https://json-schema.org/draft/2020-12/schema"},
        {"$schema": "https://example.test/a-dialect-of-their-own"},
        {"$id": "https://example.test/a", "$ref": "b", "$defs": {"b": {"$id": "b", "type": "integer"}}},
        {"enum": [{"$ref": "a value, not a reference"}]},
        {"properties": {"$ref": {"type": "string"}}},
        {"items": {"$ref": "#"}},
    ],
)
def test_references_within_a_schema_and_to_the_standard_are_fine(schema: dict[str, Any]) -> None:
    check_schema(schema)


def test_a_value_is_held_against_what_a_reference_means() -> None:
    assert violation(b'{"name": 1}', PERSON) is None
    assert violation(b"{}", PERSON) == "the value breaks the rule 'required' of xcom_schema"


def levels(keyword: str, count: int, **more: Any) -> dict[str, Any]:
    """Each level refers to the next one twice."""
    definitions: dict[str, Any] = {
        f"n{level}": {keyword: [{"$ref": f"#/$defs/n{level + 1}"}] * 2, **more} for level in range(count)
    }
    return {"$ref": "#/$defs/n0", "$defs": {**definitions, f"n{count}": {"enum": ["only this"]}}}


@pytest.mark.parametrize(
    "schema",
    [
        levels("anyOf", 40),
        levels("allOf", 30, unevaluatedProperties=False),
        {"allOf": [{"pattern": f"(a{{100}}){{900}}{number}"} for number in range(3_000)]},
    ],
    ids=["references", "unevaluated", "patterns"],
)
def test_a_schema_that_costs_too_much_is_refused_in_bounded_time_and_the_next_one_is_read(
    schema: dict[str, Any],
) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"use fewer references|is not a JSON Schema"):
        check_schema(schema)
    assert time.monotonic() - started < 30
    check_schema({"type": "integer"})


def test_a_pattern_takes_linear_time() -> None:
    schema = {"pattern": "^(a+)+$"}
    assert violation(b'"' + b"a" * 200_000 + b'"', schema) is None
    assert violation(b'"' + b"a" * 200_000 + b'!"', schema) == "the value breaks the rule 'pattern' of xcom_schema"


def test_a_value_that_takes_too_long_is_given_up() -> None:
    schema = {"anyOf": [{"type": "array", "items": {"$ref": "#"}}] * 3 + [{"const": "only this"}]}
    with pytest.raises(TooCostly):
        violation(b"[" * 60 + b"1" + b"]" * 60, schema)
    assert violation(b"[]", schema) is None


def test_nothing_is_fetched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        schema = {"$ref": f"http://127.0.0.1:{server.getsockname()[1]}/schema"}
        assert "nothing is fetched" in str(violation(b"{}", schema))
        with pytest.raises(TimeoutError):
            server.accept()
