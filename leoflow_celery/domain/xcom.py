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
        parsed = json.loads(value, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise XComRejected("invalid_xcom", f"the value is not JSON: {error}") from error
    if schema is not None:
        _check_schema(parsed, schema)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_schema(parsed: Any, schema: dict[str, Any]) -> None:
    import jsonschema  # 60 ms that only tasks with a schema should pay

    try:
        jsonschema.validate(parsed, schema)
    except jsonschema.ValidationError as error:
        path = "/".join(str(part) for part in error.absolute_path) or "the value"
        # Only the rule and the place: the value itself may be a secret and this text reaches logs and events.
        raise XComRejected("schema_mismatch", f"{path} breaks the rule {error.validator!r} of xcom_schema") from error
    except jsonschema.SchemaError as error:
        raise XComRejected("schema_mismatch", f"xcom_schema itself is not a JSON Schema: {error.message}") from error
