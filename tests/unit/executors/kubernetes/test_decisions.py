"""What is done about a pod: reported, deleted or left alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.reasons import FailureReason as Reason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.executors.kubernetes.decisions import (
    KEEP,
    PodDecision,
    ReconcilePolicy,
    decide_pod,
    is_missing,
    missing_outcome,
)
from tests.unit.executors.kubernetes.pods import (
    AGE,
    EXPECTED,
    NOW,
    observed,
    record,
    running,
    terminated,
    waiting,
)

POLICY = ReconcilePolicy()
UNSCHEDULED = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}
INTERRUPTED = record(TaskState.FAILED, reason="interrupted", message="SIGTERM", exit_code=143)


def decide(*args: Any, expected: bool = True, read_at: float = NOW, **kwargs: Any) -> PodDecision:
    return decide_pod(observed(*args, **kwargs), EXPECTED if expected else None, read_at, NOW, POLICY)


def reported(*args: Any, **kwargs: Any) -> tuple[TaskState, Reason | None, bool]:
    """State and reason of what is reported, and whether the pod is deleted."""
    decision = decide(*args, **kwargs)
    assert decision.report is not None
    return decision.report.outcome.state, decision.report.outcome.reason, decision.delete


# -- expected: the agent's record ---------------------------------------------------------------------------------


def test_a_running_pod_is_left_alone() -> None:
    assert decide(state=running()) == KEEP


def test_a_success_that_was_never_reported_stays_a_success_with_its_value() -> None:
    message = record(TaskState.SUCCESS, exit_code=0, return_value='{"rows": 7}')
    decision = decide("Succeeded", state=terminated(0, "Completed", message))
    assert decision.report is not None
    assert decision.report.outcome.state is TaskState.SUCCESS
    assert (decision.report.return_value, decision.report.wants_log_tail) == ('{"rows": 7}', True)
    assert not decision.delete


def test_a_success_stays_one_although_the_pod_was_evicted() -> None:
    message = record(TaskState.SUCCESS, exit_code=0)
    assert reported("Failed", reason="Evicted", state=terminated(0, "Completed", message))[:2] == (
        TaskState.SUCCESS,
        None,
    )


def test_a_failure_by_the_agent_s_word_keeps_its_reason() -> None:
    message = record(TaskState.FAILED, reason="oom_killed", message="exit code 137", exit_code=137)
    decision = decide("Failed", state=terminated(1, "Error", message))
    assert decision.report is not None
    outcome = decision.report.outcome
    assert (outcome.reason, outcome.message, outcome.exit_code) == (Reason.OOM_KILLED, "exit code 137", 137)


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        ({}, Reason.INTERRUPTED),
        ({"deleted": NOW}, Reason.POD_DELETED),
        ({"reason": "Evicted"}, Reason.EVICTED),
        ({"reason": "DeadlineExceeded"}, Reason.TIMEOUT),
        ({"reason": "NodeLost"}, Reason.NODE_LOST),
    ],
)
def test_an_interruption_gives_way_to_what_interrupted(pod: dict[str, Any], reason: Reason) -> None:
    state = terminated(1, "Error", INTERRUPTED)
    assert reported("Failed", state=state, **pod) == (TaskState.FAILED, reason, False)
    decision = decide("Failed", state=state, **pod)
    assert decision.report is not None
    assert decision.report.outcome.exit_code == 143


def test_an_end_that_the_agent_reported_is_awaited_and_repeated_only_when_sql_should_know_it() -> None:
    message = record(TaskState.SUCCESS, reported=True)
    assert decide("Succeeded", state=terminated(0, "Completed", message, ago=29)) == KEEP
    late = decide("Succeeded", state=terminated(0, "Completed", message, ago=31))
    assert late.report is not None
    assert not late.report.wants_log_tail


def test_a_refused_claim_is_nobody_s_end() -> None:
    message = record(TaskState.NONE, message="claim refused: held", reported=True)
    assert decide("Succeeded", state=terminated(0, "Completed", message)) == KEEP


def test_an_agent_killed_while_its_task_ran_is_lost_infrastructure() -> None:
    state = terminated(137, "Error", record(TaskState.RUNNING))
    assert reported("Failed", state=state) == (TaskState.FAILED, Reason.AGENT_LOST, False)
    oom = terminated(137, "OOMKilled", record(TaskState.RUNNING))
    assert reported("Failed", state=oom) == (TaskState.FAILED, Reason.OOM_KILLED, False)


@pytest.mark.parametrize("text", ["", "Traceback …", '{"attempt": "ti-1"', record(TaskState.SUCCESS, attempt="other")])
def test_without_a_record_of_this_attempt_the_container_speaks(text: str | bytes) -> None:
    pod = observed("Failed", state=terminated(3, "Error", text))
    decision = decide_pod(pod, replace(EXPECTED, claimed=False), NOW, NOW, POLICY)
    assert decision.report is not None
    assert (decision.report.outcome.reason, decision.report.outcome.exit_code) == (Reason.NON_ZERO_EXIT, 3)
    assert decision.report.wants_log_tail


def test_an_end_without_a_record_may_have_been_reported_a_moment_ago() -> None:
    assert decide("Succeeded", state=terminated(0, "Completed", ago=29)) == KEEP
    assert reported("Succeeded", state=terminated(0, "Completed", ago=31))[1] is Reason.AGENT_LOST
    unclaimed = replace(EXPECTED, claimed=False)
    decision = decide_pod(observed("Succeeded", state=terminated(0, "Completed", ago=31)), unclaimed, NOW, NOW, POLICY)
    assert decision.report is not None
    assert decision.report.outcome.reason is Reason.INVALID_IMAGE


def test_there_is_no_log_of_a_container_that_never_ran() -> None:
    decision = decide("Failed", reason="OutOfcpu")
    assert decision.report is not None
    assert not decision.report.wants_log_tail


# -- expected: never starting, never ending ---------------------------------------------------------------------


def test_a_pod_that_cannot_start_is_reported_and_deleted() -> None:
    state = waiting("ImagePullBackOff")
    assert reported("Pending", state=state) == (TaskState.FAILED, Reason.IMAGE_PULL_FAILED, True)
    assert decide("Pending", state=state, age=20) == KEEP


def test_pending_is_given_up_after_its_timeout() -> None:
    conditions = (UNSCHEDULED,)
    assert decide("Pending", node="", conditions=conditions, age=599) == KEEP
    assert reported("Pending", node="", conditions=conditions, age=600)[1:] == (Reason.UNSCHEDULABLE, True)
    for_ever = replace(POLICY, pending_timeout_seconds=0)
    pod = observed("Pending", node="", conditions=conditions, age=10**6)
    assert decide_pod(pod, EXPECTED, NOW, NOW, for_ever) == KEEP


def test_a_pod_given_up_while_it_waits_for_its_image_is_given_up_because_of_it() -> None:
    pod, hasty = observed("Pending", state=waiting("ErrImagePull"), age=10), replace(POLICY, pending_timeout_seconds=10)
    decision = decide_pod(pod, EXPECTED, NOW, NOW, hasty)
    assert decision.report is not None
    assert decision.report.outcome.reason is Reason.IMAGE_PULL_FAILED


def test_patience_begins_when_the_launch_was_complete() -> None:
    """A worker was killed before it made the pod's Secret; the second delivery made it a moment ago."""
    pod = observed("Pending", state=waiting("CreateContainerConfigError", f'secret "{EXPECTED.name}-1" not found'))
    assert decide_pod(pod, replace(EXPECTED, launched_at=NOW - 5), NOW, NOW, POLICY) == KEEP
    assert decide_pod(pod, replace(EXPECTED, launched_at=None), NOW, NOW, POLICY) == KEEP
    assert decide_pod(pod, replace(EXPECTED, launched_at=NOW - 31), NOW, NOW, POLICY).delete


