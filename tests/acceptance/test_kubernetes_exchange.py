"""A whole system whose pods hold no token: they run their tasks all the same, and a stranger's pod gets nothing."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from leoflow_celery.client import Client
from leoflow_celery.domain.attempt import staging_claim_name
from leoflow_celery.executors.core import SEAL
from tests.support.cluster import Manifest, Namespace
from tests.support.host import host_address
from tests.support.http_target import HttpTarget
from tests.support.images import task_image
from tests.support.kubernetes_system import KubernetesSystem, call
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

OUTAGE_SECONDS = 8
TOKEN = "/var/run/secrets/leoflow/token"


@pytest.fixture(scope="module")
def deployed(
    tmp_path_factory: pytest.TempPathFactory,
    shared_redis: RedisServer,
    module_namespace: Namespace,
    request: pytest.FixtureRequest,
) -> Iterator[KubernetesSystem]:
    postgres = request.getfixturevalue("postgres")
    directory, url = tmp_path_factory.mktemp("k8s"), postgres.empty()
    patient = {"BROKER_VISIBILITY_TIMEOUT_SECONDS": 10, "KUBERNETES_PENDING_TIMEOUT_SECONDS": 120}
    with KubernetesSystem(directory, shared_redis.url(), url, module_namespace, exchanges=True, **patient) as system:
        system.start_all()
        yield system
    postgres.drop(url)


@pytest.fixture
def system(deployed: KubernetesSystem) -> KubernetesSystem:
    deployed.shown_on_failure()
    return deployed


@pytest.fixture
def client(system: KubernetesSystem) -> Client:
    return system.client


@pytest.fixture
def witness(deployed: KubernetesSystem) -> Iterator[HttpTarget]:
    with HttpTarget(host_address()) as target:
        yield target


def bash(name: str, command: str, **fields: Any) -> dict[str, Any]:
    identity = {"task_instance_id": f"{name}-{secrets.token_hex(4)}", "dag_id": "acc", "run_id": "r"}
    return {**identity, "task_id": name, "operator": "bash", "entrypoint": command, "image": task_image(), **fields}


def pods_of(namespace: Namespace, task_instance_id: str) -> list[Manifest]:
    annotation = "leoflow.io/task-instance-id"
    return [pod for pod in namespace.pods() if pod["metadata"]["annotations"][annotation] == task_instance_id]


@pytest.mark.timeout(400)
def test_a_task_runs_end_to_end_and_no_token_is_on_its_pod_or_in_a_secret(
    system: KubernetesSystem, client: Client, module_namespace: Namespace, witness: HttpTarget
) -> None:
    look = f'env >/proc/1/fd/1; {call(witness.hold("plain"))} && echo 42 >"$LEOFLOW_RETURN_VALUE_PATH"'
    handle = client.submit(bash("plain", look, env={"REGION": "eu"}))
    wait_until(lambda: witness.calls["plain"] == 1, 90, "user code runs")
    (pod,) = pods_of(module_namespace, handle.attempt.task_instance_id)
    (secret,) = module_namespace.items("secrets", "leoflow.io/run-id")
    assert list(secret["data"]) == ["REGION"]
    text = yaml.safe_dump([pod, secret])
    assert "LEOFLOW_AGENT_TOKEN_PATH" in text
    assert "eyJ" not in text, "a token begins like that"
    witness.release("plain")
    assert handle.get(timeout=90) == 42
    lines = [line["msg"] for line in client.logs("acc", "r", "plain")]
    assert not [line for line in lines if "TOKEN" in line]
    assert handle.task_instance().launch == 1


@pytest.mark.timeout(400)
def test_a_task_with_a_staging_volume_and_its_group_can_read_its_proof(client: Client) -> None:
    """The kubelet gives the files of such a pod to the group of its volumes, and to nobody else."""
    claim = {"staging_claim": staging_claim_name("acc", "r"), "staging_size": "1Mi"}
    handle = client.submit(bash("staged", f"test -r {TOKEN}", **claim))
    handle.get(timeout=120)
    assert handle.task_instance().launch == 1


@pytest.mark.timeout(400)
def test_a_pod_that_starts_while_the_gateway_does_not_reach_the_api_server_runs_once_it_does(
    system: KubernetesSystem, client: Client, witness: HttpTarget, module_namespace: Namespace
) -> None:
    assert system.gateway_proxy is not None
    system.gateway_proxy.stop()
    handle = client.submit(bash("patient", call(witness.url("patient"))))
    made = wait_until(lambda: pods_of(module_namespace, handle.attempt.task_instance_id), 60, "a pod", 0.1)
    module_namespace.wait_for_pod(made[0]["metadata"]["name"], "Running")
    gateway = system.process("gateway")
    gateway.wait_for_line("exchange.unanswered", 60)
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > OUTAGE_SECONDS, OUTAGE_SECONDS + 5)
    assert witness.calls["patient"] == 0
    system.gateway_proxy.resume()
    handle.get(timeout=90)
    assert (witness.calls["patient"], handle.task_instance().launch) == (1, 1)


@pytest.mark.timeout(400)
def test_a_worker_killed_before_it_vouched_leaves_one_pod_that_runs_once(
    system: KubernetesSystem, client: Client, module_namespace: Namespace, witness: HttpTarget
) -> None:
    """Nobody knows who made the pod it left, so that is replaced; it never had a token."""
    worker = system.process("workers.k8s")
    system.api_proxy.hold_answers()
    try:
        handle = client.submit(bash("killed", call(witness.url("killed"))))
        made = wait_until(lambda: pods_of(module_namespace, handle.attempt.task_instance_id), 60, "a pod", 0.1)
        worker.kill()
    finally:
        system.api_proxy.pass_answers()
    system.restart("workers.k8s")
    handle.get(timeout=150)
    view = handle.task_instance()
    assert (witness.calls["killed"], view.launch) == (1, 1)
    assert view.external_name == made[0]["metadata"]["name"]


@pytest.mark.timeout(400)
def test_a_strangers_pod_with_everything_of_ours_copied_gets_nothing_from_the_gateway(
    system: KubernetesSystem, client: Client, module_namespace: Namespace, witness: HttpTarget
) -> None:
    """Our image, our agent, our labels and annotations with the seal, our volume, its own name."""
    handle = client.submit(bash("copied", call(witness.hold("copied"))))
    wait_until(lambda: witness.calls["copied"] == 1, 90, "user code runs")
    (ours,) = pods_of(module_namespace, handle.attempt.task_instance_id)
    assert SEAL in ours["metadata"]["annotations"]
    container = json.loads(json.dumps(ours["spec"]["containers"][0]))
    container["env"].append({"name": "LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS", "value": "5"})
    # Without the label by which a reconcile would delete it before it has tried.
    labels = {name: value for name, value in ours["metadata"]["labels"].items() if name != "leoflow.io/run-id"}
    name = f"stranger-{secrets.token_hex(4)}"
    module_namespace.create(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels, "annotations": ours["metadata"]["annotations"]},
            "spec": {
                "restartPolicy": "Never",
                "securityContext": ours["spec"]["securityContext"],
                "volumes": [one for one in ours["spec"]["volumes"] if one["name"] != "leoflow-staging"],
                "containers": [container],
            },
        }
    )
    module_namespace.wait_for_pod(name, "Failed")
    assert "has the seal of another pod" in module_namespace.log(name)
    module_namespace.delete("pods", name, 0)
    witness.release("copied")
    handle.get(timeout=90)
    view = handle.task_instance()
    assert (view.launch, view.state.value, witness.calls["copied"]) == (1, "success", 1)
