"""JSON that every reader takes alike: UTF-8, whole characters, no key twice, nothing too large or too deep."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

#: Lists and objects inside each other. Every reader we know takes so many.
MAX_DEPTH = 100
#: 2 ** 1024 is the first integer that no double holds, and it has 309 digits.
_LARGEST = 2**1024 - 2**970
_MANY_DIGITS = re.compile(rb"\d{309}")


def parse(text: bytes) -> Any:
    """The data of a JSON text.

    Raises:
        ValueError: says what is wrong with it, and never repeats it.
    """
    try:
        data = json.loads(
            text.decode(),
            parse_constant=_refuse_constant,
            object_pairs_hook=unique_keys,
            # A call for each integer doubles the time; almost no text has one that is too large.
            parse_int=_integer if _MANY_DIGITS.search(text) else None,
        )
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
        raise ValueError(_NOT_A_NUMBER) from error


_TOO_DEEP = f"lists and objects are nested deeper than {MAX_DEPTH} levels; flatten them"
_NOT_A_NUMBER = (
    "NaN, Infinity and integers of thousands of digits are no numbers that JSON or its readers know; "
    "send text or null instead"
)


class DuplicateKey(ValueError):
    """An object has the same key twice."""


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these keys and values, for ``object_pairs_hook``.

    Raises:
        DuplicateKey: a key is there twice: one reader takes the first value, the next one the last.
    """
    data = dict(pairs)
    if len(data) != len(pairs):
        raise DuplicateKey("an object has the same key twice, and readers differ in which value they take; rename one")
    return data


def _integer(digits: str) -> int:
    if len(digits) <= 310 and abs(number := int(digits)) <= _LARGEST:
        return number
    raise ValueError("an integer is larger than a double holds, and readers differ in what they make of it; send text")


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
