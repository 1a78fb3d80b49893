from __future__ import annotations

import pytest

from leoflow_celery.agent.deadline import URGED_SECONDS, Deadline, StopRequest, seconds_left
from leoflow_celery.domain.reasons import FailureReason


@pytest.mark.parametrize(
    ("now", "urged_at", "left"),
    [
        (0, None, 600),
        (700, None, -100),
        (100, 100, URGED_SECONDS),
        (102, 100, URGED_SECONDS - 2),
        (110, 100, URGED_SECONDS - 10),
        (599, 599, 1),
    ],
)
def test_a_request_to_go_leaves_a_few_seconds_of_any_time(now, urged_at, left):
    assert seconds_left(now, 0, 600, urged_at) == left


def test_what_begins_after_the_request_has_its_few_seconds_too():
    assert seconds_left(1_000, 1_000, 600, 100) == URGED_SECONDS


def test_patience_ends_soon_after_the_request_even_of_a_task_that_ran_too_long():
    stop = StopRequest()
    deadline = Deadline(stop, 600)
    stop.ask(FailureReason.TIMEOUT, "too long")
    assert deadline.left() > 590
    stop.ask(FailureReason.INTERRUPTED, "SIGTERM")
    assert stop.reason is FailureReason.TIMEOUT
    assert deadline.left() <= URGED_SECONDS


def test_progress_begins_it_anew():
    deadline = Deadline(StopRequest(), 10)
    before = deadline.left()
    assert deadline.left(moved_at=1e12) > before
