"""What an ended container means."""

from __future__ import annotations

import pytest

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.termination import TerminationRecord
from leoflow_celery.executors.docker.decisions import classify
from leoflow_celery.executors.docker.parse_container import End, ended_for_memory


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
        (end(0, oom=True), None, 0, "invalid_image"),
        (end(0), RUNNING, 0, "container_lost"),
        (end(137), None, 0, "container_lost"),
        (end(255), None, 0, "container_lost"),
        (end(139), RUNNING, 0, "container_lost"),
        (end(139), None, 0, "non_zero_exit"),
        (end(143), None, 0, "interrupted"),
        (end(143), INTERRUPTED, 0, "interrupted"),
        (end(143, ran=61), INTERRUPTED, 60, "timeout"),
        (end(137, ran=61), RUNNING, 60, "timeout"),
        (end(137, ran=59), RUNNING, 60, "container_lost"),
        (end(0), None, 0, "invalid_image"),
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


def test_an_agent_that_leaves_no_record_is_told_from_none_by_its_claim():
    assert classify(end(0), None, claimed=True).outcome.reason is FailureReason.CONTAINER_LOST
    assert classify(end(1), None, claimed=True, log_tail=[WRONG_MACHINE]).outcome.reason is FailureReason.CONTAINER_LOST


WRONG_MACHINE = "exec /usr/bin/agent: exec format error"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([WRONG_MACHINE], "invalid_image"),
        (["standard_init_linux.go:228: exec user process caused: exec format error", ""], "invalid_image"),
        (['standard_init_linux.go:211: exec user process caused "exec format error"'], "invalid_image"),
        (["exec /app/run.sh: no such file or directory"], "command_not_found"),
        (["standard_init_linux.go:228: exec user process caused: no such file or directory"], "command_not_found"),
        (["exec /app/run.sh: permission denied"], "command_not_found"),
        (["working", WRONG_MACHINE], "non_zero_exit"),
        (["sh: 1: exec: tool: not found"], "non_zero_exit"),
        ([], "non_zero_exit"),
    ],
)
def test_what_the_runtime_says_of_a_program_that_the_kernel_refuses(lines, reason):
    assert classify(end(1), None, log_tail=lines).outcome.reason is FailureReason(reason)
    assert classify(end(1), RUNNING, log_tail=lines).outcome.reason is FailureReason.CONTAINER_LOST


def event(action: str, at: float) -> dict:
    return {"Action": action, "timeNano": int(at * 1e9)}


@pytest.mark.parametrize(
    ("events", "fresh"),
    [
        ([event("oom", 99.9), event("die", 100)], True),
        ([event("die", 100), event("oom", 100.2)], True),
        ([event("kill", 80), event("oom", 95), event("die", 100)], True),
        ([event("oom", 99.8), event("kill", 99.9), event("die", 100)], False),
        ([event("oom", 80), event("die", 100)], False),
        ([event("start", 1), event("die", 100)], False),
        ([event("start", 1)], None),
        ([], None),
    ],
)
def test_a_kill_for_memory_ends_a_container_when_it_is_fresh_and_the_last(events, fresh):
    assert ended_for_memory(events, 100) is fresh


def test_messages_say_how():
    assert "exit code 137, SIGKILL" in classify(end(137), None).outcome.message
    assert "its limit of 32Mi" in classify(end(137, oom=True, limit=32 << 20), None).outcome.message
    assert "the memory of the host" in classify(end(137, oom=True), None).outcome.message
    assert classify(end(255, error="shim died"), None).outcome.last_event == "shim died"
