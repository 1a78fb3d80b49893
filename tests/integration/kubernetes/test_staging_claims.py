"""Staging claims on a real cluster: made once, shared by the tasks of a run, refused when nothing can serve them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.domain.attempt import staging_claim_name
from leoflow_celery.errors import PermanentLaunchError, TransientLaunchError
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.kubernetes import KubernetesExecutor
from leoflow_celery.protocol import agent_pb2 as pb
from tests.integration.agent.control_plane import ControlPlane
from tests.integration.kubernetes.conftest import MakeExecutor
from tests.integration.kubernetes.scene import name_of, task_pod
from tests.support.cluster import Cluster, Namespace
from tests.support.images import task_image
from tests.support.launches import launch_spec, parked
from tests.support.waiting import wait_until


def given_to_the_group() -> dict[str, Any]:
    """The override for storage that ignores fsGroup, as a host path does; docs/kubernetes.md shows it.

    An operator has to allow it: its container is root.
    """
    prepare = {
        "name": "staging-group",
        "image": task_image(),
        "command": ["sh", "-c", "chgrp 10001 /staging && chmod 2770 /staging"],
        "securityContext": {"runAsNonRoot": False, "runAsUser": 0},
        "volumeMounts": [{"name": "leoflow-staging", "mountPath": "/staging"}],
    }
    return {"spec": {"initContainers": [prepare]}}


@pytest.fixture
def executor(make_executor: MakeExecutor, tmp_path: Path) -> KubernetesExecutor:
    policy = tmp_path / "policy.yaml"
    policy.write_text("allow: {fields: [spec.initContainers]}")
    return make_executor(policy=policy)


def staged(claim: str, **fields: Any) -> LaunchSpec:
    return parked(staging_claim=claim, staging_size="1Mi", **fields)


def test_the_tasks_of_a_run_share_what_they_write(
    executor: KubernetesExecutor, module_namespace: Namespace, plane: ControlPlane
) -> None:
    fields: dict[str, Any] = {
        "image": task_image(),
        "control_plane_addr": plane.address,
        "staging_claim": staging_claim_name("sales", "shared"),
        "staging_size": "1Mi",
        "pod_override": given_to_the_group(),
    }
    for script in ("echo from the first > $LEOFLOW_STAGING_DIR/file", "cat $LEOFLOW_STAGING_DIR/file"):
        plane.spec, plane.holder = pb.TaskSpec(operator="bash", entrypoint=script, try_number=1), ""
        launch = launch_spec(**fields)
        executor.execute(launch)
        module_namespace.wait_for_pod(launch.name, "Succeeded")
    assert plane.text("stdout") == ["from the first"]


@pytest.fixture
def local_class(cluster: Cluster, module_namespace: Namespace) -> Iterator[str]:
    """A storage class with one volume: a new directory of a node's that belongs to root."""
    classes, volumes = "/apis/storage.k8s.io/v1/storageclasses", "/api/v1/persistentvolumes"
    name = f"{module_namespace.name}-local"

    def on_node(script: str, **spec: Any) -> str:
        host = {"name": "host", "hostPath": {"path": "/tmp"}}
        pod = task_pod(
            script,
            spec={"volumes": [host], **spec},
            volumeMounts=[{"name": "host", "mountPath": "/host"}],
            securityContext={"runAsUser": 0},
        )
        module_namespace.create(pod)
        return str(module_namespace.wait_for_pod(name_of(pod), "Succeeded")["spec"]["nodeName"])

    node = on_node(f"mkdir -m 755 /host/{name}")
    metadata = {"metadata": {"name": name}}
    cluster.api.call("POST", classes, {**metadata, "provisioner": "kubernetes.io/no-provisioner"})
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    spec = {
        "capacity": {"storage": "1Mi"},
        "accessModes": ["ReadWriteMany"],
        "persistentVolumeReclaimPolicy": "Retain",
        "storageClassName": name,
        "local": {"path": f"/tmp/{name}"},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
    }
    cluster.api.call("POST", volumes, {**metadata, "spec": spec})
    yield name
    cluster.api.call("DELETE", f"{classes}/{name}")
    cluster.api.call("DELETE", f"{volumes}/{name}")
    on_node(f"rm -r /host/{name}", nodeName=node)


def test_storage_that_knows_fs_group_is_writable_without_an_override(
    executor: KubernetesExecutor, module_namespace: Namespace, plane: ControlPlane, local_class: str
) -> None:
    """A volume of kind local, as a CSI driver would: nobody but its group may write, and that is the image's."""
    script = "echo mine > $LEOFLOW_STAGING_DIR/file && id -u && stat -c '%g %U' $LEOFLOW_STAGING_DIR"
    plane.spec = pb.TaskSpec(operator="bash", entrypoint=script, try_number=1)
    launch = launch_spec(
        image=task_image(),
        control_plane_addr=plane.address,
        staging_claim="group",
        staging_size="1Mi",
        staging_storage_class=local_class,
    )
    executor.execute(launch)
    module_namespace.wait_for_pod(launch.name, "Succeeded")
    assert plane.text("stdout") == ["10001", "10001 root"]
    module_namespace.delete("pods", launch.name)
    module_namespace.drop_finalizers("pods", launch.name)  # it is held
    module_namespace.delete("persistentvolumeclaims", "group")
    wait_until(lambda: module_namespace.get("persistentvolumeclaims", "group") is None, 60, "the claim goes")


