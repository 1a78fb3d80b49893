"""What the server's words mean. The statuses are those of real pods; of newer versions, those of its source."""

from __future__ import annotations

from typing import Any

import pytest

from leoflow_celery.domain.reasons import FailureReason as Reason
from leoflow_celery.executors.kubernetes.failure_reasons import (
    cause_of_agent_death,
    cause_of_end,
    cause_of_pending,
    cause_of_stall,
)
from tests.unit.executors.kubernetes.pods import AGE, NOW, observed, running, stamp, terminated, waiting

_RUNC = "OCI runtime create failed: runc create failed: unable to start container process: exec: "


def _disruption(reason: str) -> dict[str, Any]:
    return {"conditions": ({"type": "DisruptionTarget", "status": "True", "reason": reason, "message": "why"},)}


@pytest.mark.parametrize(
    ("pod", "reason", "words"),
    [
        (
            {"state": terminated(137, "OOMKilled"), "container": {"resources": {"limits": {"memory": "40Mi"}}}},
            Reason.OOM_KILLED,
            "the container was killed on node 'node-1': it used more memory than it may (limit 40Mi)",
        ),
        (
            {"reason": "Evicted", "message": "Pod ephemeral local storage usage exceeds the total limit 20Mi. "},
            Reason.STORAGE_EXCEEDED,
            "the pod was evicted from node 'node-1': Pod ephemeral local storage usage exceeds the total limit 20Mi.",
        ),
        (
            {"reason": "DeadlineExceeded", "state": running(), "spec": {"activeDeadlineSeconds": 3}},
            Reason.TIMEOUT,
            "the pod ran longer than its deadline of 3 s, and its agent did not act",
        ),
        (
            {"reason": "DeadlineExceeded", "init": running(), "state": waiting("PodInitializing")},
            Reason.TIMEOUT,
            "the pod ran longer than its deadline, and its agent did not act",
        ),
        (
            {
                "reason": "DeadlineExceeded",
                "state": waiting("ContainerCreating"),
                "spec": {"activeDeadlineSeconds": 61},
            },
            Reason.CONTAINER_CREATE_FAILED,
            "the pod's deadline of 61 s passed before node 'node-1' had started its container",
        ),
        (
            {"reason": "DeadlineExceeded", "state": waiting("ErrImagePull"), "spec": {"activeDeadlineSeconds": 61}},
            Reason.IMAGE_PULL_FAILED,
            "node 'node-1' cannot pull image 'example/etl:1' for 61 s",
        ),
        ({"reason": "NodeLost", "message": "gone"}, Reason.NODE_LOST, "the pod was lost with node 'node-1': gone"),
        (
            {"reason": "Terminated", "message": "imminent node shutdown"},
            Reason.NODE_LOST,
            "the pod was ended by the shutdown of node 'node-1': imminent node shutdown",
        ),
        ({"reason": "Preempting", "message": "critical"}, Reason.PREEMPTED, "the pod was preempted on node 'node-1'"),
        (
            {"reason": "OutOfcpu", "message": "Node didn't have enough resource: cpu"},
            Reason.UNSCHEDULABLE,
            "node 'node-1' refused the pod (OutOfcpu): Node didn't have enough resource: cpu",
        ),
        (_disruption("PreemptionByScheduler"), Reason.PREEMPTED, "the pod was preempted on node 'node-1': why"),
        (_disruption("DeletionByTaintManager"), Reason.NODE_LOST, "NoExecute taint"),
        (_disruption("DeletionByPodGC"), Reason.NODE_LOST, "lost with node 'node-1': why"),
        (_disruption("EvictionByEvictionAPI"), Reason.EVICTED, "evicted (drained) from node 'node-1': why"),
        (_disruption("TerminationByKubelet"), Reason.EVICTED, "why"),
        (_disruption("SomethingNew"), Reason.EVICTED, "ended (SomethingNew) on node 'node-1': why"),
        ({"deleted": NOW, "state": terminated(143)}, Reason.POD_DELETED, "deleted while it was on node 'node-1'"),
        ({"state": terminated(3)}, Reason.NON_ZERO_EXIT, "the container ended on node 'node-1' with exit code 3"),
        ({"state": terminated(137)}, Reason.NON_ZERO_EXIT, "exit code 137 (killed by SIGKILL)"),
        ({"state": terminated(0, signal=11)}, Reason.INVALID_IMAGE, "leoflow-agent"),
        (
            {"state": terminated(127, "ContainerCannotRun", f'{_RUNC}"/no/program": stat: no such file or directory')},
            Reason.COMMAND_NOT_FOUND,
            "no such file or directory",
        ),
        (
            {"state": terminated(128, "StartError", f'{_RUNC}"x": executable file not found in $PATH')},
            Reason.COMMAND_NOT_FOUND,
            "could not be started on node 'node-1'",
        ),
        (
            {"state": terminated(126, "ContainerCannotRun", f'{_RUNC}"/etc/passwd": permission denied: unknown')},
            Reason.COMMAND_NOT_FOUND,
            "permission denied",
        ),
        (
            {"state": terminated(128, "StartError", "cannot allocate memory")},
            Reason.CONTAINER_CREATE_FAILED,
            "cannot allocate memory",
        ),
        (
            {"state": terminated(137, "ContainerStatusUnknown", "The container could not be located")},
            Reason.AGENT_LOST,
            "node 'node-1' lost track of the container and does not know how it ended: The container could not be",
        ),
        ({"state": terminated(255, "Unknown")}, Reason.AGENT_LOST, "lost track of the container"),
        (
            {"init": terminated(4), "state": waiting("PodInitializing")},
            Reason.NON_ZERO_EXIT,
            "init container 'fetch' ended on node 'node-1' with exit code 4",
        ),
        ({"message": "something new"}, Reason.AGENT_LOST, "the pod ended on node 'node-1': something new"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_why_a_pod_ended(pod: dict[str, Any], reason: Reason, words: str) -> None:
    cause = cause_of_end(observed("Failed", **pod))
    assert cause.reason is reason
    assert words in cause.message


@pytest.mark.parametrize("state", [running(), terminated(143)], ids=["running", "terminated"])
@pytest.mark.parametrize(
    ("started_after", "timeout", "deadline", "reason"),
    [
        (110, 60, 120, Reason.CONTAINER_CREATE_FAILED),
        (61, 60, 120, Reason.CONTAINER_CREATE_FAILED),
        (60, 60, 120, Reason.TIMEOUT),  # it had its time, and its agent did not act
        (5, 60, 120, Reason.TIMEOUT),
        (110, 0, 120, Reason.TIMEOUT),  # a deadline of an override's, for the pod as a whole
        (5, 60, 30, Reason.TIMEOUT),  # an override's, shorter than the task may take
    ],
)
def test_a_deadline_that_pulls_used_up_is_not_the_task_s(
    state: dict[str, Any], started_after: int, timeout: int, deadline: int, reason: Reason
) -> None:
    (kind,) = state
    late = {kind: {**state[kind], "startedAt": stamp(NOW - AGE + 1 + started_after)}}
    pod = observed(
        "Failed",
        reason="DeadlineExceeded",
        state=late,
        timeout=timeout,
        spec={"activeDeadlineSeconds": deadline},
    )
    for cause in (cause_of_end(pod), cause_of_agent_death(pod)):
        assert cause.reason is reason
        if reason is Reason.CONTAINER_CREATE_FAILED:
            words = f"deadline of 120 s left its container {deadline - started_after} s, and its task may take 60 s"
            assert words in cause.message


def test_a_container_that_ended_well_without_an_agent_names_the_image() -> None:
    cause = cause_of_end(observed("Succeeded", state=terminated(0, "Completed")))
    assert (cause.reason, cause.exit_code) == (Reason.INVALID_IMAGE, 0)
    assert "is leoflow-agent the entry point of image 'example/etl:1'?" in cause.message


def test_an_agent_that_died_while_its_task_ran_is_no_exit_code_of_the_task() -> None:
    cause = cause_of_agent_death(observed("Failed", state=terminated(137)))
    assert (cause.reason, cause.exit_code) == (Reason.AGENT_LOST, 137)
    assert "the agent died on node 'node-1' with exit code 137 (killed by SIGKILL)" in cause.message
    assert cause_of_agent_death(observed("Failed", state=terminated(137, "OOMKilled"))).reason is Reason.OOM_KILLED


@pytest.mark.parametrize(
    ("reason", "message", "expected"),
    [
        ("ImagePullBackOff", 'Back-off pulling image "x"', Reason.IMAGE_PULL_FAILED),
        ("ErrImagePull", "no such host", Reason.IMAGE_PULL_FAILED),
        ("ErrImageNeverPull", "not present with pull policy of Never", Reason.IMAGE_PULL_FAILED),
        ("CreateContainerConfigError", 'configmap "settings" not found', Reason.CONTAINER_CREATE_FAILED),
        ("CreateContainerConfigError", 'secret "password" not found', Reason.UNKNOWN_SECRET),
        ("CreateContainerConfigError", "couldn't find key user in Secret ns/password", Reason.UNKNOWN_SECRET),
        (
            "CreateContainerConfigError",
            'secret "leoflow-dag-load-2-abc-e846b2ff" not found',
            Reason.CONTAINER_CREATE_FAILED,
        ),
        ("CreateContainerConfigError", "container has runAsNonRoot and image will run as root", Reason.INVALID_SPEC),
        ("CreateContainerError", "Cannot mkdir: /etc/passwd", Reason.CONTAINER_CREATE_FAILED),
        ("RunContainerError", "context deadline exceeded", Reason.CONTAINER_CREATE_FAILED),
    ],
)
def test_what_the_kubelet_tries_again_is_given_up_after_a_while(reason: str, message: str, expected: Reason) -> None:
    pod = observed("Pending", state=waiting(reason, message))
    assert cause_of_stall(pod, 29.9, 30) is None
    cause = cause_of_stall(pod, 30, 30)
    assert cause is not None
    assert cause.reason is expected
    assert message in cause.message
    assert "node 'node-1'" in cause.message


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("InvalidImageName", Reason.INVALID_IMAGE), ("CrashLoopBackOff", Reason.CONTAINER_CREATE_FAILED)],
)
def test_what_can_never_start_is_given_up_at_once(reason: str, expected: Reason) -> None:
    cause = cause_of_stall(observed("Pending", state=waiting(reason)), 0, 30)
    assert cause is not None
    assert cause.reason is expected


def test_an_init_container_that_cannot_start_counts_too() -> None:
    pod = observed("Pending", init=waiting("ImagePullBackOff"), state=waiting("PodInitializing"))
    cause = cause_of_stall(pod, 60, 30)
    assert cause is not None
    assert cause.reason is Reason.IMAGE_PULL_FAILED


@pytest.mark.parametrize("state", [waiting("ContainerCreating"), waiting("PodInitializing"), running(), None])
def test_a_pod_that_may_still_start_is_left_alone(state: dict[str, Any] | None) -> None:
    assert cause_of_stall(observed("Pending", state=state), 10_000, 30) is None


def test_pending_too_long_is_told_in_the_scheduler_s_own_words() -> None:
    condition = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available: 3 Insufficient cpu."}
    cause = cause_of_pending(observed("Pending", node="", conditions=(condition,)), 600)
    assert cause.reason is Reason.UNSCHEDULABLE
    assert cause.message == "no node took the pod for 600 s: 0/3 nodes are available: 3 Insufficient cpu."
    unseen = cause_of_pending(observed("Pending", node=""), 600)
    assert (unseen.reason, unseen.message) == (Reason.UNSCHEDULABLE, "no scheduler looked at the pod for 600 s")


def test_pending_on_a_node_is_the_node_s_doing() -> None:
    cause = cause_of_pending(observed("Pending", state=waiting("ContainerCreating")), 600)
    assert cause.reason is Reason.CONTAINER_CREATE_FAILED
    assert cause.message == "node 'node-1' did not start the pod for 600 s: ContainerCreating"
