"""JSON that every reader takes: UTF-8, whole characters, finite numbers, and not nested without end."""

from __future__ import annotations

import json
from typing import Any, NoReturn

#: Lists and objects inside each other. Every reader we know takes so many, and so does the checker of JSON Schemas,
#: which spends a dozen stack frames on each.
MAX_DEPTH = 100


def parse(text: bytes) -> Any:
    """The data of a JSON text.

    Raises:
        ValueError: says what is wrong with it, and never repeats it.
    """
    try:
        data = json.loads(text.decode(), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    check(data)
    return data


def check(data: Any) -> None:
    """Refuse data that cannot travel as JSON to every reader.

    Raises:
        ValueError: says what is wrong with it, and never repeats it.
    """
    if is_deeper(data, MAX_DEPTH):
        raise ValueError(_TOO_DEEP)
    try:
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("half a surrogate pair is no character; remove it") from error
    except ValueError as error:
        raise ValueError(
            "NaN, Infinity and integers of thousands of digits are no numbers that JSON or its readers know; "
            "send text or null instead"
        ) from error


_TOO_DEEP = f"lists and objects are nested deeper than {MAX_DEPTH} levels; flatten them"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON knows; send text or null instead")


def is_deeper(data: Any, levels: int) -> bool:
    """Whether lists and objects are nested more than so many levels; level by level, so depth costs no stack."""
    level = [data]
    for _ in range(levels):
        level = [child for each in level if isinstance(each, dict | list) for child in _children(each)]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


def _children(data: dict[str, Any] | list[Any]) -> list[Any]:
    return list(data.values()) if isinstance(data, dict) else data
