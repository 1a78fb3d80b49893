"""The text of a dag.json as plain data: strict JSON, no key twice, null meaning "not set"."""

from __future__ import annotations

import json
from typing import Any

#: Objects whose keys are ours; a null below them (a call argument, an HTTP body) is the user's own value.
_SHOWN_CHARACTERS = 100
_OUR_OBJECTS = ("default_args", "staging", "http_request", "resources", "execution")


def parse_dag_text(content: bytes) -> Any:
    """The data of a dag.json.

    Raises:
        ValueError: not UTF-8, not JSON (names line and column), a key given twice, or nested too deeply.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} column {error.colno}: is not JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply; a dag.json needs a few levels only") from error
    if not isinstance(data, dict):
        raise ValueError("is not a JSON object; a dag.json starts with {")  # noqa: TRY004 - the text is wrong, not a type
    return _without_nulls(data)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:_SHOWN_CHARACTERS]!r} is given twice in one object; keep one of them")
        found[key] = value
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write a number, a string or null")


def _without_nulls(ours: dict[str, Any]) -> dict[str, Any]:
    """Drop keys set to null, as compilers write unset fields, from the objects whose keys are ours."""
    kept = {key: value for key, value in ours.items() if value is not None}
    for key in _OUR_OBJECTS:
        if isinstance(kept.get(key), dict):
            kept[key] = _without_nulls(kept[key])
    if isinstance(kept.get("tasks"), list):
        kept["tasks"] = [_without_nulls(task) if isinstance(task, dict) else task for task in kept["tasks"]]
    return kept
