"""Celery signatures given at submit, as the JSON that completion will make signatures of again."""

from __future__ import annotations

import json
from typing import Any

from leoflow_celery.domain.canvas import check_signatures
from leoflow_celery.errors import InvalidRequest


def signatures(field: str, given: Any) -> list[dict[str, Any]]:
    """One signature or a list of them (None: none) as plain JSON.

    Raises:
        InvalidRequest: names ``field``; something is no signature, names what is not the user's, or is no JSON.
    """
    if given is None:
        return []
    items = list(given) if isinstance(given, list | tuple) else [given]
    plain: list[dict[str, Any]] = [_plain(field, item) for item in items]
    check_signatures(field, plain)
    return plain


def _plain(field: str, item: Any) -> Any:
    try:
        return json.loads(json.dumps(item))
    except (TypeError, ValueError, RecursionError) as error:
        # A Celery signature is a dict.
        what = f"the signature of {item.get('task')!r}" if isinstance(item, dict) else type(item).__name__
        raise InvalidRequest(f"{field}: {what} is no JSON: {error}", field) from error
