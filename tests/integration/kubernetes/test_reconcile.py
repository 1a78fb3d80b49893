"""What a reconcile deletes, what it leaves alone, and what it concludes from an incomplete picture: nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from leoflow_celery.domain.reasons import FailureReason as Reason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.executors.kubernetes.decisions import ReconcilePolicy
from leoflow_celery.executors.kubernetes.errors import ApiError, Unreachable
from leoflow_celery.executors.kubernetes.labels import SYSTEM_LABEL
from tests.integration.kubernetes.scene import AT_ONCE, GIVES_UP, PARKED, Scene, expecting, leaving, name_of, task_pod
from tests.support.cluster import Manifest, Namespace, kubeconfig
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_until

MakeScene = Callable[..., Scene]


@pytest.fixture
def make_scene(namespace: Namespace) -> Iterator[MakeScene]:
    """A reconciler with the worker's Role, unless ``kubeconfig`` says otherwise."""
    made: list[Scene] = []

    def make(kubeconfig: Any = None, **more: Any) -> Scene:
        made.append(Scene(kubeconfig or namespace.worker_kubeconfig(), **more))
        return made[-1]

    yield make
    for scene in made:
        scene.close()


def _names(namespace: Namespace) -> set[str]:
    return {one["metadata"]["name"] for one in namespace.pods("") if "deletionTimestamp" not in one["metadata"]}


def test_what_sql_does_not_expect_goes_unless_it_is_young_or_not_ours(
    namespace: Namespace, make_scene: MakeScene
) -> None:
    running, pending, kept = task_pod("sleep 600"), task_pod(spec=PARKED), task_pod(spec=PARKED)
    foreign, unlabelled, of_another_system = (task_pod(spec=PARKED) for _ in range(3))
    del foreign["metadata"]["annotations"]
    del unlabelled["metadata"]["labels"]
    of_another_system["metadata"]["labels"][SYSTEM_LABEL] = "another"
    everything = (running, pending, kept, foreign, unlabelled, of_another_system)
    for pod in everything:
        namespace.create(pod)
    namespace.wait_for_pod(name_of(running), "Running")

    careful = make_scene(policy=ReconcilePolicy())
    assert careful.reconcile(kept).deleted == 0
    assert _names(namespace) == {name_of(one) for one in everything}

    scene = make_scene()
    # Times of the API have no fractions: a second later nothing is young.
    done = scene.reconcile(kept, read_at=time.time() + 1)
    assert (done.seen, done.reported, done.deleted) == (4, 0, 2)
    assert _names(namespace) == {name_of(one) for one in (kept, foreign, unlabelled, of_another_system)}
    assert scene.reports.all == []
    assert scene.observer.runnings == [1]
    namespace.wait_for_no_pod(name_of(running))


def test_a_finished_pod_stays_for_its_grace_and_as_long_as_sql_expects_it(
    namespace: Namespace, make_scene: MakeScene
) -> None:
    pod = leaving(task_pod(), TaskState.SUCCESS)
    namespace.create(pod)
    namespace.wait_for_pod(name_of(pod), "Succeeded")
    assert make_scene(policy=ReconcilePolicy(margin_seconds=0)).reconcile(read_at=time.time() + 1).deleted == 0
    assert make_scene().reconcile(pod).deleted == 0
    assert make_scene().reconcile(read_at=time.time() + 1).deleted == 1
    namespace.wait_for_no_pod(name_of(pod))


def test_a_pod_s_time_in_the_cluster_s_queue_is_observed_once(namespace: Namespace, make_scene: MakeScene) -> None:
    earlier, pod = task_pod("sleep 600"), task_pod("sleep 600")
    namespace.create(earlier)
    namespace.wait_for_pod(name_of(earlier), "Running")
    wait_until(lambda: time.time() % 1 < 0.1, 5)  # the kubelet's times have no fractions
    time_of_look = time.time()
    scene = make_scene()
    wait_until(lambda: time.time() > time_of_look + 1, 5)
    namespace.create(pod)
    namespace.wait_for_pod(name_of(pod), "Running")
    for _ in range(2):
        scene.reconcile(earlier, pod)
    assert len(scene.observer.pendings) == 1
    assert 0 <= scene.observer.pendings[0] < 120
    assert scene.observer.runnings == [2, 2]


