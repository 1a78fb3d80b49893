from __future__ import annotations

import os

import pytest

from leoflow_celery.agent.result import (
    OomWatch,
    describe_exit,
    outcome_of_defect,
    outcome_of_exit,
    read_reason,
    read_return_value,
)
from leoflow_celery.domain.reasons import CLASS_OF, FailureClass, FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import XComRejected


@pytest.mark.parametrize(
    ("exit_code", "named", "oom", "state", "reason", "message", "reported"),
    [
        (0, ("", ""), False, TaskState.SUCCESS, None, "", 0),
        (0, ("skipped", "no rows"), False, TaskState.SKIPPED, None, "no rows", None),
        (0, ("up_for_reschedule", "2030-01-31T12:00:00+01:00"), False, TaskState.UP_FOR_RESCHEDULE, None,
            "2030-01-31T12:00:00+01:00", 0),
        (1, ("up_for_reschedule", "2030-01-31T12:00:00+01:00"), False, TaskState.FAILED, FailureReason.NON_ZERO_EXIT,
            "exit code 1: 2030-01-31T12:00:00+01:00", 1),
        (0, ("up_for_reschedule", "soon"), False, TaskState.FAILED, FailureReason.NON_ZERO_EXIT,
            "the time to look again, 'soon', is not RFC 3339 (2030-01-31T12:00:00+00:00) or epoch seconds", 0),
        (3, ("", ""), False, TaskState.FAILED, FailureReason.NON_ZERO_EXIT, "exit code 3", 3),
        (3, ("invalid_xcom", ""), False, TaskState.FAILED, FailureReason.INVALID_XCOM, "exit code 3", 3),
        (1, ("http_status", "500"), False, TaskState.FAILED, FailureReason.HTTP_STATUS, "exit code 1: 500", 1),
        (1, ("nonsense", ""), False, TaskState.FAILED, FailureReason.NON_ZERO_EXIT, "exit code 1", 1),
        (-15, ("", ""), False, TaskState.FAILED, FailureReason.NON_ZERO_EXIT, "exit code 143 (killed by SIGTERM)", 143),
    ],
)  # fmt: skip
def test_what_an_exit_means(exit_code, named, oom, state, reason, message, reported):
    outcome = outcome_of_exit(exit_code, named, oom)
    assert (outcome.state, outcome.reason, outcome.message, outcome.exit_code) == (state, reason, message, reported)


@pytest.mark.parametrize(("text", "at"), [("1900000000.5", 1900000000.5), ("2030-03-17T17:46:40+00:00", 1900000000.0)])
def test_a_task_names_the_time_to_look_again(text, at):
    assert outcome_of_exit(0, ("up_for_reschedule", text)).reschedule_at == at


@pytest.mark.parametrize("text", ["1" + "0" * 30, "1" * 400, "253402300800", "1969-01-01T00:00:00+00:00"])
def test_a_time_that_the_wire_does_not_know_is_refused(text):
    outcome = outcome_of_exit(0, ("up_for_reschedule", text))
    assert (outcome.state, outcome.reschedule_at) == (TaskState.FAILED, None)


def test_sigkill_when_the_kernel_was_out_of_memory_is_oom():
    outcome = outcome_of_exit(-9, oom_killed=True)
    assert outcome.reason is FailureReason.OOM_KILLED
    assert "SIGKILL" in outcome.message


def test_a_return_value_is_stripped_and_none_when_empty(tmp_path):
    path = tmp_path / "value"
    assert read_return_value(path) is None
    path.write_text(" \n")
    assert read_return_value(path) is None
    path.write_text('{"a": 1}\n')
    assert read_return_value(path) == b'{"a": 1}'


@pytest.mark.parametrize(
    "value", [b"{oops", b"NaN", b"[Infinity]", b'"\xed\xa0\x80"', '"a"'.encode("utf-16"), b'"\\ud800"', b"1e999"]
)
def test_what_is_not_json_is_refused(tmp_path, value):
    (tmp_path / "value").write_bytes(value)
    with pytest.raises(XComRejected) as caught:
        read_return_value(tmp_path / "value")
    assert caught.value.reason == "invalid_xcom"


def test_a_value_far_too_large_is_refused_without_being_read_whole(tmp_path):
    with (tmp_path / "value").open("wb") as file:
        file.write(b"1")
        file.truncate(1 << 33)
    with pytest.raises(XComRejected) as caught:
        read_return_value(tmp_path / "value")
    assert caught.value.reason == "payload_too_large"


def test_what_is_no_file_in_its_place_neither_hangs_nor_leaks_nor_breaks(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "directory").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for name in ("fifo", "link", "directory"):
        with pytest.raises(XComRejected, match=f"^{name} cannot be read: ") as caught:
            read_return_value(tmp_path / name)
        assert caught.value.reason == "invalid_xcom"
        assert read_reason(tmp_path / name) == ("", "")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_defect_after_the_end_of_the_process_is_no_reason_to_run_it_again():
    error = RuntimeError("oops")
    assert outcome_of_defect(error, None).reason is FailureReason.AGENT_LOST
    for exit_code in (0, 3, -15):
        outcome = outcome_of_defect(error, exit_code)
        assert CLASS_OF[outcome.reason] is FailureClass.USER
        assert outcome.message == f"{describe_exit(exit_code)}; then the agent failed: RuntimeError: oops"


def test_a_reason_may_carry_a_sentence(tmp_path):
    (tmp_path / "reason").write_text("http_status\nHTTP 500 from example.org\n")
    assert read_reason(tmp_path / "reason") == ("http_status", "HTTP 500 from example.org")
    assert read_reason(tmp_path / "absent") == ("", "")


@pytest.mark.parametrize("exit_code", [-9, 137])
def test_a_kill_is_out_of_memory_only_when_the_kernel_counted_one(exit_code):
    """137 is what a shell says of a child that was killed."""
    assert outcome_of_exit(exit_code, oom_killed=True).reason is FailureReason.OOM_KILLED
    assert outcome_of_exit(exit_code).reason is FailureReason.NON_ZERO_EXIT


def test_an_exit_code_after_the_kernel_killed_a_descendant_keeps_its_reason_and_says_so():
    outcome = outcome_of_exit(1, oom_killed=True)
    assert outcome.reason is FailureReason.NON_ZERO_EXIT
    assert "out of memory" in outcome.message


def test_sigkill_long_after_a_kill_for_memory_is_somebody_elses():
    outcome = outcome_of_exit(-9, oom_killed=True, outlived=True)
    assert outcome.reason is FailureReason.NON_ZERO_EXIT
    assert "out of memory" in outcome.message
    assert outcome_of_exit(137, oom_killed=True, outlived=True).reason is FailureReason.OOM_KILLED


def test_a_kill_is_outlived_after_two_looks():
    count = 3
    watch = OomWatch(lambda: count)
    assert not watch.killed
    watch.look()
    count = 4
    assert (watch.killed, watch.outlived) == (True, False)
    watch.look()
    assert (watch.killed, watch.outlived) == (True, False)
    watch.look()
    assert (watch.killed, watch.outlived) == (True, True)
