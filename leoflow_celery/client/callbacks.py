"""Celery signatures given at submit, as the JSON that completion will make signatures of again."""

from __future__ import annotations

import json
from typing import Any

from leoflow_celery.errors import InvalidRequest


def signatures(field: str, given: Any) -> list[dict[str, Any]]:
    """One signature or a list of them (None: none) as plain JSON.

    Raises:
        InvalidRequest: names ``field``; something is no signature, or does not travel as JSON.
    """
    if given is None:
        return []
    items = given if isinstance(given, list | tuple) else [given]
    return [_plain(field, item) for item in items]


def _plain(field: str, item: Any) -> dict[str, Any]:
    # A Celery signature is a dict.
    if not isinstance(item, dict) or not isinstance(item.get("task"), str) or not item["task"]:
        raise InvalidRequest(
            f"{field}: {type(item).__name__} is no Celery signature; give task.s(…), signature('name') or a list", field
        )
    try:
        plain: dict[str, Any] = json.loads(json.dumps(item))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{field}: the signature of {item['task']!r} is no JSON: {error}", field) from error
    return plain