def test_patience_counts_from_the_first_failure_and_not_from_the_start_of_a_long_pull() -> None:
    pod = observed("Pending", state=waiting("ErrImagePull", "no such host"))
    assert decide_pod(pod, EXPECTED, NOW, NOW, POLICY, failing_since=NOW - 29) == KEEP
    decision = decide_pod(pod, EXPECTED, NOW, NOW, POLICY, failing_since=NOW - 30)
    assert decision.delete
    assert decision.report is not None
    assert decision.report.outcome.message == ("node 'node-1' cannot pull image 'example/etl:1' for 30 s: no such host")
    never = observed("Pending", state=waiting("InvalidImageName"))
    assert decide_pod(never, EXPECTED, NOW, NOW, POLICY, failing_since=NOW).delete
    pending_too_long = observed("Pending", state=waiting("ErrImagePull"), age=600)
    assert decide_pod(pending_too_long, EXPECTED, NOW, NOW, POLICY, failing_since=NOW - 1).delete


def test_a_running_pod_has_no_pending_timeout() -> None:
    assert decide(state=running(), age=10**6) == KEEP


def test_a_deleted_pod_has_its_grace_and_then_its_node_is_lost() -> None:
    assert decide(state=running(), deleted=NOW + 5) == KEEP
    assert decide(state=running(), deleted=NOW - 29) == KEEP
    assert reported(state=running(), deleted=NOW - 31) == (TaskState.FAILED, Reason.NODE_LOST, False)


