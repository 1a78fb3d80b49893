"""Tasks that hide from whoever looks for them: setproctitle, PR_SET_DUMPABLE 0, ``env -i setsid``."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.executors.subprocess import executor as subprocess_executor
from leoflow_celery.protocol import agent_pb2 as pb
from tests.integration.subprocess.conftest import attempts
from tests.integration.subprocess.test_worker_killed import killed_worker, lock_is_free
from tests.support.waiting import wait_until

__all__ = ["killed_worker"]

#: Each leaves its process id in a file.
HIDERS = {
    "undumpable": 'exec python3 -c "import ctypes, os, time; ctypes.CDLL(None).prctl(4, 0); '
    "open('{pids}', 'a').write(f'{{os.getpid()}}\\n'); print('ready', flush=True); time.sleep(300)\"",
    "titled": "exec python3 -c \"import ctypes, os, time; ctypes.CDLL(None).prctl(15, b'other'); "
    "open('{pids}', 'a').write(f'{{os.getpid()}}\\n'); print('ready', flush=True); time.sleep(300)\"",
    "detached": 'env -i setsid bash -c \'setsid env -i bash -c "echo \\$\\$ >>{pids}; exec sleep 300" '
    ">/dev/null 2>&1 &' >/dev/null 2>&1; while [ ! -s {pids} ]; do sleep 0.02; done; echo ready; sleep 300",
}


@pytest.fixture(params=HIDERS)
def hiding(request, plane, tmp_path) -> Path:
    pids = tmp_path / "pids"
    plane.spec = pb.TaskSpec(operator="bash", entrypoint=HIDERS[request.param].format(pids=pids))
    return pids


def alive(pids: Path) -> list[int]:
    found = [int(text) for text in pids.read_text().split() if psutil.pid_exists(int(text))]
    return [pid for pid in found if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_what_hides_ends_with_its_agent(plane, make_executor, launch, reports, hiding, tmp_path):
    launched = make_executor().execute(launch())
    wait_until(lambda: "ready" in plane.text("stdout"))
    os.kill(int(launched.details["pid"]), signal.SIGKILL)
    wait_until(lambda: reports)
    assert reports[0][1].reason is FailureReason.PROCESS_LOST
    assert alive(hiding) == []
    wait_until(lambda: attempts(tmp_path) == [])


def test_the_next_launch_starts_when_what_hides_is_gone(plane, killed_worker, make_executor, launch, hiding, tmp_path):
    """The worker, the fork server and the agent are killed; the task lives on. Then the next launch comes."""
    agent = killed_worker()
    parent = agent.parent()
    if parent is not None and "forkserver" in " ".join(parent.cmdline()):
        parent.kill()
        wait_until(lambda: not parent.is_running() or parent.status() == psutil.STATUS_ZOMBIE)
    agent.kill()
    wait_until(lambda: not agent.is_running() or agent.status() == psutil.STATUS_ZOMBIE)
    wait_until(lambda: lock_is_free(tmp_path), message="every thread of the agent is gone")
    before = alive(hiding)
    assert before
    plane.spec = pb.TaskSpec(operator="bash", entrypoint="true")
    make_executor().execute(launch(launch=2))
    assert not set(before) & set(alive(hiding))
    wait_until(lambda: attempts(tmp_path) == [])


def test_another_system_with_the_same_ids_is_left_alone(plane, make_executor, launch, reports, tmp_path):
    """Two systems on a host, each with a state directory of its own; ids are unique within a system only."""
    plane.spec = pb.TaskSpec(operator="bash", entrypoint="echo $$; sleep 300")
    theirs = make_executor(state_dir=str(tmp_path / "state"))
    agent = psutil.Process(int(theirs.execute(launch()).details["pid"]))
    wait_until(lambda: plane.text("stdout"))
    user = psutil.Process(int(plane.text("stdout")[0]))
    plane.spec = pb.TaskSpec(operator="bash", entrypoint="true")
    ours = make_executor(state_dir=str(tmp_path / "ours"))
    assert ours.execute(launch()).already is False
    wait_until(lambda: list((tmp_path / "ours" / "attempts").iterdir()) == [])
    ours.execute(launch(launch=2))
    wait_until(lambda: list((tmp_path / "ours" / "attempts").iterdir()) == [])
    assert all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in (agent, user))
    assert reports == []


def test_a_task_that_rewrites_whose_it_is_changes_nobody_elses_attempt(plane, make_executor, launch, reports, tmp_path):
    other = json.dumps(AttemptId("victim").to_json())
    done = json.dumps({"attempt": "victim", "state": "success", "exit_code": 0})
    directory = tmp_path / "state" / "attempts" / launch().name
    plane.spec = pb.TaskSpec(
        operator="bash",
        entrypoint=f"echo '{other}' >{directory}/attempt.json; echo '{done}' >{directory}/termination.json; "
        "kill -9 $PPID; sleep 300",
    )
    make_executor().execute(launch())
    wait_until(lambda: reports)
    assert {attempt.task_instance_id for attempt, _, _ in reports} == {"ti-t"}


def forged(name: str, task_instance_id: str, path: Path) -> str:
    """Bash that says of an attempt that it succeeded, and kills its agent (all of one user may)."""
    done = json.dumps({"attempt": task_instance_id, "state": "success", "exit_code": 0, "return_value": "1"})
    directory = path / "state" / "attempts" / name
    return f"echo '{done}' >{directory}/termination.json; kill -9 $(cat {directory}/pid)"


@pytest.mark.parametrize("whose", ["own", "anothers"])
def test_nobody_says_of_an_attempt_that_it_succeeded_but_its_agent(
    plane, make_executor, launch, reports, tmp_path, whose
):
    executor, victim = make_executor(), launch("victim")
    if whose == "anothers":
        plane.spec = pb.TaskSpec(operator="bash", entrypoint="echo ready; sleep 300")
        executor.execute(victim)
        wait_until(lambda: "ready" in plane.text("stdout"))
    forger = launch("forger") if whose == "anothers" else victim
    plane.spec = pb.TaskSpec(operator="bash", entrypoint=f"{forged(victim.name, 'ti-victim', tmp_path)}; sleep 300")
    executor.execute(forger)
    wait_until(lambda: reports)
    [(attempt, outcome, value)] = reports
    assert attempt == victim.attempt
    assert (outcome.state, outcome.reason, value) == (TaskState.FAILED, FailureReason.PROCESS_LOST, None)


def test_nor_when_nobody_saw_the_end(plane, killed_worker, make_executor, launch, reports, tmp_path):
    """Agent and worker die, and the successor has nothing but what is in the directory."""
    go = tmp_path / "go"
    plane.spec = pb.TaskSpec(
        operator="bash",
        entrypoint=f"echo ready; while [ ! -e {go} ]; do sleep 0.02; done; "
        f"{forged(launch().name, 'ti-t', tmp_path)}; sleep 300",
    )
    agent = killed_worker()
    go.touch()
    wait_until(lambda: not agent.is_running() or agent.status() == psutil.STATUS_ZOMBIE)
    wait_until(lambda: lock_is_free(tmp_path))
    make_executor()
    wait_until(lambda: attempts(tmp_path) == [])
    assert reports == []


def test_an_agent_that_does_not_look_at_the_time_is_stopped(make_executor, launch, reports, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess_executor, "_TIMEOUT_ALLOWANCE_SECONDS", 0)
    agent = tmp_path / "agent"
    agent.write_text("#!/bin/sh\nexec sleep 300\n")
    agent.chmod(0o755)
    spec = launch(timeout_seconds=1, execution={"termination_grace_seconds": 0})
    make_executor(agent_path=str(agent)).execute(spec)
    wait_until(lambda: reports)
    assert (reports[0][1].state, reports[0][1].reason) == (TaskState.FAILED, FailureReason.TIMEOUT)
