"""JSON Schemas that users hand over: checked at the door, held against values, and never a reason to fetch anything.

Both is done by ``schema_engine`` in processes of its own, with a limit of processor time and memory: whoever writes a
schema chooses how long it takes. Nobody waits for it on an event loop.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from typing import Any

from leoflow_celery.confined import Confined, TooCostly
from leoflow_celery.domain import strict_json

#: As JSON. A schema travels with its request and is compiled in every process that meets it.
MAX_SCHEMA_BYTES = 131_072
#: Processor time to compile one, which takes milliseconds, and to hold a value against it, which takes up to a tenth
#: of a second for 256 KiB.
COMPILE_CPU_SECONDS = 1.0
VALUE_CPU_SECONDS = 2.0
#: Questions at a time in one process: one that is slow keeps nobody else waiting.
PROCESSES = 2

_engines: dict[int, Confined] = {}


def check_schema(schema: dict[str, Any]) -> None:
    """Refuse what no value can be held against.

    Raises:
        ValueError: it is not a JSON Schema, refers to something that it does not hold itself, or costs too much.
        Unavailable: it cannot be checked now.
    """
    strict_json.check(schema)
    text = json.dumps(schema)
    if len(text) > MAX_SCHEMA_BYTES:
        raise ValueError(f"has {len(text)} bytes as JSON, the limit is {MAX_SCHEMA_BYTES}; make it smaller")
    if wrong := _problem(text):
        raise ValueError(wrong)


def violation(value: bytes, schema: dict[str, Any]) -> str | None:
    """How a value (strict JSON) breaks its schema, None when it does not. One that cannot be applied accepts nothing.

    Raises:
        TooCostly: nobody can tell within the time and memory that a value may take.
        Unavailable: it cannot be checked now.
    """
    try:
        check_schema(schema)
    except ValueError as error:
        return f"xcom_schema: {error}"
    found = json.loads(_engine().ask(json.dumps(schema).encode() + b"\x00" + value, VALUE_CPU_SECONDS))
    if "rule" not in found:
        return None
    # Only the rule and the place: the value itself may be a secret and this text reaches logs and events.
    return f"{found['place']} breaks the rule {found['rule']!r} of xcom_schema"


@lru_cache(maxsize=256)
def _problem(text: str) -> str:
    try:
        return str(json.loads(_engine().ask(text.encode(), COMPILE_CPU_SECONDS)).get("schema", ""))
    except TooCostly:
        return (
            f"takes more than {COMPILE_CPU_SECONDS:g} s or too much memory to read; use fewer references to the same "
            "schemas, above all beside unevaluatedProperties and unevaluatedItems, and fewer or smaller patterns"
        )


def _engine() -> Confined:
    """The one of this process: a fork must not talk into the pipes of its parent."""
    pid = os.getpid()
    if pid not in _engines:
        _engines[pid] = Confined("leoflow_celery.domain.schema_engine", PROCESSES)
    return _engines[pid]


def close_engine() -> None:
    """End the processes that wait for the next question."""
    _engine().close()
