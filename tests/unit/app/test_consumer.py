"""Acknowledgements that the broker refuses for a while."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from redis.exceptions import OutOfMemoryError

from leoflow_celery.app.consumer import Consumer


class Hub:
    """The worker's loop, turned by the test."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], Any]] = []
        self.later: list[Callable[[], Any]] = []

    def call_soon(self, call: Callable[[], Any]) -> None:
        self.soon.append(call)

    def call_later(self, _seconds: float, call: Callable[[], Any]) -> None:
        self.later.append(call)

    def turn(self, calls: list[Callable[[], Any]]) -> None:
        due = calls.copy()
        calls.clear()
        for call in due:
            call()


class Message:
    def __init__(self, refusals: int = 0, error: type[Exception] = OutOfMemoryError) -> None:
        self.refusals, self.error, self.acknowledged = refusals, error, 0

    def ack(self, *_: object) -> None:
        self.refusals -= 1
        if self.refusals >= 0:
            raise self.error
        self.acknowledged += 1


@pytest.fixture
def consumer() -> Any:
    made: Any = Consumer.__new__(Consumer)  # Celery's own part needs a whole worker
    made.hub, made._acknowledgements = Hub(), deque()
    return made


def test_what_the_broker_refuses_is_acknowledged_when_it_takes_it(consumer: Any) -> None:
    refused, other = Message(refusals=2), Message()
    for message in (refused, other):
        consumer.call_soon_ack(message.ack, "logger", ())
    consumer.hub.turn(consumer.hub.soon)
    assert (refused.acknowledged, other.acknowledged) == (0, 1)
    for _ in range(2):
        consumer.hub.turn(consumer.hub.later)
    assert (refused.acknowledged, other.acknowledged) == (1, 1)
    assert not consumer.hub.later


def test_another_error_is_the_loops_to_handle_and_keeps_no_other_back(consumer: Any) -> None:
    refused, broken, other = Message(1), Message(1, KeyError), Message()
    for message in (refused, broken, other):
        consumer.call_soon_ack(message.ack)
    with pytest.raises(KeyError):
        consumer._acknowledge()
    consumer._acknowledge()
    assert (refused.acknowledged, other.acknowledged) == (1, 1)


def test_without_a_loop_it_is_done_at_once(consumer: Any) -> None:
    consumer.hub = None
    message = Message()
    consumer.call_soon_ack(message.ack)
    assert message.acknowledged == 1
