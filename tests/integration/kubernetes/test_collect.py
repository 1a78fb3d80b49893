"""Staging claims on a real cluster: deleted as planned, swept when unknown, left alone when in use or not ours."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from leoflow_celery.domain.staging import StagingPlan
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.executors.kubernetes.staging_pvc import StagingCollector, build_claim
from leoflow_celery.settings import KubernetesSettings
from tests.integration.kubernetes.scene import name_of, task_pod
from tests.support.cluster import Manifest, Namespace
from tests.support.launches import launch_spec
from tests.support.waiting import wait_until

CLAIMS = "persistentvolumeclaims"


@pytest.fixture
def collector(namespace: Namespace) -> Iterator[StagingCollector]:
    """With the worker's Role, in pages of two."""
    settings = KubernetesSettings(kubeconfig=namespace.worker_kubeconfig(), page_size=2)
    api = KubernetesApi.from_settings(settings)
    yield StagingCollector(api, settings)
    api.close()


def _run(run_id: str) -> LaunchSpec:
    return launch_spec(run_id=run_id, staging_claim=f"leoflow-staging-launches-{run_id}")


def _claim(namespace: Namespace, launch: LaunchSpec) -> str:
    return name_of(namespace.create(build_claim(launch.request, "1Mi")))


def _pod_with(launch: LaunchSpec, script: str) -> Manifest:
    source = {"persistentVolumeClaim": {"claimName": launch.request.staging_claim}}
    return task_pod(
        script,
        launch=launch,
        spec={"volumes": [{"name": "staging", **source}]},
        volumeMounts=[{"name": "staging", "mountPath": "/staging"}],
    )


def _exist(namespace: Namespace, *names: str) -> set[str]:
    return {name for name in names if namespace.get(CLAIMS, name) is not None}


def _plan(delete: dict[str, str], keep: set[str], orphan_seconds: float = 3_600) -> StagingPlan:
    return StagingPlan(time.time() + 2, delete, frozenset(keep), orphan_seconds)


def test_planned_claims_go_kept_ones_stay_and_absent_ones_count_as_gone(
    namespace: Namespace, collector: StagingCollector
) -> None:
    succeeded, expired, kept, young = (_claim(namespace, _run(one)) for one in ("a", "b", "c", "d"))
    delete = {succeeded: "run_succeeded", expired: "ttl_expired", "leoflow-staging-gone": "run_succeeded"}
    assert collector.collect(_plan(delete, {kept})) == delete
    wait_until(lambda: _exist(namespace, succeeded, expired) == set(), 60, "the claims go")
    assert _exist(namespace, kept, young) == {kept, young}
    assert collector.collect(_plan(delete, {kept})) == delete  # its answer was lost: the next plan names them again


def test_a_labelled_claim_that_sql_does_not_know_goes_when_it_is_old(
    namespace: Namespace, collector: StagingCollector
) -> None:
    orphan, kept = _claim(namespace, _run("orphan")), _claim(namespace, _run("kept"))
    others = name_of(namespace.create(build_claim(_run("others").request, "1Mi", system="another")))
    assert collector.collect(_plan({}, {kept})) == {}
    assert collector.collect(_plan({}, {kept}, orphan_seconds=0)) == {orphan: "orphaned"}
    wait_until(lambda: _exist(namespace, orphan, kept) == {kept}, 60, "the orphan goes")
    assert _exist(namespace, others)


def test_a_claim_without_our_label_is_never_touched(namespace: Namespace, collector: StagingCollector) -> None:
    launch = _run("foreign")
    body = build_claim(launch.request, "1Mi")
    del body["metadata"]["labels"]
    name = name_of(namespace.create(body))
    assert collector.collect(_plan({name: "run_succeeded"}, set(), orphan_seconds=0)) == {}
    found = namespace.get(CLAIMS, name)
    assert found is not None
    assert "deletionTimestamp" not in found["metadata"]


def test_a_claim_stays_while_a_live_pod_mounts_it_and_ended_pods_do_not_keep_it(
    namespace: Namespace, collector: StagingCollector
) -> None:
    """A run that was cleared and started again uses the same claim; an older plan must not take its data."""
    launch = _run("again")
    claim = _claim(namespace, launch)
    pod = _pod_with(launch, "until test -e /staging/end; do sleep 0.2; done")
    namespace.create(pod)
    namespace.wait_for_pod(name_of(pod), "Running")
    plan = _plan({claim: "run_succeeded"}, set())
    assert collector.collect(plan) == {}
    found = namespace.get(CLAIMS, claim)
    assert found is not None
    assert "deletionTimestamp" not in found["metadata"]

    second = _run("again")
    ends_it = _pod_with(second, "touch /staging/end")
    namespace.create(ends_it)
    namespace.wait_for_pod(name_of(pod), "Succeeded")
    namespace.wait_for_pod(name_of(ends_it), "Succeeded")
    assert collector.collect(plan) == {claim: "run_succeeded"}
    wait_until(lambda: not _exist(namespace, claim), 60, "the claim goes")


def test_a_claim_on_its_way_out_is_gone_when_its_last_pod_is(namespace: Namespace, collector: StagingCollector) -> None:
    launch = _run("leaving")
    claim = _claim(namespace, launch)
    pod = _pod_with(launch, "sleep 600")
    namespace.create(pod)
    namespace.wait_for_pod(name_of(pod), "Running")
    namespace.delete(CLAIMS, claim)
    plan = _plan({claim: "run_succeeded"}, set())
    assert collector.collect(plan) == {}
    namespace.delete("pods", name_of(pod), grace_seconds=0)
    wait_until(lambda: collector.collect(plan), 60, "the claim is gone")
