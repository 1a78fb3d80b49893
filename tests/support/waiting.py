"""Waiting for a condition with a deadline, in place of sleeping and hoping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from tests.support.environment import worker_name

T = TypeVar("T")
#: Deadlines are for a machine that does one thing. Beside other tests everything takes longer; only failures notice.
PATIENCE = 3 if worker_name() else 1


def wait_until(
    predicate: Callable[[], T],
    timeout: float = 10.0,
    message: str | Callable[[], str] = "",
    interval: float = 0.02,
) -> T:
    """Call ``predicate`` until it returns something true, and return that.

    ``message`` says what was waited for; a callable is asked at the end, for what only then is known.

    Raises:
        AssertionError: nothing true within ``timeout`` seconds (times ``PATIENCE``); the text
            has the message and the last value.
    """
    timeout *= PATIENCE
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= deadline:
            text = message() if callable(message) else message
            raise AssertionError(f"not within {timeout:g} s: {text or predicate} (last value: {value!r})")
        time.sleep(interval)
