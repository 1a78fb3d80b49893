"""A pod that succeeded and is deleted before anybody looked: its success is recorded, and the pod goes afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.domain.reasons import FailureReason as Reason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.executors.kubernetes import KubernetesExecutor
from leoflow_celery.executors.kubernetes.labels import FINALIZER
from leoflow_celery.settings import KubernetesSettings, Settings
from tests.integration.kubernetes.scene import PARKED, Scene, leaving, name_of, task_pod
from tests.support.cluster import Manifest, Namespace
from tests.support.images import base_image
from tests.support.launches import launch_spec

OTHERS = "leoflow-test/keep"


@pytest.fixture
def scene(namespace: Namespace) -> Iterator[Scene]:
    """With the rights of the deployed Role."""
    made = Scene(namespace.worker_kubeconfig())
    yield made
    made.close()


def held(pod: Manifest, *others: str) -> Manifest:
    pod["metadata"]["finalizers"] = [*others, FINALIZER]
    return pod


def finalizers(namespace: Namespace, pod: Manifest) -> list[str] | None:
    """None when the pod is gone."""
    found = namespace.pod(name_of(pod))
    return None if found is None else found["metadata"].get("finalizers", [])


def test_a_success_survives_the_deletion_of_its_pod_and_the_pod_goes_once_it_is_recorded(
    namespace: Namespace, scene: Scene
) -> None:
    pod = held(leaving(task_pod(), TaskState.SUCCESS, exit_code=0, return_value="7"))
    namespace.create(pod)
    namespace.wait_for_pod(name_of(pod), "Succeeded")
    namespace.delete("pods", name_of(pod))  # as a drain does
    for _ in range(2):  # the worker that sent the first report may have been killed
        scene.reconcile(pod)
    assert finalizers(namespace, pod) == [FINALIZER]
    assert [(one.outcome.state, one.return_value) for one in scene.reports.of(pod)] == [(TaskState.SUCCESS, "7")] * 2

    scene.reconcile(read_at=time.time() + 1)
    namespace.wait_for_no_pod(name_of(pod))


def test_a_task_that_ends_while_its_pod_is_deleted_is_what_the_kubelet_still_tells(
    namespace: Namespace, scene: Scene
) -> None:
    """A kubelet may remove the container before it reads what it left: the record is lost, and the pod goes."""
    pod = held(leaving(task_pod(spec={"terminationGracePeriodSeconds": 60}), TaskState.SUCCESS, exit_code=0))
    leave = 'printf %s "$RECORD" > /dev/termination-log; exit 0'
    script = f"trap '{leave}' TERM; touch /tmp/ready; while true; do sleep 0.1; done"
    ready = {"exec": {"command": ["test", "-e", "/tmp/ready"]}, "periodSeconds": 1}
    pod["spec"]["containers"][0].update(command=["sh", "-c", script], readinessProbe=ready)
    namespace.create(pod)
    namespace.wait_for_pod(
        name_of(pod), lambda one: any(c.get("ready") for c in one["status"].get("containerStatuses", []))
    )
    namespace.delete("pods", name_of(pod))
    ended = namespace.wait_for_pod(name_of(pod), lambda one: one["status"]["phase"] in ("Succeeded", "Failed"))
    (status,) = ended["status"]["containerStatuses"]
    was_read = '"success"' in status["state"].get("terminated", {}).get("message", "")
    scene.reconcile(pod)
    outcome = scene.reports.outcome(pod)
    expected = (TaskState.SUCCESS, None) if was_read else (TaskState.FAILED, Reason.POD_DELETED)
    assert (outcome.state, outcome.reason) == expected
    scene.reconcile(read_at=time.time() + 1)
    namespace.wait_for_no_pod(name_of(pod))


def test_a_pod_that_never_started_is_missing_as_soon_as_it_is_deleted(namespace: Namespace, scene: Scene) -> None:
    pod = held(task_pod(spec=PARKED))
    namespace.create(pod)
    namespace.delete("pods", name_of(pod))
    scene.reconcile(pod)
    assert scene.reports.outcome(pod).reason is Reason.POD_DELETED
    scene.reconcile(read_at=time.time() + 1)
    namespace.wait_for_no_pod(name_of(pod))


def test_what_we_delete_is_released_at_once_and_others_keep_what_is_theirs(namespace: Namespace, scene: Scene) -> None:
    ours, shared = held(task_pod(spec=PARKED)), held(task_pod(spec=PARKED), OTHERS)
    for pod in (ours, shared):
        namespace.create(pod)
    assert scene.reconcile(read_at=time.time() + 1).deleted == 2
    namespace.wait_for_no_pod(name_of(ours))
    assert finalizers(namespace, shared) == [OTHERS]
    namespace.drop_finalizers("pods", name_of(shared))


def test_a_release_that_failed_is_made_by_the_next_reconcile(namespace: Namespace, scene: Scene) -> None:
    """Here the right is missing; a worker that was killed between deletion and release leaves the same."""
    pod = held(task_pod(spec=PARKED))
    namespace.create(pod)
    powerless = Scene(namespace.unpatching_kubeconfig())
    try:
        assert powerless.reconcile(read_at=time.time() + 1).deleted == 1
    finally:
        powerless.close()
    assert finalizers(namespace, pod) == [FINALIZER]
    scene.reconcile(read_at=time.time() + 1)
    namespace.wait_for_no_pod(name_of(pod))


def _launched(config: Path, namespace: Namespace, launches: int = 1, **settings: Any) -> Manifest:
    """The last of some pods as one executor makes them; each is cancelled afterwards."""
    kubernetes = KubernetesSettings(kubeconfig=config, **settings)
    executor = KubernetesExecutor(Settings(kubernetes=kubernetes), lambda *_: None)
    try:
        for _ in range(launches):
            parked = {"spec": {"nodeSelector": {"leoflow-test/nobody": "has"}}}
            launch = launch_spec(image=base_image(), pod_override=parked)
            executor.execute(launch)
            pod = namespace.pod(launch.name)
            assert pod is not None
            executor.cancel(launch.name, 0)
            namespace.wait_for_no_pod(launch.name)
        return pod
    finally:
        executor.close()


def test_the_executor_holds_pods_where_it_may_let_them_go_and_says_once_where_it_may_not(
    namespace: Namespace, scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("leoflow_celery.executors.kubernetes.executor._RIGHTS_SECONDS", 0.0)  # ask again each time
    may, may_not = scene.settings.kubeconfig, namespace.unpatching_kubeconfig()
    assert may is not None
    assert _launched(may, namespace)["metadata"]["finalizers"] == [FINALIZER]
    assert "finalizers" not in _launched(may, namespace, hold_pods=False)["metadata"]
    assert "kubernetes.pods_not_held" not in caplog.messages
    assert "finalizers" not in _launched(may_not, namespace, launches=2)["metadata"]
    (said,) = [one for one in caplog.records if one.message == "kubernetes.pods_not_held"]
    assert said.__dict__["missing_right"] == f"patch pods in namespace {namespace.name}"