def test_a_deleted_pod_is_missed_and_its_events_are_what_is_left(namespace: Namespace, make_scene: MakeScene) -> None:
    deleted, never_there, young = task_pod("sleep 600"), task_pod(), task_pod()
    namespace.create(deleted)
    namespace.wait_for_pod(name_of(deleted), "Running")
    namespace.delete("pods", name_of(deleted))
    namespace.wait_for_no_pod(name_of(deleted))
    killing = "Killing: Stopping container task"
    wait_until(lambda: killing in namespace.events(name_of(deleted)), 60, "the kubelet's event", 0.2)

    scene = make_scene()
    assert scene.reconcile(deleted, never_there).reported == 2
    outcome = scene.reports.outcome(deleted)
    assert (outcome.state, outcome.reason, outcome.last_event) == (TaskState.FAILED, Reason.POD_DELETED, killing)
    assert outcome.message == f"pod {name_of(deleted)} was deleted while its task was running"
    assert scene.reports.outcome(never_there).reason is Reason.POD_DELETED
    # Launched an hour before SQL was read, and that is still not long enough ago.
    patient = make_scene(policy=ReconcilePolicy(margin_seconds=4_000))
    assert patient.reconcile(young).reported == 0


def test_a_task_that_was_interrupted_by_a_deletion_is_told_so(namespace: Namespace, make_scene: MakeScene) -> None:
    pod = leaving(task_pod(spec={"terminationGracePeriodSeconds": 60}), TaskState.FAILED, reason="interrupted")
    container = pod["spec"]["containers"][0]
    # The trap leaves the record as an agent does on SIGTERM; a finalizer keeps the pod in sight afterwards.
    leave = 'printf %s "$RECORD" > /dev/termination-log; exit 1'
    container["command"] = ["sh", "-c", f"trap '{leave}' TERM; echo ready; while true; do sleep 0.1; done"]
    pod["metadata"]["finalizers"] = ["leoflow-test/keep"]
    namespace.create(pod)
    wait_until(lambda: _log(namespace, pod) == "ready\n", 120, "the trap is set", 0.2)
    namespace.delete("pods", name_of(pod))
    try:
        namespace.wait_for_pod(name_of(pod), lambda one: one["status"]["phase"] == "Failed")
        scene = make_scene()
        scene.reconcile(pod)
        outcome = scene.reports.outcome(pod)
        assert outcome.reason is Reason.POD_DELETED
        assert outcome.log_tail in (("ready",), ())  # the kubelet may have removed the container by now
    finally:
        namespace.drop_finalizers("pods", name_of(pod))


def _log(namespace: Namespace, pod: Manifest) -> str:
    state = namespace.pod(name_of(pod)) or {}
    started = state.get("status", {}).get("phase") == "Running"
    return namespace.log(name_of(pod)) if started else ""


def test_pages_make_one_complete_list(namespace: Namespace, make_scene: MakeScene) -> None:
    pods = [task_pod(spec=PARKED) for _ in range(23)]
    for pod in pods:
        namespace.create(pod)
    scene = make_scene(page_size=5)
    done = scene.reconcile(*pods[:20], read_at=time.time() + 1)
    assert scene.observer.calls.count("list_pods") == 5
    assert (done.seen, done.reported, done.deleted) == (23, 0, 3)
    assert _names(namespace) == {name_of(one) for one in pods[:20]}


def test_nothing_is_concluded_from_a_part_of_the_list(
    namespace: Namespace, make_scene: MakeScene, tmp_path: Path
) -> None:
    pods = [task_pod(spec=PARKED) for _ in range(12)]
    for pod in pods:
        namespace.create(pod)
    administrator = namespace.admin_kubeconfig()
    url = urlsplit(yaml.safe_load(administrator.read_text())["clusters"][0]["cluster"]["server"])
    with TcpProxy((url.hostname or "", url.port or 443)) as proxy:
        config = kubeconfig(administrator, namespace.name, server=f"{url.scheme}://{proxy.host}:{proxy.port}")
        (tmp_path / "config").write_text(yaml.safe_dump(config))
        scene = make_scene(tmp_path / "config", page_size=5)
        scene.observer.on_call = lambda _: proxy.stop()
        with pytest.raises(Unreachable):
            scene.reconcile(task_pod(), read_at=time.time() + 1)
    assert scene.observer.calls == ["list_pods", "list_pods"]
    assert scene.reports.all == []
    assert len(_names(namespace)) == 12


def test_a_pull_that_fails_after_a_long_start_has_its_patience(namespace: Namespace, make_scene: MakeScene) -> None:
    slow = {**task_pod("sleep 8")["spec"]["containers"][0], "name": "slow"}
    pod = task_pod("true", image="nobody-has.invalid/this-image:1", spec={"initContainers": [slow]})
    namespace.create(pod)
    waits = "Error: ErrImagePull"
    wait_until(lambda: any(waits in one for one in namespace.events(name_of(pod))), 120, "the pull fails", 0.1)
    failed_at = time.time()
    scene = make_scene(policy=replace(AT_ONCE, patience_seconds=6))
    assert scene.reconcile(pod).reported == 0
    assert _names(namespace) == {name_of(pod)}
    wait_until(lambda: scene.reconcile(pod).reported, 60, "patience ends", 0.2)
    assert 4 < time.time() - failed_at < 30
    outcome = scene.reports.outcome(pod)
    assert outcome.reason is Reason.IMAGE_PULL_FAILED
    namespace.wait_for_no_pod(name_of(pod))


