"""Two systems in one namespace run the same DAG: neither takes, stops or deletes what is the other's."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import pytest

from leoflow_celery.domain.desired_state import Expectation, ExpectedAttempt
from leoflow_celery.domain.staging import StagingPlan
from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.kubernetes import KubernetesExecutor
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.settings import KubernetesSettings
from tests.integration.kubernetes.conftest import MakeExecutor
from tests.integration.kubernetes.scene import AT_ONCE, PARKED, Scene, name_of, task_pod
from tests.support.cluster import Namespace
from tests.support.launches import parked
from tests.support.waiting import wait_until

CLAIMS = "persistentvolumeclaims"
FIX = r"belongs to system 'blue', not to '(green)?': systems that share a namespace need task instance ids and run ids"


@dataclass
class Neighbours:
    blue: KubernetesExecutor
    others: list[KubernetesExecutor]
    namespace: Namespace

    def uid(self, resource: str, name: str) -> str:
        """Of an object that nobody is deleting."""
        metadata = (self.namespace.get(resource, name) or {"metadata": {}})["metadata"]
        assert "deletionTimestamp" not in metadata
        return str(metadata["uid"])


@pytest.fixture
def neighbours(namespace: Namespace, make_executor: MakeExecutor) -> Neighbours:
    """With the worker's Role each; of the others one has a name and one has none."""
    path = namespace.worker_kubeconfig()
    blue, *others = (make_executor(path, system=one) for one in ("blue", "green", ""))
    return Neighbours(blue, others, namespace)


def test_a_pod_of_the_same_name_is_neither_taken_nor_cancelled(neighbours: Neighbours) -> None:
    launch = parked()
    uid = neighbours.blue.execute(launch).details["uid"]
    (secret,) = neighbours.namespace.items("secrets", "leoflow.io/system=blue")
    assert secret["metadata"]["ownerReferences"][0]["uid"] == uid
    for other in neighbours.others:
        with pytest.raises(PermanentLaunchError, match=FIX) as caught:
            other.execute(launch)
        assert caught.value.reason == "invalid_spec"
        other.cancel(launch.name, 1)
        assert neighbours.uid("pods", launch.name) == uid
    neighbours.blue.cancel(launch.name, 1)
    neighbours.namespace.wait_for_no_pod(launch.name)


def test_a_reconcile_neither_sees_nor_deletes_nor_reports_it(neighbours: Neighbours) -> None:
    """It never starts, and all of them expect an attempt of that name."""
    launch = parked()
    uid = neighbours.blue.execute(launch).details["uid"]
    path = neighbours.namespace.worker_kubeconfig()
    for system in ("green", ""):
        scene = Scene(path, replace(AT_ONCE, system=system))
        expectation = [Expectation.of(time.time() + 60, [_not_launched(launch)]), Expectation.of(time.time() + 60, [])]
        assert [scene.reconcile_with(one).seen for one in expectation] == [0, 0]
        assert scene.reports.all == []
        scene.close()
    assert neighbours.uid("pods", launch.name) == uid


def _not_launched(launch: LaunchSpec) -> ExpectedAttempt:
    return ExpectedAttempt(launch.attempt, launch.name)


def test_a_claim_of_the_same_run_is_neither_used_nor_deleted(neighbours: Neighbours) -> None:
    launch = parked(staging_claim="leoflow-staging-shared", staging_size="1Mi")
    neighbours.blue.execute(launch)
    claim = neighbours.uid(CLAIMS, "leoflow-staging-shared")
    neighbours.blue.cancel(launch.name, 1)
    neighbours.namespace.wait_for_no_pod(launch.name)
    plan = StagingPlan(time.time() + 60, {"leoflow-staging-shared": "run_succeeded"}, orphan_seconds=0)
    for other in neighbours.others:
        with pytest.raises(PermanentLaunchError, match=FIX):
            other.execute(launch)
        assert other.collect_staging(plan) == {}
        assert neighbours.uid(CLAIMS, "leoflow-staging-shared") == claim
    assert neighbours.namespace.pod(launch.name) is None
    assert neighbours.blue.collect_staging(plan) == plan.delete
    wait_until(lambda: neighbours.namespace.get(CLAIMS, "leoflow-staging-shared") is None, 60, "the claim goes")


def test_a_foreign_pod_that_mounts_our_claim_keeps_it(neighbours: Neighbours) -> None:
    launch = parked(staging_claim="leoflow-staging-mounted", staging_size="1Mi")
    neighbours.blue.execute(launch)
    neighbours.blue.cancel(launch.name, 1)
    neighbours.namespace.wait_for_no_pod(launch.name)
    claim = {"persistentVolumeClaim": {"claimName": "leoflow-staging-mounted"}}
    volumes = {"volumes": [{"name": "theirs", **claim}]}
    user = task_pod(launch=launch, spec={**PARKED, **volumes})
    neighbours.namespace.create(user)
    plan = StagingPlan(time.time() + 60, {"leoflow-staging-mounted": "run_succeeded"})
    assert neighbours.blue.collect_staging(plan) == {}
    assert neighbours.uid("pods", name_of(user))


def test_the_other_s_claim_made_at_the_same_moment_is_refused_too(
    neighbours: Neighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    blue, green = (parked(staging_claim="leoflow-staging-race", staging_size="1Mi") for _ in range(2))
    original = KubernetesApi.post
    raced: list[str] = []

    def post(self: KubernetesApi, path: str, body: dict, **more: str) -> dict:
        if body["kind"] == "PersistentVolumeClaim" and not raced:
            raced.append(path)
            neighbours.blue.execute(blue)
        return original(self, path, body, **more)

    monkeypatch.setattr(KubernetesApi, "post", post)
    with pytest.raises(PermanentLaunchError, match=FIX):
        neighbours.others[0].execute(green)
    assert neighbours.namespace.pod(green.name) is None


def test_deleting_goes_by_uid(namespace: Namespace) -> None:
    pod = task_pod(spec=PARKED)
    uid = namespace.create(pod)["metadata"]["uid"]
    api = KubernetesApi.from_settings(KubernetesSettings(kubeconfig=namespace.worker_kubeconfig()))
    with pytest.raises(Exception, match="409"):
        api.delete(api.pods_path(name_of(pod)), "another", operation="delete_pod")
    api.delete(api.pods_path(name_of(pod)), uid, operation="delete_pod")
    api.close()
