"""A task is judged by its own container; the statuses are as current kubelets write them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from leoflow_celery.domain.reasons import CLASS_OF, FailureClass
from leoflow_celery.domain.reasons import FailureReason as Reason
from leoflow_celery.domain.relaunch import Memory, RelaunchPolicy, relaunch_decision
from leoflow_celery.domain.states import TaskState
from leoflow_celery.executors.kubernetes.decisions import KEEP, PodDecision, ReconcilePolicy, decide_pod
from leoflow_celery.executors.kubernetes.events import PodEvent, pull_words
from leoflow_celery.executors.kubernetes.failure_reasons import cause_of_end
from leoflow_celery.executors.kubernetes.parse_pod import observe
from tests.unit.executors.kubernetes.pods import (
    AGE,
    EXPECTED,
    NOW,
    observed,
    pod,
    record,
    running,
    stamp,
    terminated,
    waiting,
)

POLICY = ReconcilePolicy()
BACKS_OFF = 'Back-off pulling image "example/etl:503"'


def decided(item: dict[str, Any], policy: ReconcilePolicy = POLICY, **told: Any) -> PodDecision:
    return decide_pod(observe(item), EXPECTED, NOW, NOW, policy, **told)


def reason_of(decision: PodDecision) -> Reason | None:
    assert decision.report is not None
    return decision.report.outcome.reason


def with_native_sidecar(item: dict[str, Any], state: dict[str, Any], started: bool = True) -> dict[str, Any]:
    """The pod with an init container that runs beside the task (Kubernetes 1.29)."""
    item["spec"].setdefault("initContainers", []).append({"name": "proxy", "restartPolicy": "Always"})
    status = {"name": "proxy", "state": state, "lastState": {}, "restartCount": 4, "ready": False, "started": started}
    item["status"].setdefault("initContainerStatuses", []).append(status)
    return item


@pytest.mark.parametrize("reason", ["ImagePullBackOff", "CreateContainerConfigError", "CrashLoopBackOff"])
def test_a_sidecar_that_cannot_start_leaves_a_running_task_alone(reason: str) -> None:
    """Such a pod stays in phase Pending for ever."""
    item = pod("Pending", state=running(), age=100_000)
    item["status"]["containerStatuses"].insert(0, {"name": "proxy", "state": waiting(reason)})
    assert decided(item) == KEEP


@pytest.mark.parametrize("state", [waiting("CrashLoopBackOff"), terminated(137, "OOMKilled"), terminated(1)], ids=str)
def test_a_native_sidecar_never_touches_a_running_task(state: dict[str, Any]) -> None:
    assert decided(with_native_sidecar(pod("Running", state=running(), age=100_000), state)) == KEEP


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("state", [terminated(137), terminated(137, "OOMKilled"), waiting("CrashLoopBackOff")], ids=str)
def test_a_native_sidecar_never_explains_an_end(state: dict[str, Any], started: bool) -> None:
    killed = with_native_sidecar(pod("Failed", state=terminated(137, "OOMKilled")), state, started)
    assert cause_of_end(observe(killed)).reason is Reason.OOM_KILLED
    exited = with_native_sidecar(pod("Failed", state=terminated(3)), state, started)
    cause = cause_of_end(observe(exited))
    assert (cause.reason, cause.exit_code) == (Reason.NON_ZERO_EXIT, 3)


def test_a_native_sidecar_that_keeps_the_task_from_starting_is_named() -> None:
    item = with_native_sidecar(
        pod("Pending", state=waiting("PodInitializing")), waiting("ErrImagePull", "not found"), started=False
    )
    assert reason_of(decided(item)) is Reason.IMAGE_PULL_FAILED


def test_the_status_of_another_container_is_not_the_task_s() -> None:
    item = pod("Running")
    item["status"]["containerStatuses"] = [{"name": "proxy", "state": terminated(1)}]
    assert observe(item).task is None
    assert decided(item) == KEEP


def test_an_init_container_that_works_is_progress_and_has_a_limit_of_its_own() -> None:
    hasty = replace(POLICY, pending_timeout_seconds=20)
    item = pod("Pending", init=running(), state=waiting("PodInitializing"), age=AGE)
    assert decided(item, hasty) == KEEP
    decision = decided(item, replace(hasty, init_timeout_seconds=60))
    assert reason_of(decision) is Reason.INIT_TIMEOUT
    assert decision.delete
    assert decision.report is not None
    assert "init container 'fetch' works on node 'node-1' for 298 s" in decision.report.outcome.message
    assert "LEOFLOW_KUBERNETES_INIT_TIMEOUT_SECONDS" in decision.report.outcome.message


def test_pending_begins_again_when_an_init_container_ended() -> None:
    item = pod("Pending", init=terminated(0, "Completed", ago=15), state=waiting("PodInitializing"))
    assert decided(item, replace(POLICY, pending_timeout_seconds=20)) == KEEP
    assert decided(item, replace(POLICY, pending_timeout_seconds=10)).delete


def test_the_memory_of_the_task_does_not_grow_for_an_init_container() -> None:
    item = pod("Failed", init=terminated(137, "OOMKilled"), state=waiting("PodInitializing"))
    decision = decided(item)
    reason = reason_of(decision)
    assert reason is Reason.INIT_OOM_KILLED
    assert CLASS_OF[reason] is FailureClass.RESOURCES
    assert relaunch_decision(reason, 1, RelaunchPolicy(), Memory(2**20, 2.0)) is None
    assert decision.report is not None
    assert decision.report.wants_log_tail


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ('Usage of EmptyDir volume "scratch" exceeds the limit "20Mi". ', Reason.STORAGE_EXCEEDED),
        ('Container task exceeded its local ephemeral storage limit "10Mi". ', Reason.STORAGE_EXCEEDED),
        ("Pod ephemeral local storage usage exceeds the total limit of containers 20Mi. ", Reason.STORAGE_EXCEEDED),
        ("The node was low on resource: ephemeral-storage. Container task was using 9Mi. ", Reason.EVICTED),
        ("The node was low on resource: memory. ", Reason.EVICTED),
    ],
)
def test_a_pod_over_its_own_limit_is_told_from_a_node_that_is_short(words: str, reason: Reason) -> None:
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet", "message": words}
    assert cause_of_end(observed("Failed", reason="Evicted", message=words)).reason is reason
    assert cause_of_end(observed("Failed", conditions=(condition,))).reason is reason
    assert (relaunch_decision(reason, 1, RelaunchPolicy()) is None) == (reason is Reason.STORAGE_EXCEEDED)


@pytest.mark.parametrize(
    "words",
    [
        "received unexpected HTTP status: 503 Service Unavailable",
        "failed to resolve reference: unexpected status from HEAD request: 502 Bad Gateway",
        "toomanyrequests: You have reached your pull rate limit",
        "error parsing HTTP 429 response body",
        "net/http: request canceled while waiting for connection (Client.Timeout exceeded while awaiting headers)",
        "dial tcp 10.0.0.1:5000: connect: connection refused",
        "dial tcp 10.0.0.1:5000: i/o timeout",
    ],
)
def test_a_registry_that_is_away_is_waited_for(words: str) -> None:
    events = [PodEvent("Failed", f'Failed to pull image "example/etl:503": rpc error: {words}', True)]
    item = pod("Pending", state=waiting("ImagePullBackOff", BACKS_OFF), age=1_000)
    assert decided(item, failing_since=NOW - 990, pull_words=pull_words(events)) == KEEP
    decision = decided(item, replace(POLICY, registry_timeout_seconds=200), pull_words=pull_words(events))
    assert reason_of(decision) is Reason.IMAGE_PULL_FAILED


@pytest.mark.parametrize(
    "words",
    [
        "manifest for example/etl:503 not found: manifest unknown",
        "pull access denied for example/etl, repository does not exist or may require 'docker login'",
        "unexpected status code 403 Forbidden",
        "dial tcp: lookup registry.invalid: no such host",
    ],
)
def test_what_a_registry_refuses_is_given_up_soon(words: str) -> None:
    item = pod("Pending", state=waiting("ImagePullBackOff", BACKS_OFF))
    decision = decided(item, failing_since=NOW - 30, pull_words=f"Failed to pull image: {words}")
    assert reason_of(decision) is Reason.IMAGE_PULL_FAILED


@pytest.mark.parametrize(
    "words",
    [
        "0/3 nodes are available: 3 Insufficient cpu.",
        "0/1 nodes are available: 1 node(s) didn't have free ports for the requested pod ports.",
        "0/2 nodes are available: 1 Insufficient memory, 1 node(s) didn't match Pod's node affinity/selector.",
        "0/1 nodes are available: 1 Too many pods.",
    ],
)
def test_a_full_cluster_is_waited_for_as_a_queue_is(words: str) -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
    item = pod("Pending", node="", conditions=(condition,), age=10_000)
    assert decided(item) == KEEP
    assert reason_of(decided(item, replace(POLICY, capacity_timeout_seconds=9_000))) is Reason.UNSCHEDULABLE
    assert decided(item, replace(POLICY, capacity_timeout_seconds=0)) == KEEP


def test_a_scheduling_gate_is_waiting_and_not_pending() -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": "blocked by gates"}
    gates = {"schedulingGates": [{"name": "kueue.x-k8s.io/admission"}]}
    assert decided(pod("Pending", node="", conditions=(condition,), spec=gates, age=10_000)) == KEEP


def test_a_sidecar_that_runs_on_is_removed_as_soon_as_the_end_is_recorded() -> None:
    item = pod("Running", state=terminated(0, "Completed", record(TaskState.SUCCESS, reported=True), ago=1))
    item["status"]["containerStatuses"].append({"name": "proxy", "state": running()})
    decision = decide_pod(observe(item), None, NOW, NOW, POLICY)
    assert decision == PodDecision(delete=True, why="only_sidecars_run")


def test_a_container_that_ended_before_its_pod_was_deleted_ended_by_itself() -> None:
    item = pod("Running", state=terminated(3, ago=60), deleted=NOW + 30)
    item["metadata"]["deletionGracePeriodSeconds"] = 30
    cause = cause_of_end(observe(item))
    assert (cause.reason, cause.exit_code) == (Reason.NON_ZERO_EXIT, 3)
    stopped = pod("Running", state=terminated(143, ago=1), deleted=NOW + 20)
    stopped["metadata"]["deletionGracePeriodSeconds"] = 30
    assert cause_of_end(observe(stopped)).reason is Reason.POD_DELETED


def test_what_a_webhook_lets_restart_has_ended_the_first_time() -> None:
    item = pod("Running", state=running())
    last = terminated(0, "Completed", record(TaskState.SUCCESS, exit_code=0))
    item["status"]["containerStatuses"][0] |= {"lastState": last, "restartCount": 1}
    decision = decided(item)
    assert decision.report is not None
    assert decision.report.outcome.state is TaskState.SUCCESS


def test_a_container_whose_agent_never_calls_is_given_up_by_what_is_seen_of_it() -> None:
    item = pod("Running", state={"running": {"startedAt": stamp(NOW - 1_000)}}, age=100_000)
    assert decided(item) == KEEP, "it is claimed"
    decision = decide_pod(observe(item), replace(EXPECTED, claimed=False), NOW, NOW, POLICY)
    assert (reason_of(decision), decision.delete) == (Reason.LAUNCH_LOST, True)
    young = pod("Running", state={"running": {"startedAt": stamp(NOW - 800)}}, age=100_000)
    assert decide_pod(observe(young), replace(EXPECTED, claimed=False), NOW, NOW, POLICY) == KEEP


def test_a_claimed_attempt_without_a_record_lost_its_agent() -> None:
    decision = decided(pod("Failed", state=terminated(3, ago=AGE)))
    assert reason_of(decision) is Reason.AGENT_LOST
    unclaimed = replace(EXPECTED, claimed=False)
    first = decide_pod(observe(pod("Failed", state=terminated(3, ago=AGE))), unclaimed, NOW, NOW, POLICY)
    assert reason_of(first) is Reason.NON_ZERO_EXIT


def test_a_success_of_an_attempt_that_nobody_claimed_is_not_believed() -> None:
    unclaimed, success = replace(EXPECTED, claimed=False), record(TaskState.SUCCESS, exit_code=0)
    fresh = pod("Succeeded", state=terminated(0, "Completed", success, ago=1))
    assert decide_pod(observe(fresh), unclaimed, NOW, NOW, POLICY) == KEEP, "SQL may have been read before the claim"
    settled = pod("Succeeded", state=terminated(0, "Completed", success, ago=100))
    assert reason_of(decide_pod(observe(settled), unclaimed, NOW, NOW, POLICY)) is Reason.INVALID_IMAGE
