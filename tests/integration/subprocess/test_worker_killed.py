"""The process that holds the executor is killed -9: agents go on, the next executor settles what is left."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys

import psutil
import pytest

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.executors.subprocess import spawners
from leoflow_celery.executors.subprocess.directory import live_pid
from leoflow_celery.protocol import agent_pb2 as pb
from tests.integration.subprocess.conftest import ENVIRON, SECRETS, attempts
from tests.support.waiting import wait_until

WORKER = """
import sys
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.domain.request import parse_request
from leoflow_celery.executors.subprocess import SubprocessExecutor
from leoflow_celery.settings import SubprocessSettings
request = parse_request(sys.argv[1])
settings = SubprocessSettings(state_dir=sys.argv[2], preload_agent=sys.argv[3] == "forked")
executor = SubprocessExecutor(settings, secrets=sys.argv[4:])
print(executor.execute(LaunchSpec(request, request.attempt)).details["pid"], flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["forked", "executed"])
def killed_worker(request, plane, launch, tmp_path):
    """Run a task under a worker, kill the worker, return the agent."""

    def run(**environ: str) -> psutil.Process:
        given = [launch().request.model_dump_json(), str(tmp_path / "state"), request.param, *SECRETS]
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, *given],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **ENVIRON, **environ},
        )  # fmt: skip
        agent = psutil.Process(int(worker.stdout.readline()))
        wait_until(lambda: plane.text("stdout"))
        worker.kill()
        worker.communicate()
        return agent

    return run


def lock_is_free(tmp_path) -> bool:
    with (attempts(tmp_path)[0] / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def gate(tmp_path, then="true"):
    return pb.TaskSpec(
        operator="bash", entrypoint=f"echo ready; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; {then}"
    )


def test_the_agent_goes_on_and_reports_and_a_successor_cleans_up(
    plane, killed_worker, make_executor, launch, reports, tmp_path
):
    plane.spec = gate(tmp_path)
    agent = killed_worker()
    executor = make_executor()
    assert executor.execute(launch()).already is True
    (tmp_path / "go").touch()
    wait_until(plane.final)
    assert plane.final().request.state == pb.TASK_STATE_SUCCESS
    wait_until(lambda: not agent.is_running())
    wait_until(lambda: live_pid(attempts(tmp_path)[0]) is None)
    executor.sweep()
    assert attempts(tmp_path) == []
    assert reports == []


def test_an_outcome_nobody_could_report_is_reported_by_the_successor(
    plane, killed_worker, make_executor, reports, tmp_path
):
    plane.spec = gate(tmp_path, "echo 5 > $LEOFLOW_RETURN_VALUE_PATH")
    agent = killed_worker(LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS="1")
    plane.stop()
    (tmp_path / "go").touch()
    wait_until(lambda: not agent.is_running(), timeout=20)
    make_executor()
    wait_until(lambda: reports)
    assert (reports[0][1].state, reports[0][2]) == (TaskState.SUCCESS, "5")
    wait_until(lambda: attempts(tmp_path) == [])


def test_an_agent_killed_with_its_worker_is_lost_and_its_processes_are_ended(
    plane, killed_worker, make_executor, reports, tmp_path
):
    plane.spec = pb.TaskSpec(operator="bash", entrypoint="echo $$; sleep 300")
    agent = killed_worker()
    user = psutil.Process(int(plane.text("stdout")[0]))
    agent.kill()
    wait_until(lambda: lock_is_free(tmp_path), message="every thread of the agent is gone")
    make_executor()
    wait_until(lambda: reports)
    assert reports[0][1].reason is FailureReason.PROCESS_LOST
    wait_until(lambda: not user.is_running() or user.status() == psutil.STATUS_ZOMBIE)
    wait_until(lambda: attempts(tmp_path) == [])


def test_a_fork_server_that_dies_is_replaced_and_its_agents_are_still_watched(
    plane, make_executor, launch, reports, tmp_path, request
):
    if request.node.callspec.params["make_executor"] == "executed":
        pytest.skip("there is no fork server without preload_agent")
    plane.spec = gate(tmp_path)
    executor = make_executor()
    agent = psutil.Process(int(executor.execute(launch()).details["pid"]))
    wait_until(lambda: plane.text("stdout"))
    agent.parent().kill()
    assert executor.execute(launch("other")).already is False
    (tmp_path / "go").touch()
    wait_until(lambda: sum(r.state == pb.TASK_STATE_SUCCESS for r in plane.reports()) == 2)
    wait_until(lambda: attempts(tmp_path) == [])
    assert reports == []


def test_a_fork_server_is_replaced_before_anybody_noticed_that_it_died(
    plane, make_executor, launch, tmp_path, request, monkeypatch
):
    if request.node.callspec.params["make_executor"] == "executed":
        pytest.skip("there is no fork server without preload_agent")
    noticed, lost = set(), spawners._Server._lost

    def notice_late(server):
        if server not in noticed:
            noticed.add(server)
            server._reaper.call_later(1, lambda: lost(server))

    plane.spec = gate(tmp_path)
    executor = make_executor()
    agent = psutil.Process(int(executor.execute(launch()).details["pid"]))
    wait_until(lambda: plane.text("stdout"))
    monkeypatch.setattr(spawners._Server, "_lost", notice_late)
    agent.parent().kill()
    wait_until(lambda: noticed)
    assert executor.execute(launch("other")).already is False
    (tmp_path / "go").touch()
    wait_until(lambda: sum(r.state == pb.TASK_STATE_SUCCESS for r in plane.reports()) == 2)
    wait_until(lambda: attempts(tmp_path) == [])
