"""The worker's Role is what it needs and nothing more: all that it ever asks the API server for, beside the Role."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from leoflow_celery.domain.attempt import AttemptId, staging_claim_name
from leoflow_celery.domain.desired_state import Expectation, ExpectedAttempt
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.request import TaskRequest, parse_request
from leoflow_celery.domain.staging import StagingPlan
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.kubernetes import KubernetesExecutor
from leoflow_celery.settings import KubernetesSettings, Settings
from tests.support.api_recorder import ApiRecorder, Recorded, Right, rights_of
from tests.support.cluster import Namespace, kubeconfig, worker_role
from tests.support.images import base_image
from tests.support.kustomize import DEPLOY
from tests.support.waiting import wait_until

#: What a component grants to those who want it; without it the worker does without.
OPTIONAL = next(yaml.safe_load_all((DEPLOY / "components/storage-classes/cluster-role.yaml").read_text()))


class Worker:
    """An executor with the deployed Role's rights, whose calls are recorded, and what it reports."""

    def __init__(self, namespace: Namespace, recorder: ApiRecorder, directory: Path) -> None:
        self.namespace, self.recorded = namespace, recorder.recorded
        path = directory / "kubeconfig"
        path.write_text(yaml.safe_dump(kubeconfig(namespace.worker_kubeconfig(), namespace.name, server=recorder.url)))
        kubernetes = KubernetesSettings(kubeconfig=path, finished_grace_seconds=0, startup_patience_seconds=0)
        self.reports: dict[AttemptId, Outcome] = {}
        self.executor = KubernetesExecutor(Settings(kubernetes=kubernetes), self._report)

    def _report(self, attempt: AttemptId, outcome: Outcome, _return_value: str | None = None) -> None:
        self.reports[attempt] = outcome


@pytest.fixture
def worker(namespace: Namespace, tmp_path: Path) -> Iterator[Worker]:
    with ApiRecorder(namespace.worker_kubeconfig()) as recorder:
        made = Worker(namespace, recorder, tmp_path)
        yield made
        made.executor.close()


def request(command: str, **fields: Any) -> TaskRequest:
    """A pod that ends as its command does: there is no agent in this image."""
    container = {"name": "task", "command": ["sh", "-c", command], "securityContext": {"runAsUser": 10001}}
    return parse_request(
        {
            "task_instance_id": secrets.token_hex(8),
            "dag_id": "rbac",
            "run_id": "r",
            "task_id": "t",
            "operator": "bash",
            "entrypoint": command,
            "image": base_image(),
            "agent_token": "none",
            "control_plane_addr": "127.0.0.1:1",
            "pod_override": {"spec": {"containers": [container]}},
            **fields,
        }
    )


def everything_a_worker_does(worker: Worker) -> None:
    """Launch, deliver again, lose, fail, reconcile, cancel, tidy up."""
    executor, namespace = worker.executor, worker.namespace
    claim = {"staging_claim": staging_claim_name("rbac", "r"), "staging_size": "1Mi"}
    failed = LaunchSpec(request("echo last words; exit 3", **claim), AttemptId("failed"))
    named = LaunchSpec(
        request("true", staging_claim="leoflow-staging-named", staging_storage_class="hostpath"), AttemptId("named")
    )
    lost, running = (LaunchSpec(request("sleep 600"), AttemptId(name)) for name in ("lost", "running"))
    for launch in (failed, named, running):
        executor.execute(launch)
    assert executor.execute(running).already
    namespace.wait_for_pod(failed.name, "Failed")
    now = time.time()
    expected = [ExpectedAttempt(one.attempt, one.name, now - 60) for one in (failed, lost, running)]
    executor.reconcile(Expectation.of(now + 60, expected))  # SQL was read well after the end, and knows of no claim
    assert {attempt.task_instance_id for attempt in worker.reports} == {"failed", "lost"}
    assert "last words" in worker.reports[failed.attempt].log_tail
    executor.cancel(running.name, 1)
    namespace.wait_for_no_pod(running.name)
    executor.reconcile(Expectation.of(time.time() + 60, []))
    wait_until(lambda: not namespace.pods(), 60, "the pods are deleted", 0.1)
    doomed = dict.fromkeys((claim["staging_claim"], "leoflow-staging-named"), "run_succeeded")
    plan = StagingPlan(time.time(), doomed)
    wait_until(lambda: set(executor.collect_staging(plan)) == set(doomed), 60, "the claims are gone", 0.2)


def test_the_role_grants_what_the_worker_asks_for_and_nothing_else(worker: Worker) -> None:
    everything_a_worker_does(worker)
    recorded: Recorded = worker.recorded
    granted = rights_of(worker_role())
    assert _text(recorded.namespaced - granted) == [], "the Role of deploy/kubernetes/tasks misses a verb"
    assert _text(granted - recorded.namespaced) == [], "the Role of deploy/kubernetes/tasks has a verb nobody uses"
    clustered = recorded.clustered - {
        Right("create", "selfsubjectaccessreviews", "authorization.k8s.io")
    }  # everybody's
    assert _text(clustered) == _text(rights_of(OPTIONAL)), "the component storage-classes differs from its use"
    # Without that component the worker is refused this much, and goes on.
    assert _text(recorded.refused) == _text(clustered)


def _text(rights: set[Right]) -> list[str]:
    return sorted(map(str, rights))
