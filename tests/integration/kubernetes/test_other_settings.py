"""A worker that was restarted with another system name or namespace knows the pods that it had launched before."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from leoflow_celery.domain.desired_state import Expectation, ExpectedAttempt
from leoflow_celery.domain.reasons import FailureReason as Reason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.kubernetes.labels import FINALIZER
from tests.integration.kubernetes.conftest import MakeExecutor
from tests.integration.kubernetes.scene import AT_ONCE, Scene, attempt_of, expecting, leaving, name_of, task_pod
from tests.support.cluster import Cluster, Manifest, Namespace
from tests.support.images import base_image
from tests.support.launches import launch_spec
from tests.support.waiting import wait_until

#: Clocks of hosts may be apart; nothing else is waited for.
POLICY = replace(AT_ONCE, margin_seconds=30)


def launched(launch: LaunchSpec, place: str) -> Expectation:
    """SQL was read a while after the launch was recorded."""
    now = time.time()
    expected = ExpectedAttempt(launch.attempt, launch.name, now, claimed=True, place=place)
    return Expectation.of(now + 60, [expected])


def nothing() -> Expectation:
    return Expectation.of(time.time() + 60, [])


def of(pod: Manifest, place: str) -> Expectation:
    return Expectation.of(
        time.time() + 60, [ExpectedAttempt(attempt_of(pod), name_of(pod), time.time(), claimed=True, place=place)]
    )


def sleeper() -> LaunchSpec:
    container = {"name": "task", "command": ["sh", "-c", "sleep 600"], "securityContext": {"runAsUser": 10001}}
    return launch_spec(image=base_image(), pod_override={"spec": {"containers": [container]}})


@pytest.mark.parametrize("system", ["", "blue"])
def test_a_running_pod_of_the_namespace_before_is_not_deleted_and_goes_once_it_is_not_expected(
    cluster: Cluster, namespace: Namespace, tmp_path: Path, make_executor: MakeExecutor, system: str
) -> None:
    launch = sleeper()
    first = make_executor(namespace.worker_kubeconfig(), system=system).execute(launch)
    assert first.place == namespace.name
    namespace.wait_for_pod(launch.name, "Running")
    other = cluster.namespace(tmp_path)
    scene = Scene(other.admin_kubeconfig(), POLICY)
    try:
        for _ in range(2):
            assert scene.reconcile_with(launched(launch, first.place)).reported == 0
        assert "deletionTimestamp" not in (namespace.pod(launch.name) or {"metadata": "gone"})["metadata"]
        # Cancelled, or superseded: it is stopped where it is.
        assert scene.reconcile_with(nothing()).deleted == 1
        namespace.wait_for_no_pod(launch.name)
        assert scene.reports.all == []
    finally:
        scene.close()
        other.close()


def test_a_pod_that_is_gone_from_there_is_missing(cluster: Cluster, namespace: Namespace, tmp_path: Path) -> None:
    other = cluster.namespace(tmp_path)
    scene = Scene(other.admin_kubeconfig(), POLICY)
    try:
        pod = task_pod()
        assert scene.reconcile_with(of(pod, namespace.name)).reported == 1
        assert scene.reports.outcome(pod).reason is Reason.POD_DELETED
    finally:
        scene.close()
        other.close()


def test_the_success_of_a_pod_of_the_system_name_before_is_recorded_and_the_pod_collected(
    namespace: Namespace,
) -> None:
    pod = leaving(task_pod(), TaskState.SUCCESS, exit_code=0, return_value="7")
    pod["metadata"]["labels"]["leoflow.io/system"] = "before"
    pod["metadata"]["finalizers"] = [FINALIZER]
    namespace.create(pod)
    namespace.wait_for_pod(name_of(pod), "Succeeded")
    namespace.delete("pods", name_of(pod))  # a drain on top
    scene = Scene(namespace.worker_kubeconfig(), POLICY, system="after")
    try:
        assert scene.reconcile_with(of(pod, namespace.name)).reported == 1
        (report,) = scene.reports.of(pod)
        assert (report.outcome.state, report.return_value) == (TaskState.SUCCESS, "7")

        def collected() -> bool:
            scene.reconcile_with(nothing())
            return namespace.pod(name_of(pod)) is None

        wait_until(collected, 60, "the pod is let go", 0.5)
    finally:
        scene.close()


def test_what_another_system_made_under_the_name_later_is_not_the_attempts(namespace: Namespace) -> None:
    pod = task_pod("sleep 600")
    pod["metadata"]["labels"]["leoflow.io/system"] = "neighbour"
    namespace.create(pod)
    scene = Scene(namespace.worker_kubeconfig(), POLICY)
    try:
        assert scene.reconcile_with(expecting(pod, read_at=time.time() + 60)).reported == 1  # launched an hour ago
        assert scene.reports.outcome(pod).reason is Reason.POD_DELETED
        scene.reconcile_with(nothing())
        assert "deletionTimestamp" not in (namespace.pod(name_of(pod)) or {"metadata": "gone"})["metadata"]
    finally:
        scene.close()


def test_nothing_is_concluded_where_the_worker_may_not_look(
    cluster: Cluster, namespace: Namespace, tmp_path: Path
) -> None:
    other = cluster.namespace(tmp_path)
    scene = Scene(other.worker_kubeconfig(), POLICY)
    try:
        assert scene.reconcile_with(of(task_pod(), namespace.name)).reported == 0
        assert scene.reports.all == []
    finally:
        scene.close()
        other.close()
