"""The docker queue as a whole: real worker, control worker, gateway, beat and Engine."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from leoflow_celery.client import Client, Handle
from leoflow_celery.domain.states import RunState, TaskState
from leoflow_celery.errors import TaskFailed
from tests.support.engine import TestEngine, engine_of_tests
from tests.support.host import host_address
from tests.support.images import task_image
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.system import System
from tests.support.waiting import wait_until

#: For people to look at ended containers: none here, so that what is left over is a mistake.
OVERRIDES = {
    "EXECUTOR_TYPE": "docker",
    "DOCKER_FINISHED_GRACE_SECONDS": 0,
    "DOCKER_TERMINATION_GRACE_SECONDS": 5,
    "MAINTENANCE_INTERVAL_SECONDS": 2,
    "MAINTENANCE_STAGING_INTERVAL_SECONDS": 2,
    "MAINTENANCE_RELAUNCH_BACKOFF_SECONDS": 0.1,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[TestEngine]:
    with engine_of_tests() as found:
        yield found


@pytest.fixture(scope="module")
def deployed(
    tmp_path_factory: pytest.TempPathFactory, shared_redis: RedisServer, engine: TestEngine
) -> Iterator[System]:
    image = task_image()
    address = f"{host_address()}:{free_port(host_address())}"
    name = f"test-{secrets.token_hex(4)}"
    places = {"GATEWAY_LISTEN": address, "CONTROL_PLANE_ADDR": address, "DOCKER_SYSTEM": name}
    with System(tmp_path_factory.mktemp("docker"), shared_redis.url(), **OVERRIDES, **places) as system:
        system.env["LEOFLOW_TEST_IMAGE"] = image
        system.start_gateway()
        system.start_workers("workers.docker", "workers.control")
        system.start_beat()
        yield system
        wait_until(lambda: not engine.containers(name), 120, "containers to be removed by the reconcile")
    engine.remove_all(name)


@pytest.fixture
def system(deployed: System) -> System:
    deployed.shown_on_failure()
    return deployed


@pytest.fixture
def client(system: System) -> Client:
    return system.client


def submit(system: System, name: str, command: str, run_id: str = "", **fields: Any) -> Handle:
    identity = f"{name}-{secrets.token_hex(4)}"
    request = {
        "task_instance_id": identity,
        "dag_id": "d",
        "run_id": run_id or identity,
        "task_id": name,
        "operator": "bash",
        "entrypoint": command,
        "image": system.env["LEOFLOW_TEST_IMAGE"],
        "image_pull_policy": "Never",
        **fields,
    }
    return system.client.submit(request)


def wait_until_running(handle: Handle) -> str:
    """The container's name, once user code runs in it."""
    wait_until(lambda: handle.state() is TaskState.RUNNING, 120, lambda: str(handle.task_instance()))
    return handle.task_instance().external_name


def test_the_tasks_of_a_run_share_a_volume_that_goes_with_its_success(
    system: System, client: Client, engine: TestEngine
) -> None:
    run_id = secrets.token_hex(4)
    claim = f"leoflow-staging-d-{run_id}"
    client.create_run("d", run_id)
    submit(system, "writes", "echo shared > /staging/file", run_id, staging_claim=claim).get(timeout=180)
    reader = submit(system, "reads", "grep shared /staging/file", run_id, staging_claim=claim)
    reader.get(timeout=180)
    [volume] = [one for one in client.runtime.store.staging.list_active() if one.claim_name == claim]
    assert volume.backend == reader.task_instance().back_end
    assert claim in engine.volumes(system.settings.docker.system)

    client.finish_run("d", run_id, RunState.SUCCESS)
    wait_until(lambda: claim not in engine.volumes(system.settings.docker.system), 120, "the volume to go")

    def reason() -> str | None:
        deleted = client.runtime.store.staging.list_deleted()
        return next((one.reason for one in deleted if one.claim_name == claim), None)

    assert wait_until(reason, 60, "the record") == "run_succeeded"


def test_a_cancelled_task_stops_at_once(system: System, engine: TestEngine) -> None:
    handle = submit(system, "long", "sleep 600")
    name = wait_until_running(handle)
    assert handle.cancel()
    with pytest.raises(TaskFailed) as caught:
        handle.get(timeout=60)
    assert caught.value.reason == "cancelled"
    wait_until(lambda: engine.status(name) != "running", 60, lambda: engine.story(name))
    assert handle.task_instance().launch == 1


def test_a_container_that_somebody_removed_is_started_again(system: System, engine: TestEngine) -> None:
    handle = submit(system, "removed", "sleep 5")
    name = wait_until_running(handle)
    engine.api.remove_container(name, force=True)
    handle.get(timeout=180)
    view = handle.task_instance()
    assert (view.launch, view.try_number, view.state) == (2, 1, TaskState.SUCCESS)
    [relaunched] = [one for one in system.client.events(view.task_instance_id) if one.event == "relaunched"]
    assert relaunched.details["reason"] == "container_lost"


def test_a_task_killed_for_its_memory_succeeds_with_more(system: System) -> None:
    eats = "python3 -c 'data = bytearray(150 * 1024 * 1024); print(len(data))'"
    handle = submit(system, "hungry", eats, resources={"limits": {"memory": "128Mi"}}, oom_memory_factor=3)
    handle.get(timeout=240)
    view = handle.task_instance()
    assert (view.launch, view.oom_relaunches) == (2, 1)
    [relaunched] = [one for one in system.client.events(view.task_instance_id) if one.event == "relaunched"]
    assert (relaunched.details["reason"], relaunched.details["memory_limit"]) == ("oom_killed", "128Mi → 384Mi")
