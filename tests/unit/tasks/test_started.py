"""STARTED beside a call: never for a short one, never after the result, never the call's own trouble."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from leoflow_celery.tasks import inline
from leoflow_celery.tasks.inline import StartedMark
from tests.support.waiting import wait_until


class Backend:
    """Writes when ``gate`` opens; then fails when it was told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.gate, self.error = threading.Event(), error
        self.written: list[tuple[Any, ...]] = []

    def store_result(self, *written: Any) -> None:
        assert self.gate.wait(10)
        if self.error:
            raise self.error
        self.written.append(written)


def mark_for(backend: Backend) -> StartedMark:
    task: Any = SimpleNamespace(
        request=SimpleNamespace(id="id"), backend=backend, services=SimpleNamespace(hostname="host")
    )
    return StartedMark(task, lambda: False)


def test_a_short_call_writes_nothing():
    backend = Backend()
    mark = mark_for(backend)
    assert mark() is False
    mark.settled()
    assert backend.written == []


def test_a_longer_call_is_marked_once_and_its_result_waits_for_that(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inline, "SHORT_CALL_SECONDS", 0)
    backend = Backend()
    mark = mark_for(backend)
    assert (mark(), mark()) == (False, False), "the call itself does not wait"
    result = threading.Thread(target=lambda: (mark.settled(), backend.written.append(("result",))))
    result.start()
    backend.gate.set()
    wait_until(lambda: len(backend.written) == 2)
    result.join()
    assert backend.written == [("id", {"hostname": "host"}, "STARTED"), ("result",)]


def test_a_backend_that_is_away_is_not_the_calls_trouble(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inline, "SHORT_CALL_SECONDS", 0)
    backend = Backend(OSError("away"))
    backend.gate.set()
    mark = mark_for(backend)
    assert mark() is False
    mark.settled()
