"""Notifications never fail their caller and never pile up."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from typing import Any

import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.gateway.lifecycle import CompletionNudge


class Deferred(Executor):
    """Runs what was submitted when told to."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def submit(self, function: Any, /, *arguments: Any, **_: Any) -> Future[Any]:
        self.calls.append(lambda: function(*arguments))
        return Future()

    def run(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


def test_a_foreign_error_is_logged_and_swallowed(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: str, __: int) -> None:
        raise ConnectionError("no broker")

    pool = Deferred()
    CompletionNudge(fail, pool).finished(AttemptId("ti-9", 2))
    pool.run()
    assert "ti-9/2.1" in caplog.text
    assert "no broker" in caplog.text


def test_a_broker_that_is_away_does_not_fill_the_memory() -> None:
    told: list[tuple[str, int]] = []
    pool = Deferred()
    nudge = CompletionNudge(lambda ti, number: told.append((ti, number)), pool)
    for number in range(1, 2_001):
        nudge.finished(AttemptId("ti", number))
    assert len(pool.calls) == 1_000
    pool.run()
    nudge.finished(AttemptId("ti", 3_000))
    pool.run()
    assert told[-1] == ("ti", 3_000)
