"""What counts as a schema at the door. How values are held against one is in test_xcom_values."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from leoflow_celery.domain.schema import check_schema, violation

DRAFT_7 = "http://json-schema.org/draft-07/schema#"
PERSON = {"$ref": "#/$defs/person", "$defs": {"person": {"required": ["name"]}}}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "number-ish"}, "is not a JSON Schema: 'number-ish' is not valid"),
        ({"pattern": "("}, "is not a JSON Schema: '(' is not a 'regex'"),
        ({"$schema": 5}, "is not a JSON Schema: AttributeError"),
        ({"minimum": float("nan")}, "NaN, Infinity and integers of thousands of digits"),
        ({"title": "\ud800"}, "half a surrogate pair is no character"),
        ({"$ref": "#/definitions/none"}, "refers to '#/definitions/none', which it does not hold"),
        ({"properties": {"a": {"items": {"$ref": "#none"}}}}, "refers to '#none'"),
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
    assert violation({"name": 1}, PERSON) is None
    assert violation({}, PERSON) == "the value breaks the rule 'required' of xcom_schema"


def test_nothing_is_fetched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        schema = {"$ref": f"http://127.0.0.1:{server.getsockname()[1]}/schema"}
        assert "nothing is fetched" in str(violation({}, schema))
        with pytest.raises(TimeoutError):
            server.accept()
