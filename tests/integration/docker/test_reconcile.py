"""Containers that end in every way, and what reconcile makes of them on the real Engine."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from leoflow_celery.domain.reasons import CLASS_OF, FailureClass, FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.termination import TerminationRecord, encode
from tests.integration.docker.conftest import bash, wait_for_output
from tests.support.engine import now
from tests.support.images import base_image, task_image
from tests.support.waiting import wait_until

SLEEPER = ("sleep", "1000")


def test_out_of_memory(engine, docker_system, executor):
    launch = docker_system.launch()
    limits = {"Memory": 32 << 20, "MemorySwap": 32 << 20}
    docker_system.run_plain(launch, "python3", "-c", "print('eating'); x = bytearray(200 << 20)", **limits)
    engine.wait(launch.name)
    executor.reconcile(docker_system.expectation(launch))
    outcome = docker_system.outcome()
    assert (outcome.reason, outcome.exit_code) == (FailureReason.OOM_KILLED, 137)
    assert "its limit of 32Mi" in outcome.message


@pytest.mark.parametrize(
    ("claimed", "reason"), [(False, FailureReason.NON_ZERO_EXIT), (True, FailureReason.CONTAINER_LOST)]
)
def test_exit_3_with_its_last_50_lines(engine, docker_system, executor, claimed, reason):
    """Whose exit code is it? Where an agent had the claim, the agent's."""
    launch = docker_system.launch()
    docker_system.run_plain(launch, "sh", "-c", "for i in $(seq 80); do echo line $i; done; exit 3")
    engine.wait(launch.name)
    done = executor.reconcile(docker_system.expectation(launch, claimed=claimed))
    outcome = docker_system.outcome()
    assert done.reported == 1
    assert (outcome.reason, outcome.exit_code) == (reason, 3)
    assert outcome.log_tail == tuple(f"line {number}" for number in range(31, 81))


def test_docker_kill_of_an_agent(plane, engine, docker_system, executor):
    plane.spec = bash("echo ready; sleep 1000")
    launch = docker_system.agent_launch(plane)
    executor.execute(launch)
    wait_for_output(plane, "ready")
    engine.api.kill(launch.name)
    engine.wait(launch.name)
    executor.reconcile(docker_system.expectation(launch))
    outcome = docker_system.outcome()
    assert (outcome.reason, outcome.exit_code) == (FailureReason.CONTAINER_LOST, 137)
    assert "exit code 137, SIGKILL" in outcome.message
    assert "ready" in outcome.log_tail


def test_docker_stop_of_an_agent(plane, engine, docker_system, executor):
    plane.spec = bash("echo ready; sleep 1000")
    launch = docker_system.agent_launch(plane)
    executor.execute(launch)
    wait_for_output(plane, "ready")
    engine.api.stop(launch.name, timeout=60)
    assert engine.state(launch.name)["ExitCode"] == 143
    executor.reconcile(docker_system.expectation(launch))
    assert docker_system.outcome().reason == FailureReason.INTERRUPTED
    assert plane.final() is None


@pytest.mark.parametrize("stop_signal", ["SIGQUIT", "SIGUSR1"])
def test_docker_stop_of_an_image_with_a_stop_signal_of_its_own(plane, engine, docker_system, executor, stop_signal):
    plane.spec = bash("trap 'exit 0' TERM; echo ready; while true; do sleep 0.05; done")
    with engine.image(task_image(), f"STOPSIGNAL {stop_signal}") as image:
        launch = docker_system.agent_launch(plane, image=image)
        executor.execute(launch)
        wait_for_output(plane, "ready")
        engine.api.stop(launch.name, timeout=60)
        assert engine.state(launch.name)["ExitCode"] == 143
        executor.reconcile(docker_system.expectation(launch))
        assert docker_system.outcome().reason == FailureReason.INTERRUPTED
        assert "SIGTERM" in docker_system.outcome().message
        engine.api.remove_container(launch.name, force=True, v=True)


def test_a_child_killed_for_memory_does_not_explain_a_later_kill(plane, engine, docker_system, executor):
    plane.spec = bash("python3 -c 'x = bytearray(600 << 20)' || echo outlived; sleep 1000")
    launch = docker_system.agent_launch(plane, resources={"limits": {"memory": "160Mi"}})
    executor.execute(launch)
    wait_for_output(plane, "outlived")
    engine.api.kill(launch.name)
    assert engine.wait(launch.name)["OOMKilled"] is True
    executor.reconcile(docker_system.expectation(launch))
    outcome = docker_system.outcome()
    assert (outcome.reason, outcome.exit_code) == (FailureReason.CONTAINER_LOST, 137)


def test_docker_rm_in_mid_task(engine, docker_system, executor):
    launch = docker_system.launch()
    docker_system.run_plain(launch, *SLEEPER)
    engine.api.remove_container(launch.name, force=True, v=True)
    executor.reconcile(docker_system.expectation(launch, host="another-host"))
    assert docker_system.reports == []
    executor.reconcile(docker_system.expectation(launch, host=executor.host))
    assert docker_system.outcome().reason == FailureReason.CONTAINER_LOST
    assert executor.host in docker_system.outcome().message


