"""XCom keys, limits and the checks every value passes before it is stored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from leoflow_celery.errors import XComRejected

RETURN_VALUE = "return_value"
JSON_CONTENT_TYPE = "application/json"
#: 256 KiB; a value of exactly this size is accepted (Leoflow's limit).
MAX_VALUE_BYTES = 262_144
#: Lists and objects inside each other; every JSON reader we know takes so many.
MAX_DEPTH = 200
#: Seven days.
TTL_SECONDS = 7 * 24 * 3600


@dataclass(frozen=True, slots=True)
class XComKey:
    """Where a value lives. Of the ids only ``run_id`` may hold a colon; ``key`` is the user's own choice."""

    tenant_id: str
    dag_id: str
    run_id: str
    task_id: str
    key: str = RETURN_VALUE

    def redis_key(self) -> str:
        """``xcom:{tenant}:{dag}:{run}:{task}:{key}``; a colon in ``key`` is escaped, or "r:t" and "t:k" would meet."""
        key = self.key.replace("%", "%25").replace(":", "%3A")
        return f"xcom:{self.tenant_id}:{self.dag_id}:{self.run_id}:{self.task_id}:{key}"


@dataclass(frozen=True, slots=True)
class XComValue:
    """A stored value with its type and time (seconds since the epoch)."""

    value: bytes
    content_type: str = JSON_CONTENT_TYPE
    created_at: float = 0.0


def parse_value(stored: XComValue) -> Any:
    """A stored value in Python; one that is no JSON (its writer said so) as text."""
    if stored.content_type == JSON_CONTENT_TYPE:
        return json.loads(stored.value)
    return stored.value.decode(errors="replace")


def check_value(
    value: bytes,
    content_type: str = JSON_CONTENT_TYPE,
    schema: dict[str, Any] | None = None,
    max_bytes: int = MAX_VALUE_BYTES,
) -> None:
    """Refuse what may not be stored.

    Raises:
        XComRejected: ``payload_too_large`` over the limit, ``invalid_xcom`` for JSON that is none (NaN and Infinity
            are none), ``schema_mismatch`` for a value its JSON Schema refuses.
    """
    if len(value) > max_bytes:
        raise XComRejected("payload_too_large", f"the value has {len(value)} bytes, the limit is {max_bytes}")
    if content_type != JSON_CONTENT_TYPE:
        return
    try:
        parsed = json.loads(value.decode(), parse_constant=_refuse_constant)
        deep = _is_deeper(parsed, MAX_DEPTH)
    except (ValueError, RecursionError) as error:
        raise XComRejected("invalid_xcom", f"the value is not JSON in UTF-8: {error}") from error
    if deep:
        raise XComRejected("invalid_xcom", f"the value is nested deeper than {MAX_DEPTH} levels")
    if schema is not None:
        _check_schema(parsed, schema)


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested more than so many levels; level by level, so depth costs no stack."""
    level = [value]
    for _ in range(levels):
        level = [one for each in level if isinstance(each, dict | list) for one in _children(each)]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


def _children(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def check_schema(schema: dict[str, Any]) -> None:
    """Refuse what is no JSON Schema, before any value is held against it.

    Raises:
        ValueError: says what is wrong.
    """
    import jsonschema  # 60 ms that only requests with a schema should pay

    try:
        json.dumps(schema, allow_nan=False)
        jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"is not a JSON Schema: {error.message}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError("is not a JSON Schema: it cannot be written as JSON") from error


def _check_schema(parsed: Any, schema: dict[str, Any]) -> None:
    import jsonschema  # 60 ms that only tasks with a schema should pay
    from referencing import Registry

    try:
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
        # A registry of its own, and empty: a reference to another document must never be fetched from here.
        error = jsonschema.exceptions.best_match(kind(schema, registry=Registry()).iter_errors(parsed))
    except jsonschema.SchemaError as wrong:
        raise XComRejected("schema_mismatch", f"xcom_schema itself is not a JSON Schema: {wrong.message}") from wrong
    except Exception as wrong:
        # A reference that leads nowhere or to itself, a number that is too large: what a schema may do to its checker.
        raise XComRejected("schema_mismatch", f"xcom_schema cannot be applied: {type(wrong).__name__}") from wrong
    if error is not None:
        path = "/".join(str(part) for part in error.absolute_path) or "the value"
        # Only the rule and the place: the value itself may be a secret and this text reaches logs and events.
        raise XComRejected("schema_mismatch", f"{path} breaks the rule {error.validator!r} of xcom_schema")
