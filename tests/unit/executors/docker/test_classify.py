"""What an ended container means."""

from __future__ import annotations

import pytest

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.termination import TerminationRecord
from leoflow_celery.executors.docker.classify import classify
from leoflow_celery.executors.docker.observe import End


def end(exit_code: int = 0, *, oom: bool = False, error: str = "", ran: float = 10, limit: int = 0) -> End:
    return End(exit_code, oom, error, 1_000.0, 1_000.0 + ran, limit)


def record(state: TaskState, **more) -> TerminationRecord:
    return TerminationRecord("ti", state, **more)


RUNNING = record(TaskState.RUNNING)
INTERRUPTED = record(TaskState.FAILED, reason="interrupted", message="the agent received SIGTERM")


@pytest.mark.parametrize(
    ("state", "left", "deadline", "reason"),
    [
        (end(3), None, 0, "non_zero_exit"),
        (end(137, oom=True, limit=32 << 20), None, 0, "oom_killed"),
        (end(137, oom=True), RUNNING, 0, "oom_killed"),
        (end(0, oom=True), None, 0, "container_lost"),
        (end(137), None, 0, "container_lost"),
        (end(255), None, 0, "container_lost"),
        (end(139), RUNNING, 0, "container_lost"),
        (end(139), None, 0, "non_zero_exit"),
        (end(143), None, 0, "interrupted"),
        (end(143), INTERRUPTED, 0, "interrupted"),
        (end(143, ran=61), INTERRUPTED, 60, "timeout"),
        (end(137, ran=61), RUNNING, 60, "timeout"),
        (end(137, ran=59), RUNNING, 60, "container_lost"),
        (end(0), None, 0, "container_lost"),
        (End(127, False, "no such program", None, None), None, 0, "container_create_failed"),
        (end(1), record(TaskState.FAILED, reason="schema_mismatch"), 0, "schema_mismatch"),
        (end(1, ran=99), record(TaskState.FAILED, reason="timeout"), 60, "timeout"),
    ],
)
def test_ends_that_nobody_reported(state, left, deadline, reason):
    report = classify(state, left, deadline)
    assert report is not None
    assert (report.outcome.state, report.outcome.reason) == (TaskState.FAILED, FailureReason(reason))
    assert report.outcome.message or left


@pytest.mark.parametrize(
    "left",
    [
        record(TaskState.NONE, reported=True),
        record(TaskState.SUCCESS, reported=True),
        record(TaskState.FAILED, reason="non_zero_exit", reported=True),
    ],
)
def test_what_is_known_is_not_reported(left):
    assert classify(end(137, oom=True), left) is None


def test_a_success_stays_one_whatever_became_of_the_container():
    report = classify(end(137, oom=True, ran=99), record(TaskState.SUCCESS, exit_code=0, return_value="[1]"), 60)
    assert report is not None
    assert (report.outcome.state, report.return_value) == (TaskState.SUCCESS, "[1]")


def test_messages_say_how():
    assert "exit code 137, SIGKILL" in classify(end(137), None).outcome.message
    assert "its limit of 32Mi" in classify(end(137, oom=True, limit=32 << 20), None).outcome.message
    assert "the memory of the host" in classify(end(137, oom=True), None).outcome.message
    assert classify(end(255, error="shim died"), None).outcome.last_event == "shim died"