def test_a_success_is_recovered_when_the_gateway_was_away_at_the_end(plane, engine, docker_system, executor):
    plane.spec = bash(
        "echo ready; until [ -e /staging/go ]; do sleep 0.1; done; echo '[1, 2]' > $LEOFLOW_RETURN_VALUE_PATH"
    )
    claim = f"{docker_system.system}-staging"
    env = {"LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS": "1"}
    launch = docker_system.agent_launch(plane, staging_claim=claim, env=env)
    executor.execute(launch)
    wait_for_output(plane, "ready")
    plane.stop()
    assert engine.run(launch.name, "touch", "/staging/go") == 0
    engine.wait(launch.name)
    executor.reconcile(docker_system.expectation(launch))
    [(attempt, outcome, value)] = docker_system.reports
    assert (attempt, outcome.state, value) == (launch.attempt, TaskState.SUCCESS, "[1, 2]")


@pytest.mark.parametrize(
    ("attempt", "claimed", "reason"),
    [("", False, FailureReason.INVALID_IMAGE), ("of another", True, FailureReason.CONTAINER_LOST)],
)
def test_a_record_of_success_is_believed_of_an_agent_with_the_claim(
    engine, docker_system, executor, attempt, claimed, reason
):
    """Any image can write one."""
    launch = docker_system.launch()
    left = encode(TerminationRecord(attempt or launch.attempt.task_instance_id, TaskState.SUCCESS, 0)).decode()
    docker_system.run_plain(launch, "sh", "-c", f"echo '{left}' > /run/leoflow/attempt/termination-log")
    engine.wait(launch.name)
    before = executor.reconcile(docker_system.expectation(launch, claimed=False, read_at=now() - 60))
    assert (before.reported, docker_system.reports) == (0, [])
    executor.reconcile(docker_system.expectation(launch, claimed=claimed))
    assert docker_system.outcome().reason == reason


def test_what_the_agent_reported_is_not_reported_again(plane, engine, docker_system, executor):
    plane.spec = bash("exit 3")
    launch = docker_system.agent_launch(plane)
    executor.execute(launch)
    engine.wait(launch.name)
    assert plane.final().request.exit_code == 3
    executor.reconcile(docker_system.expectation(launch))
    assert docker_system.reports == []


def test_the_deadline_is_a_timeout_also_when_the_agent_cannot_act(engine, docker_system):
    executor = docker_system.executor(deadline_allowance_seconds=0, termination_grace_seconds=1)
    launch = docker_system.launch(timeout_seconds=1)
    labels = {"leoflow.io/deadline-seconds": "1"}
    docker_system.run_plain(launch, *SLEEPER, labels=labels)

    def ended() -> bool:
        executor.reconcile(docker_system.expectation(launch))
        return bool(docker_system.reports)

    wait_until(ended, 120, interval=0.5)
    outcome = docker_system.outcome()
    assert (outcome.reason, outcome.exit_code) == (FailureReason.TIMEOUT, 137)
    assert "deadline of 1 s" in outcome.message


def test_an_image_without_an_agent_is_not_waited_for(engine, docker_system, executor):
    launch = docker_system.launch()
    executor.execute(launch)
    engine.wait(launch.name)
    executor.reconcile(docker_system.expectation(launch, claimed=False))
    outcome = docker_system.outcome()
    assert (outcome.reason, outcome.exit_code) == (FailureReason.INVALID_IMAGE, 0)
    assert "is leoflow-agent the image's entrypoint?" in outcome.message


def test_a_foreign_agent_that_had_claimed_is_no_image_without_one(engine, docker_system, executor):
    launch = docker_system.launch()
    executor.execute(launch)
    engine.wait(launch.name)
    executor.reconcile(docker_system.expectation(launch, claimed=True))
    assert docker_system.outcome().reason == FailureReason.CONTAINER_LOST


@pytest.mark.parametrize(
    ("program", "reason", "words"),
    [
        (b"\x7fELF of another machine", FailureReason.INVALID_IMAGE, "exec format error"),
        (b"no script at all", FailureReason.INVALID_IMAGE, "exec format error"),
        (b"#!/no/such/interpreter\n", FailureReason.COMMAND_NOT_FOUND, "no such file or directory"),
    ],
)
def test_a_program_that_the_kernel_refuses_is_final(engine, docker_system, executor, program, reason, words):
    with engine.image(base_image(), 'ENTRYPOINT ["/program"]', program=program) as image:
        launch = docker_system.launch(image=image)
        executor.execute(launch)
        engine.wait(launch.name)
        executor.reconcile(docker_system.expectation(launch, claimed=False))
        outcome = docker_system.outcome()
        assert (outcome.reason, CLASS_OF[outcome.reason]) == (reason, FailureClass.CONFIG)
        assert words in outcome.message
        engine.api.remove_container(launch.name, force=True, v=True)


# -- what nobody expects --------------------------------------------------------------------------------------------


