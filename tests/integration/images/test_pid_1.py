"""What PID 1 of a container owes its processes, and what it says when the container is stopped or out of memory."""

from __future__ import annotations

import pytest

from leoflow_celery.protocol import agent_pb2 as pb
from tests.integration.images.conftest import HARDENED
from tests.support.waiting import wait_until

LEAVING = {"LEOFLOW_AGENT_LEAVE_INTERRUPTION": "true"}
EAT = "python3 -c 'x = bytearray(600 << 20)'"
MEMORY = {"mem_limit": "160m", "memswap_limit": "160m"}


def bash(command: str, **more) -> pb.TaskSpec:
    return pb.TaskSpec(operator="bash", entrypoint=command, **more)


def ready(plane):
    wait_until(lambda: "ready" in plane.text("stdout"), 60)


def test_orphans_that_end_are_reaped_while_the_task_runs(plane, start_task):
    """A zombie keeps its /proc entry: the task goes on only when the orphan's is gone."""
    plane.spec = bash(
        "orphan=$(sh -c 'sleep 0.2 >/dev/null 2>&1 & echo $!'); "
        "grep PPid /proc/$orphan/status; while [ -d /proc/$orphan ]; do sleep 0.02; done; echo reaped $$"
    )
    task = start_task()
    assert task.wait() == 0, task.logs()
    assert plane.text("stdout")[0] == "PPid:\t1"
    assert plane.text("stdout")[1].startswith("reaped ")


def test_what_outlives_the_task_is_killed_and_does_not_keep_the_container(plane, start_task):
    plane.spec = bash("setsid sleep 3000 & setsid sh -c 'trap \"\" TERM; sleep 3000' & echo done")
    task = start_task()
    assert task.wait() == 0, task.logs()
    assert plane.final().request.state == pb.TASK_STATE_SUCCESS


@pytest.mark.parametrize("name", ["SIGQUIT", "SIGUSR1", "SIGHUP", "SIGWINCH", "SIGRTMIN+3"])
def test_whatever_signal_stops_the_container_is_a_stop(plane, start_task, name):
    """As an image's STOPSIGNAL has it: the task is told with SIGTERM, and never ends as success."""
    plane.spec = bash("trap 'echo cleaned up; exit 0' TERM; echo ready; while true; do sleep 0.05; done")
    task = start_task(env=LEAVING, stop_signal=name)
    ready(plane)
    task.container.stop(timeout=60)
    assert task.wait() == 143
    left = task.termination()
    assert (left["state"], left["reason"], left["reported"]) == ("failed", "interrupted", False)
    assert left["message"] == f"the agent received {name}"
    assert "cleaned up" in plane.text("stdout")


def test_docker_stop_ends_the_task_cleanly_and_leaves_the_reason_to_the_executor(plane, start_task):
    plane.spec = bash("trap 'echo cleaned up; exit 0' TERM; echo ready; while true; do sleep 0.05; done")
    task = start_task(env=LEAVING)
    ready(plane)
    task.container.stop(timeout=60)
    assert task.wait() == 143
    left = task.termination()
    assert (left["state"], left["reason"], left["reported"]) == ("failed", "interrupted", False)
    assert "cleaned up" in plane.text("stdout")
    assert [report.state for report in plane.reports()] == [pb.TASK_STATE_RUNNING]


def test_docker_stop_of_a_cancelled_task_is_a_cancellation(plane, start_task):
    plane.spec = bash("echo ready; sleep 3000")
    task = start_task(env=LEAVING)
    ready(plane)
    plane.should_terminate = True
    task.container.stop(timeout=60)
    assert task.wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "cancelled"


def test_a_task_that_ignores_the_stop_is_killed_after_the_grace(plane, start_task):
    plane.spec = bash("trap '' TERM; echo ready; while true; do sleep 0.05; done")
    task = start_task(env={**LEAVING, "LEOFLOW_AGENT_KILL_GRACE_SECONDS": "0.5"})
    ready(plane)
    task.container.stop(timeout=60)
    assert task.wait() == 143
    assert task.termination()["exit_code"] == 137


@pytest.mark.parametrize("command", [EAT, f"{EAT}; exit $?", f"bash -c '{EAT.replace(chr(39), chr(34))}; exit $?'"])
def test_out_of_memory_kills_the_task_and_the_agent_says_so(plane, start_task, command):
    plane.spec = bash(command)
    task = start_task(**MEMORY)
    assert task.wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "oom_killed"
    assert plane.final().request.exit_code == 137
    assert "out of memory" in plane.final().request.error_message


def test_a_kill_long_after_one_that_the_task_outlived_is_not_out_of_memory(plane, start_task):
    plane.spec = bash(f"{EAT} || echo outlived; sleep 4; kill -9 $$")
    task = start_task(**MEMORY)
    assert task.wait() == 1
    assert "outlived" in plane.text("stdout")
    assert plane.final().metadata["x-leoflow-reason"] == "non_zero_exit"
    assert plane.final().request.exit_code == 137


def test_a_kill_with_memory_to_spare_is_not_out_of_memory(plane, start_task):
    plane.spec = bash("kill -9 $$")
    task = start_task(**MEMORY, **HARDENED)
    assert task.wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "non_zero_exit"
