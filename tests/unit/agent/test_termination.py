from __future__ import annotations

import json
import secrets

import pytest

from leoflow_celery.agent.report import TerminationLog
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.termination import MAX_BYTES, TerminationRecord, decode, encode


def test_a_record_survives_encoding():
    record = TerminationRecord("ti", TaskState.FAILED, 3, "non_zero_exit", "exit code 3", False)
    assert decode(encode(record)) == record


def test_a_long_message_is_cut_and_the_record_stays_json():
    for message in ("x" * 10_000, "é\n\0" * 5_000):
        encoded = encode(TerminationRecord("ti", TaskState.FAILED, 1, "timeout", message))
        assert len(encoded) <= MAX_BYTES
        assert decode(encoded).reason == "timeout"


def test_what_is_no_record_decodes_to_none():
    for text in ("", "killed", "[]", "{}", '{"attempt": "x", "state": "nonsense"}', '{"attempt": "x", "sta', b"\xff"):
        assert decode(text) is None


@pytest.mark.parametrize(
    "field", [{"return_value": 5}, {"return_value": [1]}, {"reason": ["x"]}, {"message": 1}, {"attempt": 5}]
)
def test_a_record_with_something_else_where_text_belongs_is_none(field):
    assert decode(json.dumps({"attempt": "ti", "state": "success", **field})) is None


def test_a_text_that_is_nested_without_end_is_no_record():
    assert decode("[" * MAX_BYTES) is None


@pytest.mark.parametrize("exit_code", [2**40, -(2**31) - 1, "abc", True, 1.5, [1]])
def test_an_exit_code_that_no_process_has_is_left_out(exit_code):
    record = decode(json.dumps({"attempt": "ti", "state": "failed", "exit_code": exit_code}))
    assert (record.state, record.exit_code, record.outcome().exit_code) == (TaskState.FAILED, None, None)


def test_only_ends_have_ended():
    ended = {state for state in TaskState if TerminationRecord("ti", state).ended}
    assert ended == {TaskState.SUCCESS, TaskState.FAILED, TaskState.SKIPPED, TaskState.UPSTREAM_FAILED}


def test_a_shorter_record_over_a_longer_one_leaves_no_rest(tmp_path):
    path = tmp_path / "log"
    path.write_text("something older, from another program")
    log = TerminationLog(str(path), "ti")
    log.claimed()
    log.record(Outcome.success(), b'{"rows": [1, 2, 3]}')
    assert json.loads(path.read_text())["return_value"] == '{"rows": [1, 2, 3]}'
    log.record(Outcome.success(), reported=True)
    assert json.loads(path.read_text()) == {
        "attempt": "ti", "state": "success", "exit_code": 0, "reason": None, "message": "", "reported": True,
    }  # fmt: skip


def test_a_success_whose_value_cannot_be_kept_is_recorded_as_lost(tmp_path):
    log = TerminationLog(str(tmp_path / "log"), "ti")
    log.record(Outcome.success(), b'"' + secrets.token_hex(MAX_BYTES).encode() + b'"')
    record = decode((tmp_path / "log").read_bytes())
    assert (record.state, record.reason) == (TaskState.FAILED, FailureReason.AGENT_LOST)


def test_a_path_that_cannot_be_written_does_not_stop_the_agent():
    TerminationLog("/no/such/dir/log", "ti").record(Outcome.success())
    TerminationLog("", "ti").record(Outcome.success())


def kept_of(record: TerminationRecord, containers: int) -> TerminationRecord | None:
    """What a kubelet leaves of it: 12 KiB for all containers of the pod."""
    return decode(encode(record)[: min(4_096, 12_288 // containers)])


@pytest.mark.parametrize("containers", [1, 3, 6, 12, 24])
def test_a_success_with_a_long_value_stays_one_in_a_pod_of_many_containers(containers):
    text = json.dumps({"rows": ["a value of three thousand characters"] * 75})
    record = kept_of(TerminationRecord("ti", TaskState.SUCCESS, 0, return_value=text), containers)
    assert (record.state, record.exit_code, record.return_value, record.lost_value) == (
        TaskState.SUCCESS, 0, text, False,
    )  # fmt: skip


def test_a_success_whose_value_was_cut_stays_one_and_says_what_is_missing():
    text = json.dumps(secrets.token_hex(1_500))
    record = kept_of(TerminationRecord("ti", TaskState.SUCCESS, 0, return_value=text), 6)
    assert (record.state, record.return_value, record.lost_value) == (TaskState.SUCCESS, None, True)
    assert f"the return value ({len(text)} characters) is lost" in record.outcome().message


@pytest.mark.parametrize("message", ["x" * 4_000, 'a "quoted" \\ and\n\tescaped é ' * 100])
def test_a_failure_that_was_cut_keeps_its_reason_its_code_and_most_of_its_sentence(message):
    whole = encode(TerminationRecord("ti", TaskState.FAILED, 137, "oom_killed", message))
    for size in range(120, len(whole)):
        record = decode(whole[:size])
        assert (record.state, record.reason, record.exit_code) == (TaskState.FAILED, "oom_killed", 137)
        assert record.message[:-1] == message[: len(record.message) - 1]
    assert len(decode(whole[:2_048]).message) > 300


def test_a_number_right_before_the_cut_is_not_believed():
    whole = encode(TerminationRecord("ti", TaskState.FAILED, 137, "oom_killed"))
    record = decode(whole[: whole.index(b"137") + 2])
    assert (record.state, record.exit_code) == (TaskState.FAILED, None)


def test_a_record_of_an_older_agent_that_was_cut_is_read_as_far_as_it_goes():
    old = json.dumps({"attempt": "ti", "state": "success", "exit_code": 0, "reason": None, "return_value": "x" * 3_000})
    assert decode(old[:2_048]).state is TaskState.SUCCESS


@pytest.mark.parametrize("packed", ["!!", "AAAA", "x" * 3_000])
def test_a_packed_value_that_is_none_is_a_lost_one(packed):
    text = json.dumps({"attempt": "ti", "state": "success", "value_characters": 9, "packed_value": packed})
    assert decode(text).lost_value
