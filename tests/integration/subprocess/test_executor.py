"""Real agents started by the executor, forked and executed."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import HostFull, PermanentLaunchError
from leoflow_celery.protocol import agent_pb2 as pb
from tests.integration.subprocess.conftest import attempts
from tests.support.waiting import wait_until


def bash(command, **more):
    return pb.TaskSpec(operator="bash", entrypoint=command, **more)


def test_it_returns_when_started_and_the_agent_reports(plane, make_executor, launch, reports, tmp_path):
    plane.spec = bash("echo ready; read -t 30 < <(sleep 0.2); echo done")
    launched = make_executor().execute(launch())
    assert launched.already is False
    assert launched.external_name == launch().name
    assert plane.final() is None
    wait_until(plane.final)
    assert plane.final().request.state == pb.TASK_STATE_SUCCESS
    wait_until(lambda: attempts(tmp_path) == [])
    assert reports == []


def test_a_second_delivery_while_it_lives_starts_nothing(plane, make_executor, launch):
    plane.spec = bash("sleep 60")
    executor = make_executor()
    executor.execute(launch())
    assert executor.execute(launch()).already is True
    wait_until(lambda: plane.count("ReportState"))
    assert plane.count("Register") == 1


def test_another_workers_executor_sees_that_it_lives(plane, make_executor, launch):
    plane.spec = bash("sleep 60")
    make_executor().execute(launch())
    assert make_executor().execute(launch()).already is True


def test_two_launches_of_one_try_are_two_attempts(plane, make_executor, launch):
    plane.spec = bash("true")
    executor = make_executor()
    assert executor.execute(launch()).already is False
    assert executor.execute(launch(launch=2)).already is False
    wait_until(lambda: plane.count("Register") == 2)


def test_a_reported_failure_is_not_reported_again(plane, make_executor, launch, reports, tmp_path):
    plane.spec = bash("exit 3")
    make_executor().execute(launch())
    wait_until(plane.final)
    wait_until(lambda: attempts(tmp_path) == [])
    assert reports == []


def test_an_agent_that_is_killed_becomes_a_failure_at_once_and_leaves_nothing(
    plane, make_executor, launch, reports, tmp_path
):
    plane.spec = bash("echo $$; setsid sleep 300 & sleep 300")
    launched = make_executor().execute(launch())
    user = int(wait_until(lambda: plane.text("stdout"))[0])
    os.kill(int(launched.details["pid"]), signal.SIGKILL)
    wait_until(lambda: reports)
    attempt, outcome, _ = reports[0]
    assert attempt == launch().attempt
    assert (outcome.state, outcome.reason) == (TaskState.FAILED, FailureReason.PROCESS_LOST)
    assert "killed by SIGKILL" in outcome.message
    wait_until(lambda: attempts(tmp_path) == [])
    wait_until(lambda: not psutil.pid_exists(user) or psutil.Process(user).status() == psutil.STATUS_ZOMBIE)


def test_a_success_that_could_not_be_reported_is_reported_by_us_with_its_value(
    plane, make_executor, launch, reports, tmp_path
):
    plane.spec = bash(
        f"echo ready; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; echo '[1, 2]' > $LEOFLOW_RETURN_VALUE_PATH"
    )
    make_executor({"LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS": "1"}).execute(launch())
    wait_until(lambda: plane.text("stdout"))
    plane.stop()
    (tmp_path / "go").touch()
    wait_until(lambda: reports, timeout=20)
    _, outcome, value = reports[0]
    assert outcome.state is TaskState.SUCCESS
    assert value == "[1, 2]"
    wait_until(lambda: attempts(tmp_path) == [])


def test_a_refused_claim_is_no_failure(plane, make_executor, launch, reports, tmp_path):
    del plane.script["Register"]
    plane.holder = "another"
    make_executor().execute(launch())
    wait_until(lambda: plane.count("Register"))
    wait_until(lambda: attempts(tmp_path) == [])
    assert reports == []


def test_source_is_importable_and_gone_afterwards(plane, make_executor, launch, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "dag.py").write_text("def f():\n    return 'the wrong one'\n")
    plane.spec = pb.TaskSpec(operator="python", entrypoint="dag:f")
    executor = make_executor(work_dir=str(tmp_path / "work"))
    executor.execute(launch(operator="python", entrypoint="dag:f", source="def f():\n    return 'from source'\n"))
    wait_until(plane.final)
    assert [push.value for push in plane.pushed] == [b'"from source"']
    wait_until(lambda: attempts(tmp_path) == [])


def test_work_dir_is_where_the_task_runs(plane, make_executor, launch, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "dag.py").write_text("import os\ndef f():\n    return os.getcwd()\n")
    plane.spec = pb.TaskSpec(operator="python", entrypoint="dag:f")
    make_executor(work_dir=str(tmp_path / "work")).execute(launch(operator="python", entrypoint="dag:f"))
    wait_until(plane.final)
    assert plane.pushed[0].value.decode().strip('"') == str(tmp_path / "work")


def test_the_dags_own_interpreter_is_used(plane, make_executor, launch, tmp_path):
    python = tmp_path / "venvs" / "d" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho chosen $*\n")
    python.chmod(0o755)
    plane.spec = pb.TaskSpec(operator="python", entrypoint="dag:f")
    make_executor(venvs_root=str(tmp_path / "venvs")).execute(launch(operator="python", entrypoint="dag:f"))
    wait_until(plane.final)
    assert plane.text("stdout") == ["chosen -m leoflow_runtime dag:f"]


def test_no_secret_of_the_worker_reaches_the_agent_or_the_disk(plane, make_executor, launch, tmp_path):
    plane.spec = bash("env; cat /proc/$PPID/environ | tr '\\0' '\\n'; sleep 60")
    make_executor().execute(launch())
    wait_until(lambda: len(plane.text("stdout")) > 5)
    assert "canary" not in "\n".join(plane.text("stdout"))
    for path in (tmp_path / "state").rglob("*"):
        assert not path.is_file() or b"t0ken" not in path.read_bytes()


def test_staging_is_shared_by_the_tasks_of_a_run(plane, make_executor, launch):
    executor = make_executor()
    plane.spec = bash("echo data > $LEOFLOW_STAGING_DIR/file")
    executor.execute(launch("a", staging_claim="leoflow-staging-d-r"))
    wait_until(plane.final)
    plane.calls.clear()
    plane.spec = bash("cat $LEOFLOW_STAGING_DIR/file")
    executor.execute(launch("b", staging_claim="leoflow-staging-d-r"))
    wait_until(plane.final)
    assert plane.text("stdout") == ["data"]


def test_cancel_stops_with_grace_and_then_kills(plane, make_executor, launch, tmp_path):
    plane.spec = bash("trap '' TERM; echo $$; while true; do sleep 1; done")
    executor = make_executor({"LEOFLOW_AGENT_KILL_GRACE_SECONDS": "600"})
    launched = executor.execute(launch())
    user = int(wait_until(lambda: plane.text("stdout"))[0])
    executor.cancel(launch().name, grace_seconds=0.5)
    wait_until(lambda: attempts(tmp_path) == [])
    assert not psutil.pid_exists(int(launched.details["pid"]))
    wait_until(lambda: not psutil.pid_exists(user) or psutil.Process(user).status() == psutil.STATUS_ZOMBIE)


def test_cancel_of_an_unknown_attempt_is_fine(make_executor, launch):
    make_executor().cancel("unknown", 1)


def test_a_working_directory_that_does_not_exist_is_permanent(make_executor, launch, tmp_path):
    with pytest.raises(PermanentLaunchError, match="/no/such/dir") as caught:
        make_executor(work_dir="/no/such/dir").execute(launch())
    assert caught.value.reason == FailureReason.COMMAND_NOT_FOUND
    assert attempts(tmp_path) == []


def test_an_agent_that_does_not_exist_is_permanent(make_executor, launch, tmp_path):
    with pytest.raises(PermanentLaunchError, match="/no/such/agent") as caught:
        make_executor(agent_path="/no/such/agent").execute(launch())
    assert caught.value.reason == FailureReason.COMMAND_NOT_FOUND
    assert attempts(tmp_path) == []


def test_a_foreign_agent_that_fails_without_a_report_is_a_failure(make_executor, launch, reports, tmp_path):
    agent = tmp_path / "agent"
    agent.write_text("#!/bin/sh\necho cannot go on >&2\nexit 7\n")
    agent.chmod(0o755)
    make_executor(agent_path=str(agent)).execute(launch())
    wait_until(lambda: reports)
    assert reports[0][1].reason is FailureReason.PROCESS_LOST
    assert "exit code 7" in reports[0][1].message
    assert reports[0][1].log_tail == ("cannot go on",)


def test_many_at_once(plane, make_executor, launch, reports, tmp_path):
    plane.spec = bash("true")
    executor = make_executor()
    for number in range(30):
        executor.execute(launch(f"t{number}"))
    wait_until(lambda: sum(r.state == pb.TASK_STATE_SUCCESS for r in plane.reports()) == 30, timeout=60)
    wait_until(lambda: attempts(tmp_path) == [])
    assert reports == []


def test_beyond_its_limit_a_host_starts_nothing_and_knows_what_runs(plane, make_executor, launch, tmp_path):
    plane.spec = pb.TaskSpec(operator="bash", entrypoint=f"until [ -e {tmp_path}/go ]; do sleep 0.02; done")
    executor = make_executor(max_running=2)
    assert executor.room() == 2
    with ThreadPoolExecutor(6) as pool:
        tried = [pool.submit(executor.execute, launch(f"t{number}")) for number in range(6)]
        refused = [one.exception() for one in tried if one.exception() is not None]
    assert [type(error) for error in refused] == [HostFull] * 4
    assert "LEOFLOW_SUBPROCESS_MAX_RUNNING" in str(refused[0])
    running = [number for number, one in enumerate(tried) if one.exception() is None]
    assert all(executor.execute(launch(f"t{number}")).already for number in running)
    assert executor.room() == 0
    (tmp_path / "go").touch()
    wait_until(lambda: executor.room() == 2)
