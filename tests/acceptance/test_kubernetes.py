"""Issue by issue on a real cluster: a DAG of pods with a staging volume, true reasons, relaunch, cancel, odd ids."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from leoflow_celery.client import Client, Handle
from leoflow_celery.domain.attempt import staging_claim_name
from leoflow_celery.errors import TaskFailed
from leoflow_celery.store.views import TaskInstanceView
from tests.support.cluster import Manifest, Namespace
from tests.support.host import host_address
from tests.support.http_target import HttpTarget
from tests.support.images import task_image
from tests.support.kubernetes_system import KubernetesSystem, call, image_with
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

SOURCE = """
from pathlib import Path


def double(factor=2):
    numbers = [int(line) for line in Path("/staging/numbers").read_text().split()]
    Path("/staging/doubled").write_text("\\\\n".join(str(number * factor) for number in numbers) + "\\\\n")
    print("doubled", len(numbers))
    return sum(numbers) * factor


def check(total):
    found = sum(int(line) for line in Path("/staging/doubled").read_text().split())
    assert found == total, (found, total)
    return "same"
""".replace("\\\\n", "\\n")
EAT = 'python -c "print(len(bytearray(300_000_000)))"'
#: The cluster's hostpath volumes belong to root, and nobody changes that for a pod's fsGroup.
AS_ROOT = {"spec": {"securityContext": {"runAsNonRoot": False, "runAsUser": 0}}}


@pytest.fixture(scope="module")
def image(module_namespace: Namespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    tag = f"leoflow-acceptance:{secrets.token_hex(4)}"
    with image_with({"dag.py": SOURCE}, task_image(), tag, tmp_path_factory.mktemp("image")) as built:
        yield built


@pytest.fixture(scope="module")
def deployed(
    tmp_path_factory: pytest.TempPathFactory,
    shared_redis: RedisServer,
    module_namespace: Namespace,
    request: pytest.FixtureRequest,
) -> Iterator[KubernetesSystem]:
    postgres = request.getfixturevalue("postgres")
    directory, url = tmp_path_factory.mktemp("k8s"), postgres.empty()
    template = directory / "template.json"
    template.write_text(json.dumps(AS_ROOT))
    overrides = {"KUBERNETES_POD_TEMPLATE": template}
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


def bash(name: str, command: str, run_id: str = "r", **fields: Any) -> dict[str, Any]:
    identity = {"task_instance_id": f"{name}-{secrets.token_hex(4)}", "dag_id": "acc", "run_id": run_id}
    return {**identity, "task_id": name, "operator": "bash", "entrypoint": command, "image": task_image(), **fields}


def pod_of(namespace: Namespace, task_instance_id: str) -> Manifest | None:
    def is_of(pod: Manifest) -> bool:
        return bool(pod["metadata"]["annotations"]["leoflow.io/task-instance-id"] == task_instance_id)

    return next((pod for pod in namespace.pods() if is_of(pod)), None)


def when_running(handle: Handle, namespace: Namespace, witness: HttpTarget, name: str) -> TaskInstanceView:
    """Once user code runs and the kubelet has noticed: before, it would let a deleted pod go without waiting for it."""
    wait_until(lambda: witness.calls[name] == 1, 60, "user code runs")
    view = handle.task_instance()
    namespace.wait_for_pod(view.external_name, "Running")
    return view


@pytest.mark.timeout(400)
def test_a_dag_of_pods_shares_a_staging_volume_that_is_freed_when_it_succeeded(
    system: KubernetesSystem, client: Client, module_namespace: Namespace, image: str, tmp_path_factory: Any
) -> None:
    tasks = [
        {
            "task_id": "numbers",
            "type": "bash",
            "entrypoint": 'seq 1 10 >/staging/numbers; echo 3 >"$LEOFLOW_RETURN_VALUE_PATH"',
        },
        {
            "task_id": "double",
            "type": "python",
            "entrypoint": "dag:double",
            "depends_on": ["numbers"],
            "xcom_input": {"factor": "numbers"},
        },
        {
            "task_id": "read_bash",
            "type": "bash",
            "entrypoint": "test $(wc -l </staging/doubled) = 10",
            "depends_on": ["double"],
        },
        {
            "task_id": "read_python",
            "type": "python",
            "entrypoint": "dag:check",
            "depends_on": ["double"],
            "xcom_input": {"total": "double"},
        },
    ]
    claim = staging_claim_name("staged", "one")
    dag = {"dag_id": "staged", "image": image, "staging": {"enabled": True, "size": "1Mi"}, "tasks": tasks}
    run = system.run_dag(dag, "one", tmp_path_factory.mktemp("dag"))
    wait_until(lambda: module_namespace.get("persistentvolumeclaims", claim), 60, "the claim is made", 0.2)
    assert run.wait(150) == 0
    views = {view.task_id: view for view in client.task_instances("staged", "one")}
    assert {name: view.state.value for name, view in views.items()} == dict.fromkeys(
        (task["task_id"] for task in tasks), "success"
    )
    assert client.xcom("staged", "one", "double") == 165
    assert client.xcom("staged", "one", "read_python") == "same"
    assert "doubled 10" in [line["msg"] for line in client.logs("staged", "one", "double")]
    wait_until(lambda: not module_namespace.get("persistentvolumeclaims", claim), 90, "the claim is freed", 0.2)
    reason = sa.text("SELECT deleted_reason FROM staging_volume WHERE claim_name = :claim")
    wait_until(lambda: _scalar(system, reason, claim=claim) == "run_succeeded", 60, "and that is recorded", 0.2)


def _scalar(system: KubernetesSystem, statement: sa.TextClause, **values: object) -> Any:
    engine = sa.create_engine(system.env["LEOFLOW_DATABASE_URL"])
    try:
        with engine.connect() as connection:
            return connection.scalar(statement, values)
    finally:
        engine.dispose()


@pytest.mark.timeout(400)
def test_every_failure_ends_with_its_own_reason(client: Client, module_namespace: Namespace) -> None:
    memory = {"limits": {"memory": "160Mi"}}
    cases = {
        "non_zero_exit": bash("exit", "echo last words >&2; exit 3"),
        "oom_killed": bash("memory", EAT, resources=memory),
        "unschedulable": bash("nowhere", "true", execution={"node_selector": {"leoflow.io/nobody": "has-this"}}),
        "image_pull_failed": bash("unknown", "true", image="registry.invalid/nobody/has-this:1"),
        "invalid_image": bash("wrong", "true", image="UPPER:::case"),
        "timeout": bash("slow", "sleep 300", timeout_seconds=3),
    }
    handles = {reason: client.submit(request) for reason, request in cases.items()}
    for reason, handle in handles.items():
        with pytest.raises(TaskFailed, match=reason):
            handle.get(timeout=150)
    views = {reason: handle.task_instance() for reason, handle in handles.items()}
    assert {reason: view.reason for reason, view in views.items()} == {reason: reason for reason in cases}
    assert views["non_zero_exit"].exit_code == 3
    assert "last words" in "\n".join(views["non_zero_exit"].log_tail)
    assert "node" in views["unschedulable"].message
    # What the infrastructure broke was started again, what the user or the configuration broke was not.
    relaunched = {reason for reason, view in views.items() if view.launch > 1}
    assert relaunched == {"unschedulable", "image_pull_failed"}
    wait_until(lambda: not module_namespace.pods(), 90, lambda: str(module_namespace.leftovers()), 0.5)


def test_a_pod_killed_for_the_memory_of_its_override_succeeds_with_more(client: Client) -> None:
    override = {"spec": {"containers": [{"name": "task", "resources": {"limits": {"memory": "160Mi"}}}]}}
    limit = {"limits": {"memory": "1Gi"}}
    handle = client.submit(bash("hungry", EAT, resources=limit, pod_override=override, oom_memory_factor=3))
    handle.get(timeout=200)
    view = handle.task_instance()
    assert (view.launch, view.try_number, view.oom_relaunches) == (2, 1, 1)
    (relaunch,) = [event for event in client.events(view.task_instance_id) if event.event == "relaunched"]
    assert (relaunch.details["reason"], relaunch.details["memory_limit"]) == ("oom_killed", "160Mi → 480Mi")


def test_a_deleted_pod_is_started_again_without_spending_a_try(
    client: Client, module_namespace: Namespace, witness: HttpTarget
) -> None:
    handle = client.submit(bash("deleted", call(witness.hold("deleted"))))
    first = when_running(handle, module_namespace, witness, "deleted")
    module_namespace.delete("pods", first.external_name)
    module_namespace.wait_for_no_pod(first.external_name)
    witness.release("deleted")
    handle.get(timeout=150)
    view = handle.task_instance()
    assert (view.launch, view.try_number, view.state.value) == (2, 1, "success")
    assert witness.calls["deleted"] == 2
    relaunches = [event for event in client.events(view.task_instance_id) if event.event == "relaunched"]
    assert [event.details["reason"] for event in relaunches] == ["pod_deleted"]


def cancel(system: KubernetesSystem, task_instance_id: str) -> None:
    """As people do it."""
    command = system.start(
        f"cancel-{task_instance_id}", sys.executable, "-m", "leoflow_celery.cli", "cancel", task_instance_id
    )
    assert command.wait(60) == 0


def test_cancel_deletes_a_running_pod_with_the_grace_of_its_request(
    system: KubernetesSystem, client: Client, module_namespace: Namespace, witness: HttpTarget
) -> None:
    """Its task ignores SIGTERM: it lives when the pod is deleted, and SQL expects it until it ends."""
    stubborn = f"trap '' TERM; {call(witness.hold('cancelled'))}"
    handle = client.submit(bash("cancelled", stubborn, execution={"termination_grace_seconds": 17}))
    view = when_running(handle, module_namespace, witness, "cancelled")
    cancel(system, view.task_instance_id)
    pod = module_namespace.wait_for_pod(view.external_name, lambda one: "deletionTimestamp" in one["metadata"], 10)
    assert pod["metadata"]["deletionGracePeriodSeconds"] == 17
    assert not handle.task_instance().is_terminal, "it was deleted because it was cancelled, and not after its end"
    with pytest.raises(TaskFailed, match="cancelled"):
        handle.get(timeout=60)
    module_namespace.wait_for_no_pod(view.external_name, 60)
    assert handle.task_instance().launch == 1


def test_cancel_deletes_a_pod_that_is_still_pending(
    system: KubernetesSystem, client: Client, module_namespace: Namespace
) -> None:
    """It has no agent that a heartbeat could tell, and is too young for a reconcile to delete it."""
    handle = client.submit(bash("parked", "true", execution={"node_selector": {"leoflow.io/nobody": "has-this"}}))
    wait_until(lambda: handle.task_instance().launched_at, 60, "the launch is reported")
    view = handle.task_instance()
    cancel(system, view.task_instance_id)
    module_namespace.wait_for_no_pod(view.external_name, 10)
    with pytest.raises(TaskFailed, match="cancelled"):
        handle.get(timeout=60)
    assert handle.task_instance().launch == 1


def test_ids_that_look_alike_or_are_very_long_stay_apart(
    client: Client, module_namespace: Namespace, witness: HttpTarget
) -> None:
    runs = ["Run 1", "run-1", "manual__2024-01-01T00:00:00+00:00", "r" * 300]
    handles = []
    for number, run_id in enumerate(runs):
        identity = f"{'x' * 280}-{number}-{secrets.token_hex(4)}"
        claim = {"staging_claim": staging_claim_name("acc", run_id), "staging_size": "1Mi"}
        command = f"test ! -e /staging/mine && touch /staging/mine && {call(witness.hold(f'run-{number}'))}"
        handles.append(client.submit(bash("same", command, run_id, task_instance_id=identity, **claim)))
    wait_until(lambda: len(witness.calls) == len(runs), 90, "each has a volume of its own and runs")
    pods = [pod_of(module_namespace, handle.task_instance().task_instance_id) for handle in handles]
    assert [pod["metadata"]["annotations"]["leoflow.io/run-id"] for pod in pods if pod] == runs
    assert len(module_namespace.items("persistentvolumeclaims")) >= len(runs)
    for number in range(len(runs)):
        witness.release(f"run-{number}")
    for handle in handles:
        handle.get(timeout=90)
