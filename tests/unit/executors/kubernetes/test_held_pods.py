"""A pod that carries our finalizer: it is let go as soon as nobody will read it any more, and never kept for ever."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from leoflow_celery.domain.desired_state import ExpectedAttempt
from leoflow_celery.domain.reasons import FailureReason as Reason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.executors.kubernetes.decisions import KEEP, PodDecision, ReconcilePolicy, decide_pod
from leoflow_celery.executors.kubernetes.labels import FINALIZER
from leoflow_celery.executors.kubernetes.parse_pod import observe
from tests.unit.executors.kubernetes.pods import EXPECTED, NOW, pod, record, running, terminated, waiting

POLICY = ReconcilePolicy()
SUCCESS = terminated(0, "Completed", record(TaskState.SUCCESS, exit_code=0))
REFUSED = terminated(0, "Completed", record(TaskState.NONE, reported=True))


def held(item: dict[str, Any], grace: int | None = None) -> dict[str, Any]:
    item["metadata"]["finalizers"] = ["example.org/theirs", FINALIZER]
    if grace is not None:
        item["metadata"]["deletionGracePeriodSeconds"] = grace
    return item


def decided(item: dict[str, Any], expected: ExpectedAttempt | None = EXPECTED) -> PodDecision:
    return decide_pod(observe(item), expected, NOW, NOW, POLICY)


def test_a_deleted_pod_whose_end_nobody_recorded_is_reported_and_kept() -> None:
    decision = decided(held(pod("Succeeded", state=SUCCESS, deleted=NOW - 50), grace=0))
    assert decision.report is not None
    assert decision.report.outcome.state is TaskState.SUCCESS
    assert (decision.release, decision.delete) == (False, False)


@pytest.mark.parametrize("phase", ["Running", "Succeeded", "Failed", "Pending"])
def test_a_deleted_pod_that_nobody_expects_is_released(phase: str) -> None:
    assert decided(held(pod(phase, deleted=NOW - 1), grace=0), None) == PodDecision(release=True, why="recorded")


def test_an_ended_pod_is_released_as_soon_as_its_end_is_recorded_and_stays_to_be_looked_at() -> None:
    decision = decided(held(pod("Succeeded", state=SUCCESS)), None)
    assert (decision.release, decision.delete) == (True, False)
    assert decided(pod("Succeeded", state=SUCCESS), None) == KEEP


def test_a_pod_that_sql_may_not_know_yet_stays_held() -> None:
    assert decided(held(pod("Running", state=running(), age=10)), None) == KEEP


@pytest.mark.parametrize("state", [None, waiting("ContainerCreating")])
def test_a_pod_that_only_our_finalizer_keeps_is_missing(state: dict[str, Any] | None) -> None:
    node = "node-1" if state else ""
    decision = decided(held(pod("Pending", state=state, node=node, deleted=NOW - 40), grace=0))
    assert decision.report is not None
    assert decision.report.outcome.reason is Reason.POD_DELETED
    young = replace(EXPECTED, launched_at=NOW - 5)
    assert decided(held(pod("Pending", state=state, node=node, deleted=NOW - 40), grace=0), young) == KEEP


def test_a_pod_whose_kubelet_may_still_tell_its_end_is_waited_for() -> None:
    assert decided(held(pod("Running", state=running(), deleted=NOW - 5), grace=0)) == KEEP
    assert decided(held(pod("Running", state=running(), deleted=NOW - 5), grace=30)) == KEEP


def test_a_deleted_pod_whose_claim_was_refused_has_no_end_to_wait_for() -> None:
    assert decided(held(pod("Succeeded", state=REFUSED, deleted=NOW - 5), grace=0)).release
    assert decided(held(pod("Succeeded", state=REFUSED))) == KEEP


def test_another_system_s_pod_is_never_released() -> None:
    assert decided(held(pod("Succeeded", state=SUCCESS, system="another", deleted=NOW - 50)), None) == KEEP