def test_running_containers_of_unknown_attempts_are_stopped_and_removed_after_the_grace(engine, docker_system):
    executor = docker_system.executor(finished_grace_seconds=0, termination_grace_seconds=1)
    docker_system.run_plain(docker_system.launch("orphan"), *SLEEPER)
    expected = docker_system.launch("expected")
    docker_system.run_plain(expected, *SLEEPER)

    def only_one_left() -> bool:
        executor.reconcile(docker_system.expectation(expected))
        return len(engine.containers(docker_system.system)) == 1

    wait_until(only_one_left, 120, interval=0.5)
    assert engine.status(expected.name) == "running"
    assert docker_system.reports == []


def test_nothing_is_concluded_about_what_came_after_the_snapshot(engine, docker_system):
    import time

    executor = docker_system.executor(finished_grace_seconds=0)
    young, ended = docker_system.launch("young"), docker_system.launch("ended")
    docker_system.run_plain(young, *SLEEPER)
    docker_system.run_plain(ended, "true")
    engine.wait(ended.name)
    executor.reconcile(docker_system.expectation(read_at=time.time()))
    assert (engine.status(young.name), engine.status(ended.name)) == ("running", "exited")


def test_ended_containers_stay_for_the_grace(engine, docker_system):
    launch = docker_system.launch()
    docker_system.run_plain(launch, "true")
    engine.wait(launch.name)
    docker_system.executor(finished_grace_seconds=600).reconcile(docker_system.expectation())
    assert engine.status(launch.name) == "exited"
    docker_system.executor(finished_grace_seconds=0).reconcile(docker_system.expectation())
    assert engine.status(launch.name) == "gone"


def test_a_container_that_was_never_started_and_is_not_expected_goes(engine, docker_system, executor):
    labels = {"leoflow.io/system": docker_system.system, "leoflow.io/executor": "docker"}
    launch = docker_system.launch()
    engine.api.create_container_from_config({"Image": launch.request.image, "Labels": labels}, launch.name)
    executor.reconcile(docker_system.expectation(launch))
    assert engine.status(launch.name) == "created"
    executor.reconcile(docker_system.expectation())
    assert engine.status(launch.name) == "gone"


def test_another_systems_containers_are_left_alone(engine, docker_system):
    launch = docker_system.launch()
    docker_system.run_plain(launch, *SLEEPER)
    other = docker_system.executor(system="another", finished_grace_seconds=0)
    other.reconcile(docker_system.expectation())
    assert engine.status(launch.name) == "running"


# -- cancel ---------------------------------------------------------------------------------------------------------


def test_cancel_stops_gently_and_returns_at_once(plane, engine, docker_system, executor):
    plane.spec = bash("trap 'echo bye; exit 0' TERM; echo ready; while true; do sleep 0.05; done")
    launch = docker_system.agent_launch(plane)
    executor.execute(launch)
    wait_for_output(plane, "ready")
    executor.cancel(launch.name, grace_seconds=60)
    assert engine.wait(launch.name)["ExitCode"] == 143
    assert "bye" in plane.text("stdout")


def test_cancel_kills_what_does_not_listen_after_the_grace_although_nobody_waits(engine, docker_system):
    launch = docker_system.launch()
    docker_system.run_plain(launch, *SLEEPER)
    executor = docker_system.executor()
    executor.cancel(launch.name, grace_seconds=4)
    executor.close()
    assert engine.status(launch.name) == "running"
    assert engine.wait(launch.name)["ExitCode"] == 137


@pytest.mark.parametrize("grace", [0, 10])
def test_cancel_of_what_is_gone_or_ended_is_fine(engine, docker_system, executor, grace):
    launch = docker_system.launch()
    executor.cancel(launch.name, grace)
    docker_system.run_plain(launch, "true")
    engine.wait(launch.name)
    executor.cancel(launch.name, grace)


def test_a_worker_whose_clock_is_wrong_judges_by_the_engines(engine, docker_system, monkeypatch):
    """An hour ahead, everything is past its deadline; SQL's times are moved to the Engine's clock as well."""
    executor = docker_system.executor(deadline_allowance_seconds=0, termination_grace_seconds=1)
    live, fresh = docker_system.launch("live"), docker_system.launch("fresh")
    for launch in (live, fresh):
        docker_system.run_plain(launch, *SLEEPER, labels={"leoflow.io/deadline-seconds": "600"})
    wrong = time.time() + 3_600
    monkeypatch.setattr("leoflow_celery.clock.time.time", lambda: wrong)
    # SQL, whose clock is two hours ahead of the Engine's, was read before the other one came into being.
    read = docker_system.expectation(live, read_at=wrong + 3_600)
    executor.reconcile(replace(read, age_seconds=5.0))
    assert [engine.state(one.name)["Running"] for one in (live, fresh)] == [True, True]
    assert docker_system.reports == []
    executor.reconcile(replace(read, age_seconds=-3_600.0))
    wait_until(lambda: not engine.state(fresh.name)["Running"], 60)
    assert engine.state(live.name)["Running"]