def test_a_pod_whose_node_is_silent_is_lost() -> None:
    assert reported("Unknown", state=running()) == (TaskState.FAILED, Reason.NODE_LOST, False)


# -- not expected --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["Pending", "Running", "Unknown"])
def test_a_pod_that_sql_does_not_expect_is_deleted_without_a_report(phase: str) -> None:
    assert decide(phase, state=running(), expected=False) == PodDecision(delete=True, why="unexpected")


def test_a_pod_younger_than_what_sql_said_is_not_judged() -> None:
    assert decide(state=running(), expected=False, age=29) == KEEP
    assert decide(state=running(), expected=False, read_at=NOW - AGE) == KEEP


def test_a_finished_pod_stays_for_its_grace_and_is_then_deleted() -> None:
    age = 10_000.0
    assert decide("Failed", state=terminated(1, ago=599), expected=False, age=age) == KEEP
    done = decide("Failed", state=terminated(1, ago=600), expected=False, age=age)
    assert done == PodDecision(delete=True, why="finished")
    without_end_time = decide("Failed", reason="Evicted", expected=False, age=600)
    assert without_end_time == PodDecision(delete=True, why="finished")


def test_a_finished_pod_that_sql_still_expects_is_never_deleted() -> None:
    message = record(TaskState.SUCCESS)
    assert not decide("Succeeded", state=terminated(0, "Completed", message, ago=100), age=10**6).delete


def test_others_pods_and_pods_on_their_way_out_are_left_alone() -> None:
    assert decide(state=running(), expected=False, attempt=None) == KEEP
    assert decide(state=running(), expected=False, deleted=NOW + 10) == KEEP
    assert decide("Failed", state=terminated(1, ago=9_000), expected=False, age=10**4, deleted=NOW) == KEEP


@pytest.mark.parametrize(
    "whose", [{"system": "another"}, {"attempt": None}, {"attempt": AttemptId("ti-1", 2, 4)}], ids=str
)
@pytest.mark.parametrize(
    "status",
    [
        {"phase": "Pending", "state": waiting("InvalidImageName")},
        {"phase": "Pending", "age": 10**6},
        {"phase": "Unknown"},
        {"phase": "Failed", "state": terminated(1)},
        {"phase": "Running", "state": running(), "deleted": NOW - 60},
    ],
    ids=lambda status: str(status["phase"]),
)
def test_a_pod_that_is_not_ours_is_left_alone_even_under_a_name_that_is_expected(
    whose: dict[str, Any], status: dict[str, Any]
) -> None:
    assert decide(**status) != KEEP
    assert decide(**status, **whose) == KEEP


def test_what_another_system_does_not_expect_is_its_own_business() -> None:
    assert decide(state=running(), expected=False, system="another") == KEEP
    ours = replace(POLICY, system="another")
    assert decide_pod(observed(state=running(), system="another"), None, NOW, NOW, ours).delete


# -- no pod ----------------------------------------------------------------------------------------------------------


def test_what_was_launched_well_before_the_list_and_is_not_in_it_is_gone() -> None:
    assert is_missing(replace(EXPECTED, launched_at=NOW - 31), NOW, POLICY)
    assert not is_missing(replace(EXPECTED, launched_at=NOW - 29), NOW, POLICY)
    assert not is_missing(replace(EXPECTED, launched_at=None), NOW, POLICY)


def test_the_sentence_for_a_missing_pod() -> None:
    assert missing_outcome(EXPECTED).message == f"pod {EXPECTED.name} was deleted while its task was running"
    assert missing_outcome(replace(EXPECTED, claimed=False)).message.endswith("was deleted before its agent called")
