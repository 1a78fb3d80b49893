"""XCom keys, limits and the checks every value passes before it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from leoflow_celery.confined import TooCostly
from leoflow_celery.domain import strict_json
from leoflow_celery.domain.schema import violation
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


def is_json(content_type: str) -> bool:
    """Whether a content type says JSON, with parameters or without."""
    return content_type.partition(";")[0].strip().lower() == JSON_CONTENT_TYPE


def parse_value(stored: XComValue) -> Any:
    """A stored value in Python; one that is no JSON (its writer said so) as text.

    Raises:
        XComRejected: ``invalid_xcom`` for JSON that is none.
    """
    return _parsed(stored.value) if is_json(stored.content_type) else _text_of(stored.value)


def shown_value(stored: XComValue) -> Any:
    """A stored value for whoever looks at it: like ``parse_value``, but what cannot be parsed is text as well."""
    try:
        return parse_value(stored)
    except XComRejected:
        return _text_of(stored.value)


def check_value(
    value: bytes,
    content_type: str = JSON_CONTENT_TYPE,
    schema: dict[str, Any] | None = None,
    max_bytes: int = MAX_VALUE_BYTES,
) -> None:
    """Refuse what may not be stored.

    Raises:
        XComRejected: ``payload_too_large`` over the limit, ``invalid_xcom`` for JSON that not every reader takes
            (see ``strict_json``) and for a value that its JSON Schema cannot decide about in bounded time and memory,
            ``schema_mismatch`` for a value its JSON Schema refuses.
        Unavailable: the schema cannot be applied now.
    """
    if len(value) > max_bytes:
        raise XComRejected("payload_too_large", f"the value has {len(value)} bytes, the limit is {max_bytes}")
    if not is_json(content_type):
        return
    _parsed(value)
    if schema is None:
        return
    try:
        wrong = violation(value, schema)
    except TooCostly as error:
        text = "xcom_schema takes too much time or memory on this value; give it fewer alternatives and references"
        raise XComRejected("invalid_xcom", text) from error
    if wrong:
        raise XComRejected("schema_mismatch", wrong)


def _parsed(value: bytes) -> Any:
    try:
        return strict_json.parse(value)
    except ValueError as error:
        raise XComRejected("invalid_xcom", f"the value is not JSON in UTF-8: {error}") from error


def _text_of(value: bytes) -> str:
    return value.decode(errors="replace")
