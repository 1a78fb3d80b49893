"""Messages delivered again, a worker killed in the middle of a launch, gateway and API server away: once, and true."""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.client import Client
from tests.support.cluster import Manifest, Namespace
from tests.support.host import host_address
from tests.support.http_target import HttpTarget
from tests.support.images import task_image
from tests.support.kubernetes_system import KubernetesSystem, call
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

CHAINS, LENGTH = 10, 3
OUTAGE_SECONDS = 20
#: An agent that gives up reporting soon, so that its pod ends while the gateway is away.
IMPATIENT = [{"name": "task", "env": [{"name": "LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS", "value": "2"}]}]


@pytest.fixture(scope="module")
def deployed(
    tmp_path_factory: pytest.TempPathFactory,
    shared_redis: RedisServer,
    module_namespace: Namespace,
    request: pytest.FixtureRequest,
) -> Iterator[KubernetesSystem]:
    postgres = request.getfixturevalue("postgres")
    directory, url = tmp_path_factory.mktemp("k8s"), postgres.empty()
    overrides = {
        "BROKER_VISIBILITY_TIMEOUT_SECONDS": 10,
        "KUBERNETES_STARTUP_PATIENCE_SECONDS": 30,
        # A launch that a dead worker left half done is finished by its redelivery, however slow the machine is.
        "KUBERNETES_PENDING_TIMEOUT_SECONDS": 120,
    }
    with KubernetesSystem(directory, shared_redis.url(), url, module_namespace, **overrides) as system:
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
    """Counts the starts of user code, and holds them until the test lets them go on."""
    with HttpTarget(host_address()) as target:
        yield target


def bash(name: str, command: str, **fields: Any) -> dict[str, Any]:
    identity = {"task_instance_id": f"{name}-{secrets.token_hex(4)}", "dag_id": "acc", "run_id": "r"}
    return {**identity, "task_id": name, "operator": "bash", "entrypoint": command, "image": task_image(), **fields}


def nothing_is_left(namespace: Namespace) -> None:
    """No pod, Secret or claim of ours, within the grace of finished pods and a reconcile."""
    wait_until(lambda: not namespace.leftovers(), 120, lambda: str(namespace.leftovers()), 0.5)


def _messages(system: KubernetesSystem) -> list[tuple[bytes, bytes]]:
    """(list, message) of everything that waits for the k8s worker."""
    lists = [key for key in system.redis.scan_iter("*k8s*") if system.redis.type(key) == b"list"]
    return [(key, message) for key in lists for message in system.redis.lrange(key, 0, -1)]


def _deliver_again(system: KubernetesSystem, where: bytes, message: bytes) -> None:
    copy = json.loads(message)
    copy["properties"]["delivery_tag"] = secrets.token_hex(16)
    system.redis.lpush(where, json.dumps(copy))


@pytest.mark.timeout(400)
def test_a_message_delivered_three_times_and_again_after_the_pod_is_gone_runs_user_code_once(
    system: KubernetesSystem, client: Client, module_namespace: Namespace, witness: HttpTarget
) -> None:
    worker = system.process("workers.k8s")
    worker.terminate()
    handle = client.submit(bash("again", call(witness.url("again"))))
    ((where, message),) = [found for found in _messages(system) if handle.id.encode() in found[1]]
    for _ in range(2):
        _deliver_again(system, where, message)
    system.restart("workers.k8s")
    handle.get(timeout=120)
    pod = handle.task_instance().external_name
    module_namespace.wait_for_no_pod(pod)
    assert witness.calls["again"] == 1
    _deliver_again(system, where, message)
    # The pod is made again, its agent is refused and ends well, and it is tidied up like any other.
    module_namespace.wait_for_pod(pod, "Succeeded")
    nothing_is_left(module_namespace)
    assert witness.calls["again"] == 1
    view = handle.task_instance()
    assert (view.state.value, view.launch) == ("success", 1)


@pytest.mark.timeout(400)
def test_a_worker_killed_between_the_pod_and_its_acknowledgement_leaves_one_pod_that_runs_once(
    system: KubernetesSystem, client: Client, module_namespace: Namespace, witness: HttpTarget
) -> None:
    worker = system.process("workers.k8s")
    system.api_proxy.hold_answers()
    try:
        handle = client.submit(bash("killed", call(witness.url("killed"))))
        made = wait_until(lambda: _pods_of(module_namespace, handle.attempt.task_instance_id), 60, "a pod", 0.1)
        worker.kill()
    finally:
        system.api_proxy.pass_answers()
    system.restart("workers.k8s")
    handle.get(timeout=150)
    assert witness.calls["killed"] == 1
    view = handle.task_instance()
    assert (view.launch, view.external_name) == (1, made[0]["metadata"]["name"])
    nothing_is_left(module_namespace)