def test_a_claim_that_nothing_provides_is_named_with_the_provisioner_s_words(
    namespace: Namespace, make_scene: MakeScene
) -> None:
    """The worker may not read storage classes, so nothing refused it before."""
    classes, name = "/apis/storage.k8s.io/v1/storageclasses", f"{namespace.name}-broken"
    broken = {"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": name}}
    namespace.api.call("POST", classes, {**broken, "provisioner": "kubernetes.io/aws-ebs"})
    try:
        spec = {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "1Mi"}},
            "storageClassName": name,
        }
        metadata = {"name": "unbound"}
        namespace.create({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})
        source = {"persistentVolumeClaim": {"claimName": "unbound"}}
        pod = task_pod("true", spec={"volumes": [{"name": "staging", **source}]})
        namespace.create(pod)
        wait_until(lambda: namespace.events("unbound"), 60, "the provisioner's words", 0.2)
        namespace.wait_for_pod(name_of(pod), lambda one: "PersistentVolume" in str(one["status"].get("conditions")))
        scene = make_scene(policy=GIVES_UP)
        assert scene.reconcile(pod).reported == 1
        outcome = scene.reports.outcome(pod)
        assert outcome.reason is Reason.UNSCHEDULABLE
        # In the tree of 1.20, outside of it since 1.23.
        assert any(
            f"; claim 'unbound': {one}: " in outcome.message for one in ("ProvisioningFailed", "ExternalProvisioning")
        )
    finally:
        namespace.api.call("DELETE", f"{classes}/{name}")


def test_a_report_that_cannot_be_sent_keeps_its_pod_for_the_next_pass(
    namespace: Namespace, make_scene: MakeScene
) -> None:
    pod = task_pod(spec=PARKED)
    namespace.create(pod)

    def broker_is_away(*_: object) -> None:
        raise ConnectionError("the broker is away")

    with pytest.raises(ConnectionError):
        make_scene(policy=GIVES_UP, reporter=broker_is_away).reconcile(pod)
    assert _names(namespace) == {name_of(pod)}
    scene = make_scene(policy=GIVES_UP)
    assert scene.reconcile(pod).deleted == 1
    assert scene.reports.outcome(pod).reason is Reason.UNSCHEDULABLE


def test_without_the_right_to_read_events_and_logs_or_to_delete_ends_are_reported_all_the_same(
    namespace: Namespace, make_scene: MakeScene
) -> None:
    failed, pending = task_pod("echo hello; exit 3"), task_pod(spec=PARKED)
    for pod in (failed, pending):
        namespace.create(pod)
    namespace.wait_for_pod(name_of(failed), "Failed")
    config = namespace.powerless_kubeconfig()
    with pytest.raises(ApiError, match="cannot list resource"):
        make_scene(config).reconcile(failed)
    _allow_listing(namespace, "powerless")
    scene = make_scene(config, policy=GIVES_UP)
    done = scene.reconcile(failed, pending)
    assert (done.reported, done.deleted) == (2, 0)
    outcome = scene.reports.outcome(failed)
    assert (outcome.reason, outcome.exit_code) == (Reason.AGENT_LOST, 3)
    assert (outcome.last_event, outcome.log_tail) == ("", ())


def _allow_listing(namespace: Namespace, account: str) -> None:
    path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace.name}"
    group = "rbac.authorization.k8s.io"
    rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
    role = {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": {"name": "list"}, "rules": rules}
    binding = {
        "apiVersion": f"{group}/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "list"},
        "roleRef": {"apiGroup": group, "kind": "Role", "name": "list"},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": namespace.name}],
    }
    namespace.api.call("POST", f"{path}/roles", role)
    namespace.api.call("POST", f"{path}/rolebindings", binding)


def test_a_worker_whose_clock_is_wrong_judges_by_the_clusters(
    namespace: Namespace, make_scene: MakeScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour ahead, every pod was pending for too long; SQL's times are moved to the cluster's clock as well."""
    live, fresh = task_pod(spec=PARKED), task_pod(spec=PARKED)
    for pod in (live, fresh):
        namespace.create(pod)
    wrong = time.time() + 3_600
    monkeypatch.setattr("leoflow_celery.clock.time.time", lambda: wrong)
    scene = make_scene(policy=ReconcilePolicy())
    read = replace(expecting(live, read_at=wrong + 3_600), age_seconds=5.0)
    done = scene.reconcile_with(read)
    assert (done.seen, done.reported, done.deleted) == (2, 0, 0)
    assert scene.reports.all == []
    assert abs(scene.api.clock.offset_seconds or 0.0) == pytest.approx(3_600, abs=60)
    assert scene.reconcile_with(replace(read, age_seconds=-3_600.0)).deleted == 1
    assert _names(namespace) == {name_of(live)}
