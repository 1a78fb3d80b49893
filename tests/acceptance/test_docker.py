"""The docker queue as a whole: real worker, control worker, gateway, beat and Engine."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from leoflow_celery.client import Client
from leoflow_celery.domain.states import RunState, TaskState
from tests.support.docker_system import DockerSystem, failure_of, wait_until_running
from tests.support.engine import TestEngine, engine_of_tests
from tests.support.host import host_address
from tests.support.http_target import HttpTarget
from tests.support.images import base_image
from tests.support.kubernetes_system import call
from tests.support.redis_server import RedisServer
from tests.support.waiting import wait_until

OUTAGE_SECONDS = 10
#: An agent that gives up reporting soon, so that its container ends while the gateway is away.
IMPATIENT = {"LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS": "2"}


@pytest.fixture(scope="module")
def engine() -> Iterator[TestEngine]:
    with engine_of_tests() as found:
        yield found


@pytest.fixture(scope="module")
def deployed(
    tmp_path_factory: pytest.TempPathFactory, shared_redis: RedisServer, engine: TestEngine
) -> Iterator[DockerSystem]:
    directory = tmp_path_factory.mktemp("docker")
    with DockerSystem(directory, shared_redis.url(), engine, BROKER_VISIBILITY_TIMEOUT_SECONDS=10) as system:
        system.start_all()
        yield system


@pytest.fixture
def system(deployed: DockerSystem) -> Iterator[DockerSystem]:
    deployed.shown_on_failure()
    yield deployed
    deployed.nothing_is_left()


@pytest.fixture
def client(system: DockerSystem) -> Client:
    return system.client


@pytest.fixture
def witness(deployed: DockerSystem) -> Iterator[HttpTarget]:
    """Counts the starts of user code, and holds them until the test lets them go on."""
    with HttpTarget(host_address()) as target:
        yield target


def test_the_tasks_of_a_run_share_a_volume_that_goes_with_its_success(
    system: DockerSystem, client: Client, engine: TestEngine
) -> None:
    run_id = secrets.token_hex(4)
    claim = f"leoflow-staging-d-{run_id}"
    client.create_run("d", run_id)
    system.submit_bash("writes", "echo shared > /staging/file", run_id, staging_claim=claim).get(timeout=180)
    reader = system.submit_bash("reads", "grep shared /staging/file", run_id, staging_claim=claim)
    reader.get(timeout=180)
    [volume] = [one for one in client.services.store.staging.list_active() if one.claim_name == claim]
    assert volume.backend == reader.task_instance().back_end
    assert claim in engine.volumes(system.name)

    client.finish_run("d", run_id, RunState.SUCCESS)
    wait_until(lambda: claim not in engine.volumes(system.name), 120, "the volume to go")

    def reason() -> str | None:
        deleted = client.services.store.staging.list_deleted()
        return next((one.reason for one in deleted if one.claim_name == claim), None)

    assert wait_until(reason, 60, "the record") == "run_succeeded"


def test_a_cancelled_task_stops_at_once(system: DockerSystem, engine: TestEngine) -> None:
    handle = system.submit_bash("long", "sleep 600")
    name = wait_until_running(handle)
    assert handle.cancel()
    assert failure_of(handle).reason == "cancelled"
    wait_until(lambda: engine.status(name) != "running", 60, lambda: engine.story(name))
    assert handle.task_instance().launch == 1


def test_a_container_that_somebody_removed_is_started_again(system: DockerSystem, engine: TestEngine) -> None:
    handle = system.submit_bash("removed", "sleep 5")
    engine.api.remove_container(wait_until_running(handle), force=True)
    handle.get(timeout=180)
    view = handle.task_instance()
    assert (view.launch, view.try_number, view.state) == (2, 1, TaskState.SUCCESS)
    assert system.relaunch_of(handle)["reason"] == "container_lost"


def test_a_container_that_somebody_killed_is_started_again(system: DockerSystem, engine: TestEngine) -> None:
    handle = system.submit_bash("killed", "sleep 5")
    engine.api.kill(wait_until_running(handle))
    handle.get(timeout=180)
    assert (handle.task_instance().launch, handle.task_instance().try_number) == (2, 1)
    assert system.relaunch_of(handle)["reason"] == "container_lost"


def test_a_task_killed_for_its_memory_succeeds_with_more(system: DockerSystem) -> None:
    eats = "python3 -c 'data = bytearray(150 * 1024 * 1024); print(len(data))'"
    handle = system.submit_bash("hungry", eats, resources={"limits": {"memory": "128Mi"}}, oom_memory_factor=3)
    handle.get(timeout=240)
    view = handle.task_instance()
    assert (view.launch, view.oom_relaunches) == (2, 1)
    relaunched = system.relaunch_of(handle)
    assert (relaunched["reason"], relaunched["memory_limit"]) == ("oom_killed", "128Mi → 384Mi")


def test_the_users_own_failures_are_final_and_say_why(system: DockerSystem) -> None:
    exits = system.submit_bash("exits", "echo last words; exit 3")
    sleeps = system.submit_bash("sleeps", "sleep 600", timeout_seconds=1)
    failed = failure_of(exits)
    assert (failed.reason, failed.exit_code) == ("non_zero_exit", 3)
    assert any("last words" in line for line in exits.task_instance().log_tail)
    assert failure_of(sleeps).reason == "timeout"
    assert (exits.task_instance().launch, sleeps.task_instance().launch) == (1, 1)


def test_an_image_that_nobody_has_is_named(system: DockerSystem) -> None:
    failed = failure_of(system.submit_bash("imageless", "true", image="nobody-has:this"), 180)
    assert failed.reason == "image_pull_failed"
    assert "nobody-has:this" in failed.message


def test_a_worker_killed_between_the_container_and_its_acknowledgement_leaves_one_that_runs_once(
    system: DockerSystem, engine: TestEngine, witness: HttpTarget
) -> None:
    worker = system.process("workers.docker")
    system.engine_proxy.hold_answers(after=b"/containers/create")
    try:
        handle = system.submit_bash("half", call(witness.url("half")))
        made = wait_until(lambda: _container_of(engine, system, handle.attempt.task_instance_id), 60, "a container")
        worker.kill()
    finally:
        system.engine_proxy.pass_answers()
    assert engine.status(made) == "created"
    system.restart("workers.docker")
    handle.get(timeout=150)
    assert witness.calls["half"] == 1
    view = handle.task_instance()
    assert (view.launch, view.external_name) == (1, made)


def _container_of(engine: TestEngine, system: DockerSystem, task_instance_id: str) -> str | None:
    label = "leoflow.io/task-instance-id"
    found = (one for one in engine.containers(system.name) if one["Labels"][label] == task_instance_id)
    return next((str(one["Names"][0]).removeprefix("/") for one in found), None)


def test_a_success_is_a_success_although_the_gateway_was_away_at_the_end(
    system: DockerSystem, witness: HttpTarget
) -> None:
    command = f'{call(witness.hold("away"))} && echo 42 >"$LEOFLOW_RETURN_VALUE_PATH"'
    handle = system.submit_bash("away", command, env=IMPATIENT)
    wait_until(lambda: witness.calls["away"] == 1, 60, "user code runs")
    system.process("gateway").kill()
    witness.release("away")
    assert handle.get(timeout=150) == 42
    system.restart("gateway").wait_for_line("gateway listening on")
    view = handle.task_instance()
    assert (view.state.value, view.launch, witness.calls["away"]) == ("success", 1, 1)


def test_tasks_survive_an_engine_that_does_not_answer_for_a_while(system: DockerSystem, witness: HttpTarget) -> None:
    running = system.submit_bash("before", call(witness.hold("before")))
    wait_until(lambda: witness.calls["before"] == 1, 60, "user code runs")
    system.engine_proxy.stop()
    waiting = system.submit_bash("during", call(witness.url("during")))
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > OUTAGE_SECONDS, OUTAGE_SECONDS + 5)
    assert not waiting.task_instance().is_terminal
    system.engine_proxy.resume()
    witness.release("before")
    for handle in (running, waiting):
        handle.get(timeout=150)
        assert handle.task_instance().launch == 1
    assert witness.calls["before"] == witness.calls["during"] == 1


def test_images_that_cannot_work_are_tried_once(system: DockerSystem, engine: TestEngine) -> None:
    cases = (
        ("invalid_image", 'ENTRYPOINT ["true"]', b""),
        ("invalid_image", 'ENTRYPOINT ["/program"]', b"of another machine"),
        ("command_not_found", 'ENTRYPOINT ["/program"]', b"#!/no/such/shell\n"),
        ("invalid_image", "USER nosuch", b""),
    )
    with ExitStack() as images:
        tried = []
        for reason, line, program in cases:
            image = images.enter_context(engine.image(base_image(), line, program=program))
            tried.append((reason, system.submit_bash("cannot-work", "true", image=image)))
        for reason, handle in tried:
            failed = failure_of(handle, timeout=180)
            assert (failed.reason, handle.task_instance().launch) == (reason, 1)
            assert failed.message.startswith("image: ")
        system.nothing_is_left()


def test_a_full_host_leaves_messages_in_the_queue(
    tmp_path: Path, shared_redis: RedisServer, engine: TestEngine
) -> None:
    with DockerSystem(tmp_path, shared_redis.url(), engine, DOCKER_MAX_RUNNING=2) as limited:
        limited.start_all()
        handles = [limited.submit_bash(f"t{number}", "sleep 3") for number in range(6)]
        most = 0

        def done() -> bool:
            nonlocal most
            most = max(most, sum(one["State"] in ("created", "running") for one in engine.containers(limited.name)))
            return all(one.state() is TaskState.SUCCESS for one in handles)

        wait_until(done, 180, lambda: str([one.state() for one in handles]), interval=0.1)
        assert most == 2
        assert {one.task_instance().launch for one in handles} == {1}