def test_a_run_has_one_claim_however_many_tasks_start_at_once(
    executor: KubernetesExecutor, module_namespace: Namespace
) -> None:
    launches = [staged("one-for-all") for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert not any(launched.already for launched in pool.map(executor.execute, launches))
    claim = module_namespace.get("persistentvolumeclaims", "one-for-all")
    assert claim is not None
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["spec"]["resources"]["requests"] == {"storage": "1Mi"}
    assert claim["metadata"]["labels"]["leoflow.io/staging"] == "true"


def test_runs_that_sanitise_alike_have_claims_of_their_own(
    executor: KubernetesExecutor, module_namespace: Namespace
) -> None:
    names = [staging_claim_name("sales", run) for run in ("manual:1", "manual;1", "x" * 300)]
    for name in names:
        executor.execute(staged(name))
    assert all(module_namespace.get("persistentvolumeclaims", name) for name in names)
    assert len(set(names)) == 3


def test_a_claim_that_somebody_made_by_hand_is_taken_as_it_is(
    executor: KubernetesExecutor, module_namespace: Namespace
) -> None:
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Mi"}}}
    metadata = {"name": "by-hand"}
    module_namespace.create({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})
    executor.execute(staged("by-hand"))
    claim = module_namespace.get("persistentvolumeclaims", "by-hand")
    assert claim is not None
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert "labels" not in claim["metadata"]


def test_a_claim_of_an_earlier_run_that_is_being_deleted_is_waited_for(
    executor: KubernetesExecutor, module_namespace: Namespace
) -> None:
    metadata = {"name": "going", "finalizers": ["leoflow-test/keep"]}
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Mi"}}}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}
    module_namespace.create(claim)
    module_namespace.delete("persistentvolumeclaims", "going")
    try:
        with pytest.raises(TransientLaunchError, match="'going' of an earlier run is still being deleted"):
            executor.execute(staged("going"))
    finally:  # a namespace that holds a finalizer stays
        module_namespace.drop_finalizers("persistentvolumeclaims", "going")
    wait_until(lambda: module_namespace.get("persistentvolumeclaims", "going") is None, 60, "the claim goes")
    assert not executor.execute(staged("going")).already


def test_a_claim_that_can_never_work_is_refused_at_once(
    executor: KubernetesExecutor, module_namespace: Namespace
) -> None:
    launch = staged("no-class", staging_storage_class="nobody-has-this")
    with pytest.raises(PermanentLaunchError, match="the cluster has no storage class 'nobody-has-this'") as caught:
        executor.execute(launch)
    assert caught.value.reason == "invalid_spec"
    assert module_namespace.pod(launch.name) is None
    assert module_namespace.get("persistentvolumeclaims", "no-class") is None


def test_an_access_mode_that_the_cluster_does_not_know_is_refused_at_once(
    executor: KubernetesExecutor, cluster: Cluster
) -> None:
    version = cluster.api.call("GET", "/version")
    launch = staged("one-pod", staging_access_mode="ReadWriteOncePod")
    if (int(version["major"] or 1), int(version["minor"].rstrip("+") or 20)) >= (1, 22):
        assert not executor.execute(launch).already
        return
    with pytest.raises(PermanentLaunchError, match=r'spec.accessModes: Unsupported value: "ReadWriteOncePod"'):
        executor.execute(launch)


def test_block_storage_of_one_node_is_refused_for_many_writers(
    executor: KubernetesExecutor, make_executor: MakeExecutor, cluster: Cluster, module_namespace: Namespace
) -> None:
    name = f"{module_namespace.name}-disk"
    body = {"metadata": {"name": name}, "provisioner": "ebs.csi.aws.com", "apiVersion": "storage.k8s.io/v1"}
    cluster.api.call("POST", "/apis/storage.k8s.io/v1/storageclasses", {**body, "kind": "StorageClass"})
    try:
        with pytest.raises(PermanentLaunchError, match=r"cannot serve ReadWriteMany; name a staging_storage_class"):
            executor.execute(staged("many", staging_storage_class=name))
        one = staged("one", staging_storage_class=name, staging_access_mode="ReadWriteOnce")
        assert not executor.execute(one).already
        unchecked = make_executor(check_storage_class=False)
        assert not unchecked.execute(staged("many", staging_storage_class=name)).already
    finally:
        cluster.api.call("DELETE", f"/apis/storage.k8s.io/v1/storageclasses/{name}")


def test_who_may_not_read_storage_classes_makes_claims_all_the_same(
    make_executor: MakeExecutor, module_namespace: Namespace
) -> None:
    worker = make_executor(module_namespace.worker_kubeconfig())
    assert not worker.execute(staged("unchecked")).already
    assert module_namespace.get("persistentvolumeclaims", "unchecked")
