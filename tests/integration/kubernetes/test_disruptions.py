"""Pods that something else ends: the scheduler for a more important one, the node controller for a dead node."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator

import pytest

from leoflow_celery.domain.reasons import FailureReason as Reason
from tests.integration.kubernetes.scene import Scene, name_of, task_pod
from tests.support.cluster import ApiRefused, Cluster, Manifest, Namespace
from tests.support.waiting import wait_until

CLASSES = "/apis/scheduling.k8s.io/v1/priorityclasses"
#: Nothing is scheduled to a node of a test by accident.
TAINT = "leoflow-test/private"


@pytest.fixture
def scene(namespace: Namespace) -> Iterator[Scene]:
    made = Scene(namespace.worker_kubeconfig())
    yield made
    made.close()


@pytest.fixture
def priority_class(cluster: Cluster) -> Iterator[str]:
    """A class of pods that others have to give way to."""
    name = f"leoflow-test-{secrets.token_hex(4)}"
    body = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}, "value": 1_000}
    cluster.api.call("POST", CLASSES, body)
    yield name
    cluster.api.call("DELETE", f"{CLASSES}/{name}")


@pytest.fixture
def scarce_resource(cluster: Cluster) -> Iterator[str]:
    """One piece of something that only the first node has."""
    name = f"leoflow.test/{secrets.token_hex(4)}"
    node = cluster.api.call("GET", "/api/v1/nodes")["items"][0]["metadata"]["name"]

    def offered() -> bool:
        return name in cluster.api.call("GET", f"/api/v1/nodes/{node}")["status"]["allocatable"]

    _change_capacity(cluster, node, lambda capacity: capacity.update({name: "1"}))
    wait_until(offered, 60, "the node offers it", 0.2)
    yield name
    _change_capacity(cluster, node, lambda capacity: capacity.pop(name, None))
    wait_until(lambda: not offered(), 60, "the node offers it no more", 0.2)


def _change_capacity(cluster: Cluster, node: str, change: Callable[[Manifest], object]) -> None:
    path = f"/api/v1/nodes/{node}"

    def changed() -> bool:
        current = cluster.api.call("GET", path)
        for what in ("capacity", "allocatable"):  # the kubelet derives one from the other in its own time
            change(current["status"][what])
        try:
            cluster.api.call("PUT", f"{path}/status", current)
        except ApiRefused as error:
            if error.status != 409:  # the kubelet wrote between our two calls
                raise
            return False
        return True

    wait_until(changed, 30, f"the capacity of {node} changes")


@pytest.fixture
def dead_node(cluster: Cluster) -> Iterator[str]:
    """A node whose kubelet has never been heard of: not ready after 40 seconds."""
    name = f"leoflow-test-{secrets.token_hex(4)}"
    resources = {"cpu": "1", "memory": "1Gi", "pods": "10"}
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "said once"}
    body = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name},
        "spec": {"taints": [{"key": TAINT, "effect": "NoSchedule"}]},
        "status": {"capacity": resources, "allocatable": resources, "conditions": [ready]},
    }
    cluster.api.call("POST", "/api/v1/nodes", body)
    yield name
    cluster.api.call("DELETE", f"/api/v1/nodes/{name}")


def test_preempted(namespace: Namespace, scene: Scene, priority_class: str, scarce_resource: str) -> None:
    limits = {"limits": {scarce_resource: "1"}}
    pod = task_pod("sleep 600", resources=limits)
    namespace.create(pod)
    namespace.wait_for_pod(name_of(pod), "Running")
    important = task_pod("true", resources=limits, spec={"priorityClassName": priority_class})
    namespace.create(important)
    namespace.wait_for_no_pod(name_of(pod))
    scene.reconcile(pod, important)
    outcome = scene.reports.outcome(pod)
    assert outcome.reason is Reason.PREEMPTED
    assert "Preempted by" in outcome.message


def test_the_node_is_lost(namespace: Namespace, scene: Scene, dead_node: str) -> None:
    tolerations = [
        {"key": TAINT, "operator": "Exists"},
        *(
            {"key": f"node.kubernetes.io/{state}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0}
            for state in ("not-ready", "unreachable")
        ),
    ]
    spec = {"nodeName": dead_node, "tolerations": tolerations}
    stays, goes = task_pod("true", spec=spec), task_pod("true", spec=spec)
    for pod in (stays, goes):
        namespace.create(pod)
    try:
        for pod in (stays, goes):
            namespace.wait_for_pod(name_of(pod), lambda one: "deletionTimestamp" in one["metadata"])
        # An operator gives one up; the other is still on its way out when its grace (1 s) is over.
        namespace.delete("pods", name_of(goes), grace_seconds=0)
        wait_until(lambda: _reports_both(scene, stays, goes), 60, "both are reported", 0.5)
        assert scene.reports.of(stays)[0].outcome.reason is Reason.NODE_LOST
        assert f"node '{dead_node}' does not answer" in scene.reports.of(stays)[0].outcome.message
        assert scene.reports.of(goes)[0].outcome.reason is Reason.NODE_LOST
        assert "taken off a node" in scene.reports.of(goes)[0].outcome.message
        assert namespace.pod(name_of(stays)) is not None  # nobody knows whether it still runs
    finally:
        for pod in (stays, goes):
            with contextlib.suppress(ApiRefused):
                namespace.delete("pods", name_of(pod), grace_seconds=0)


def _reports_both(scene: Scene, *pods: Manifest) -> bool:
    scene.reconcile(*pods)
    return all(scene.reports.of(pod) for pod in pods)
