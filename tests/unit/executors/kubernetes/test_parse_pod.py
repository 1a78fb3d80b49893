"""What is kept of a pod's JSON."""

from __future__ import annotations

from leoflow_celery.executors.kubernetes.parse_pod import observe
from tests.unit.executors.kubernetes.pods import AGE, ATTEMPT, NOW, observed, pod, running, stamp, terminated, waiting


def test_a_running_pod() -> None:
    seen = observed(
        state=running(),
        container={"resources": {"limits": {"memory": "64Mi"}}},
        spec={"activeDeadlineSeconds": 90},
    )
    assert (seen.name, seen.uid, seen.attempt, seen.phase) == ("leoflow-dag-load-2-abc", "uid-1", ATTEMPT, "Running")
    assert (seen.node, seen.image, seen.memory_limit, seen.deadline_seconds) == ("node-1", "example/etl:1", "64Mi", 90)
    assert (seen.created_at, seen.started_at) == (NOW - AGE, NOW - AGE + 1)
    assert seen.task is not None
    assert seen.task.running
    assert seen.has_run
    assert not seen.ended


def test_the_termination_message_exit_code_and_times_of_an_ended_container() -> None:
    seen = observed("Failed", state=terminated(137, "OOMKilled", "text", signal=9))
    assert seen.task is not None
    assert (seen.task.exit_code, seen.task.signal, seen.task.reason) == (137, 9, "OOMKilled")
    assert (seen.task.message, seen.finished_at) == ("text", NOW - 60)
    assert seen.ended


def test_the_scheduler_s_words() -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}
    seen = observed("Pending", node="", conditions=(condition,))
    assert (seen.scheduled, seen.unscheduled) == (False, "0/1 nodes")
    assert not observed("Pending", conditions=({**condition, "status": "True", "message": ""},)).unscheduled


def test_who_disturbed_it_and_until_when_it_should_be_gone() -> None:
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "by x"}
    seen = observed(conditions=(condition,), deleted=NOW + 30)
    assert (seen.disruption, seen.deletion_due_at) == (("PreemptionByScheduler", "by x"), NOW + 30)


def test_a_sidecar_does_not_keep_a_task_alive() -> None:
    item = pod("Running", state=terminated(0, "Completed"))
    item["status"]["containerStatuses"].insert(0, {"name": "proxy", "state": running()})
    item["spec"]["containers"].insert(0, {"name": "proxy", "image": "example/proxy"})
    assert observe(item).ended
    assert observe(item).image == "example/etl:1"


def test_the_init_container_that_others_wait_for() -> None:
    item = pod("Pending", init=waiting("ImagePullBackOff"), state=waiting("PodInitializing"))
    item["status"]["initContainerStatuses"].insert(0, {"name": "first", "state": terminated(0)})
    seen = observe(item)
    assert seen.troubled_init is not None
    assert (seen.troubled_init.name, seen.troubled_init.reason) == ("fetch", "ImagePullBackOff")


def test_a_pod_that_is_not_ours_has_no_attempt() -> None:
    assert observed(attempt=None).attempt is None
    foreign = pod()
    foreign["metadata"]["annotations"]["leoflow.io/try-number"] = "one"
    assert observe(foreign).attempt is None


def test_a_pod_that_nothing_is_known_of_yet() -> None:
    seen = observe({"metadata": {"name": "a", "creationTimestamp": stamp(NOW)}, "spec": {}, "status": {}})
    assert (seen.phase, seen.task, seen.node, seen.started_at, seen.ended) == ("", None, "", None, False)
