"""Outcomes and final events: what travels between processes and to the user's callback."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.outcome import MAX_MESSAGE_CHARACTERS, FinalEvent, Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState

outcomes = st.builds(
    Outcome,
    st.sampled_from([TaskState.SUCCESS, TaskState.FAILED, TaskState.SKIPPED]),
    st.none() | st.sampled_from(FailureReason),
    st.text(max_size=50),
    st.none() | st.integers(-64, 255),
    st.text(max_size=20),
    st.lists(st.text(max_size=20), max_size=3).map(tuple),
)


@given(outcomes)
def test_an_outcome_survives_json(outcome: Outcome) -> None:
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome


def test_a_reason_from_a_newer_process_is_a_failure_all_the_same() -> None:
    outcome = Outcome.from_json({"state": "failed", "reason": "from_the_future"})
    assert outcome == Outcome.failed(FailureReason.NON_ZERO_EXIT, "")


def test_a_message_is_cut_and_says_so() -> None:
    message = Outcome.failed(FailureReason.TIMEOUT, "x" * 10_000).message
    assert len(message) == MAX_MESSAGE_CHARACTERS
    assert message.endswith("…")


def test_the_final_event_is_one_flat_json_object() -> None:
    outcome = Outcome.failed(FailureReason.EVICTED, "the node ran out of memory", 137)
    event = FinalEvent(AttemptId("ti", 2, 3), "acme", "d", "r", "t", outcome, "celery-id", "host", 1.0, 2.5).to_json()
    assert json.loads(json.dumps(event)) == {
        "task_instance_id": "ti",
        "try_number": 2,
        "launch": 3,
        "tenant_id": "acme",
        "dag_id": "d",
        "run_id": "r",
        "task_id": "t",
        "state": "failed",
        "reason": "evicted",
        "failure_class": "infrastructure",
        "message": "the node ran out of memory",
        "exit_code": 137,
        "last_event": "",
        "log_tail": [],
        "celery_task_id": "celery-id",
        "hostname": "host",
        "started_at": 1.0,
        "ended_at": 2.5,
    }


def test_a_success_has_no_reason_and_no_class() -> None:
    event = FinalEvent(AttemptId("ti"), "acme", "d", "r", "t", Outcome.success(), "celery-id").to_json()
    assert (event["state"], event["reason"], event["failure_class"], event["exit_code"]) == ("success", None, None, 0)
