"""Parts of a process are built once, however many threads ask first."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from leoflow_celery.services import once


class Parts:
    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.built: list[str] = []
        self.asked = threading.Barrier(8)

    @once
    def engine(self) -> object:
        """The engine."""
        self.built.append("engine")
        return object()

    @once
    def car(self) -> tuple[object]:
        self.built.append("car")
        return (self.engine,)


def test_eight_threads_get_the_same_part():
    parts = Parts()

    def ask(number: int) -> object:
        parts.asked.wait(5)
        return parts.car[0] if number % 2 else parts.engine

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1
    assert sorted(parts.built) == ["car", "engine"]


def test_it_is_an_attribute_that_can_be_dropped_and_is_described():
    parts = Parts()
    first = parts.engine
    assert parts.__dict__.pop("engine") is first
    assert parts.engine is not first
    assert Parts.engine.__doc__ == "The engine."