def _pods_of(namespace: Namespace, task_instance_id: str) -> list[Manifest]:
    annotation = "leoflow.io/task-instance-id"
    return [pod for pod in namespace.pods() if pod["metadata"]["annotations"][annotation] == task_instance_id]


@pytest.mark.timeout(400)
def test_a_success_is_a_success_although_the_gateway_was_away_at_the_end(
    system: KubernetesSystem, client: Client, module_namespace: Namespace, witness: HttpTarget
) -> None:
    command = f'{call(witness.hold("away"))} && echo 42 >"$LEOFLOW_RETURN_VALUE_PATH"'
    handle = client.submit(bash("away", command, pod_override={"spec": {"containers": IMPATIENT}}))
    wait_until(lambda: witness.calls["away"] == 1, 60, "user code runs")
    gateway = system.process("gateway")
    gateway.kill()
    witness.release("away")
    assert handle.get(timeout=150) == 42
    system.restart("gateway").wait_for_line("gateway listening on")
    view = handle.task_instance()
    assert (view.state.value, view.launch, witness.calls["away"]) == ("success", 1, 1)
    nothing_is_left(module_namespace)


@pytest.mark.timeout(400)
def test_a_success_whose_pod_a_drain_took_before_anybody_saw_it_is_recorded_and_nothing_runs_twice(
    system: KubernetesSystem, client: Client, module_namespace: Namespace, witness: HttpTarget
) -> None:
    command = f'{call(witness.hold("drained"))} && echo 42 >"$LEOFLOW_RETURN_VALUE_PATH"'
    handle = client.submit(bash("drained", command, pod_override={"spec": {"containers": IMPATIENT}}))
    wait_until(lambda: witness.calls["drained"] == 1, 60, "user code runs")
    pod = handle.task_instance().external_name
    for name in ("gateway", "workers.k8s"):
        system.process(name).kill()
    witness.release("drained")
    # An agent that cannot report exits with a failure; its record says what became of the task.
    ended = module_namespace.wait_for_pod(pod, lambda one: one["status"]["phase"] in ("Succeeded", "Failed"))
    record = json.loads(ended["status"]["containerStatuses"][0]["state"]["terminated"]["message"])
    assert (record["state"], record["reported"]) == ("success", False)
    module_namespace.delete("pods", pod)
    for name in ("workers.k8s", "gateway"):
        system.restart(name)
    assert handle.get(timeout=150) == 42
    view = handle.task_instance()
    assert (view.state.value, view.launch, witness.calls["drained"]) == ("success", 1, 1)
    module_namespace.wait_for_no_pod(pod)
    nothing_is_left(module_namespace)


@pytest.mark.timeout(400)
def test_a_run_of_thirty_tasks_survives_an_api_server_that_is_away(
    system: KubernetesSystem, client: Client, module_namespace: Namespace, witness: HttpTarget, tmp_path: Path
) -> None:
    dag = {"dag_id": "outage", "image": task_image(), "tasks": _chains(witness)}
    run = system.run_dag(dag, "one", tmp_path)
    wait_until(lambda: len(witness.calls) >= 5, 120, "the run is in the middle")
    system.api_proxy.stop()
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > OUTAGE_SECONDS, OUTAGE_SECONDS + 5)
    assert len(witness.calls) < CHAINS * LENGTH, "the run must not be over"
    system.api_proxy.resume()
    assert run.wait(240) == 0, run.output()
    assert witness.calls == Counter({task["task_id"]: 1 for task in dag["tasks"]})
    views = client.task_instances("outage", "one")
    # A pod whose Secret did not come in time was replaced by the next launch; no try was spent on that.
    assert {(view.state.value, view.try_number) for view in views} == {("success", 1)}
    nothing_is_left(module_namespace)


def _chains(witness: HttpTarget) -> list[dict[str, Any]]:
    return [
        {
            "task_id": f"t{chain}_{link}",
            "type": "bash",
            "entrypoint": call(witness.url(f"t{chain}_{link}")),
            "depends_on": [f"t{chain}_{link - 1}"] if link else [],
        }
        for chain in range(CHAINS)
        for link in range(LENGTH)
    ]
