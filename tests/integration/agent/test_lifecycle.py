"""An attempt from claim to report, with real agents and a real gRPC server."""

from __future__ import annotations

import os
import shutil
import signal

import grpc
import psutil
import pytest

from leoflow_celery.protocol import agent_pb2 as pb
from tests.integration.agent.control_plane import Refusal
from tests.support.waiting import wait_until


def bash(command: str, **more):
    return pb.TaskSpec(operator="bash", entrypoint=command, **more)


def processes_with(marker: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if marker in process.environ().values():
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_success_is_claimed_run_logged_and_reported_in_order(plane, start_agent):
    plane.spec = bash("echo out; echo err >&2; printf unfinished", environment={"A": "b"})
    agent = start_agent()
    assert agent.wait() == 0
    names = [call.name for call in plane.calls]
    assert names[0] == "Register"
    assert names[-1] == "ReportState"
    assert [report.state for report in plane.reports()] == [pb.TASK_STATE_RUNNING, pb.TASK_STATE_SUCCESS]
    assert plane.text("stdout") == ["out", "unfinished"]
    assert plane.text("stderr") == ["err"]
    assert plane.text("agent")[0] == "task started"
    assert plane.text("agent")[-1].startswith("task succeeded in ")
    levels = {line.stream: line.level for line in plane.lines.values()}
    assert levels == {"agent": pb.LOG_LEVEL_INFO, "stdout": pb.LOG_LEVEL_INFO, "stderr": pb.LOG_LEVEL_ERROR}
    assert len({call.metadata["x-leoflow-session"] for call in plane.calls}) == 1
    assert all(call.metadata["authorization"] == "Bearer t0ken" for call in plane.calls)
    assert agent.termination() == {
        "attempt": "ti-1", "state": "success", "exit_code": 0, "reason": None, "message": "", "reported": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("command", "exit_code", "reason", "message"),
    [
        ("exit 3", 3, "non_zero_exit", "exit code 3"),
        ("kill -9 $$", 137, "non_zero_exit", "exit code 137 (killed by SIGKILL)"),
        ("no-such-command", 127, "non_zero_exit", "exit code 127"),
        ("echo http_status > $LEOFLOW_REASON_PATH; exit 1", 1, "http_status", "exit code 1"),
    ],
)
def test_a_failure_carries_its_exit_code_and_reason(plane, start_agent, command, exit_code, reason, message):
    plane.spec = bash(command)
    agent = start_agent()
    assert agent.wait() == 1
    final = plane.final()
    assert final.request.state == pb.TASK_STATE_FAILED
    assert (final.request.exit_code, final.request.error_message) == (exit_code, message)
    assert final.metadata["x-leoflow-reason"] == reason
    assert plane.text("agent")[-1].startswith("task failed in ")
    assert agent.termination()["reported"] is True


def test_an_interpreter_that_does_not_exist_is_command_not_found(plane, start_agent):
    plane.spec = pb.TaskSpec(operator="python", entrypoint="a:b")
    assert start_agent(LEOFLOW_PYTHON="/no/such/python").wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "command_not_found"
    assert plane.final().request.exit_code == 127


def test_an_unknown_operator_is_an_invalid_spec(plane, start_agent):
    plane.spec = pb.TaskSpec(operator="cobol")
    assert start_agent().wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "invalid_spec"
    assert "cobol" in plane.final().request.error_message


def test_a_variable_that_no_process_can_be_given_is_an_invalid_spec(plane, start_agent):
    plane.spec = bash("true", environment={"A=B": "c"})
    assert start_agent().wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "invalid_spec"
    assert "'A'" in plane.final().request.error_message


def test_a_request_that_the_gateway_cannot_open_is_an_invalid_spec(plane, start_agent):
    def refuse(call):
        raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "sealed with a key that LEOFLOW_SEAL_KEYS does not have")

    plane.script["GetTaskSpec"] = refuse
    assert start_agent().wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "invalid_spec"
    assert "LEOFLOW_SEAL_KEYS" in plane.final().request.error_message


def test_a_timeout_kills_a_child_that_ignores_sigterm_and_its_children(plane, start_agent):
    marker = "timeout-test-marker"
    plane.spec = bash(
        "trap '' TERM; sleep 300 & setsid sleep 300 & while true; do sleep 300; done",
        execution_timeout_seconds=1, environment={"MARK": marker},
    )  # fmt: skip
    agent = start_agent()
    assert agent.wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "timeout"
    assert plane.final().request.exit_code == 137
    assert processes_with(marker) == []


def test_sigterm_is_forwarded_and_never_ends_as_success(plane, start_agent):
    plane.spec = bash("trap 'echo cleaned up; exit 0' TERM; echo ready; while true; do sleep 0.05; done")
    agent = start_agent()
    wait_until(lambda: "ready" in plane.text("stdout"))
    agent.popen.send_signal(signal.SIGTERM)
    assert agent.wait() == 1
    assert plane.final().request.state == pb.TASK_STATE_FAILED
    assert plane.final().metadata["x-leoflow-reason"] == "interrupted"
    assert "cleaned up" in plane.text("stdout")


@pytest.mark.parametrize("name", ["SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGABRT", "SIGRTMIN"])
def test_every_signal_that_may_mean_stop_is_a_stop(plane, start_agent, name):
    plane.spec = bash("trap 'exit 0' TERM; echo ready; while true; do sleep 0.05; done")
    agent = start_agent()
    wait_until(lambda: "ready" in plane.text("stdout"))
    agent.popen.send_signal(signal.Signals[name])
    assert agent.wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "interrupted"
    assert plane.final().request.error_message == f"the agent received {name}"


def test_sigterm_of_a_cancelled_task_is_a_cancellation(plane, start_agent):
    plane.spec = bash("echo ready; sleep 300")
    agent = start_agent()
    wait_until(lambda: "ready" in plane.text("stdout"))
    plane.should_terminate = True
    agent.popen.send_signal(signal.SIGTERM)
    assert agent.wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "cancelled"


def test_an_interruption_left_to_the_executor_is_in_the_termination_log_only(plane, start_agent):
    plane.spec = bash("trap 'echo cleaned up; exit 0' TERM; echo ready; while true; do sleep 0.05; done")
    agent = start_agent(LEOFLOW_AGENT_LEAVE_INTERRUPTION="true")
    wait_until(lambda: "ready" in plane.text("stdout"))
    agent.popen.send_signal(signal.SIGTERM)
    assert agent.wait() == 143
    assert [report.state for report in plane.reports()] == [pb.TASK_STATE_RUNNING]
    left = agent.termination()
    assert (left["state"], left["reason"], left["reported"]) == ("failed", "interrupted", False)
    assert "cleaned up" in plane.text("stdout")
    assert plane.text("agent")[-1] == "task stopped: the agent received SIGTERM"


def test_a_cancellation_is_reported_whoever_interrupts(plane, start_agent):
    plane.spec = bash("echo ready; sleep 300")
    agent = start_agent(LEOFLOW_AGENT_LEAVE_INTERRUPTION="true")
    wait_until(lambda: "ready" in plane.text("stdout"))
    plane.should_terminate = True
    agent.popen.send_signal(signal.SIGTERM)
    assert agent.wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "cancelled"
    assert agent.termination()["reported"] is True


def test_a_task_that_names_an_interruption_itself_is_reported(plane, start_agent):
    plane.spec = bash("echo interrupted > $LEOFLOW_REASON_PATH; exit 1")
    assert start_agent(LEOFLOW_AGENT_LEAVE_INTERRUPTION="true").wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "interrupted"


def test_an_interruption_while_the_control_plane_is_away_ends_soon(plane, start_agent):
    plane.spec = bash("echo ready; sleep 300")
    agent = start_agent(LEOFLOW_AGENT_LEAVE_INTERRUPTION="true", LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS="3600")
    wait_until(lambda: "ready" in plane.text("stdout"))
    plane.stop()
    agent.popen.send_signal(signal.SIGTERM)
    assert agent.wait() == 143
    assert (agent.termination()["reason"], agent.termination()["reported"]) == ("interrupted", False)


def test_the_first_heartbeat_follows_the_claim_at_once(plane, start_agent):
    plane.spec = bash("echo ready; sleep 300")
    agent = start_agent(LEOFLOW_AGENT_HEARTBEAT_SECONDS="3600")
    wait_until(lambda: plane.count("Heartbeat") == 1)
    agent.popen.send_signal(signal.SIGTERM)
    agent.wait()


def test_echoed_lines_are_on_the_agents_own_output_too(plane, start_agent):
    plane.spec = bash("echo out; echo err >&2; printf unfinished")
    agent = start_agent(LEOFLOW_AGENT_ECHO="true")
    assert agent.wait() == 0
    assert sorted(agent.output.splitlines()) == ["err", "out", "unfinished"]
    assert plane.text("stdout") == ["out", "unfinished"]


def test_nothing_is_echoed_unless_asked_for(plane, start_agent):
    plane.spec = bash("echo out")
    agent = start_agent()
    assert agent.wait() == 0
    assert agent.output == ""


def test_an_output_that_nobody_reads_does_not_hold_the_task(plane, start_agent):
    plane.spec = bash("seq -f %0199g 10000")  # 2 MB: more than the pipe and our buffer hold
    agent = start_agent(LEOFLOW_AGENT_ECHO="true")
    assert agent.popen.wait(60) == 0
    agent.popen.stdout.close()
    assert len(plane.text("stdout")) == 10_000


def test_a_defect_of_the_agent_is_reported_as_its_loss(plane, start_agent, tmp_path):
    """The private directory is gone under the agent: nothing it expects."""
    plane.spec = bash("true")
    plane.spec.xcom_input_mapping["p"] = "big"
    plane.xcoms["big"] = b'"' + b"x" * 100_000 + b'"'

    def remove_directory(call):
        for path in (tmp_path / "tmp").glob("leoflow-agent-*"):
            shutil.rmtree(path)

    plane.script["FetchXCom"] = remove_directory
    agent = start_agent()
    assert agent.wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "agent_lost"
    assert "FileNotFoundError" in plane.final().request.error_message
    assert agent.termination()["reported"] is True


def test_a_directory_in_place_of_the_value_fails_the_task(plane, start_agent):
    plane.spec = bash("mkdir $LEOFLOW_RETURN_VALUE_PATH")
    assert start_agent().wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "invalid_xcom"
    assert "return_value.json cannot be read: " in plane.final().request.error_message


def test_a_defect_after_the_process_ended_is_not_the_loss_of_the_agent(plane, start_agent):
    plane.spec = bash("true")
    defect = "from leoflow_celery.agent.run import TaskRun\ndef fail(*_): raise RuntimeError('a defect')\n"
    assert start_agent(f"{defect}TaskRun.return_value = fail").wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "invalid_xcom"
    assert plane.final().request.error_message == "exit code 0; then the agent failed: RuntimeError: a defect"


def test_a_wrong_flag_is_named(plane, start_agent):
    agent = start_agent(LEOFLOW_AGENT_ECHO="maybe")
    assert agent.wait() == 1
    assert "LEOFLOW_AGENT_ECHO='maybe' must be true or false" in agent.output


def test_should_terminate_in_a_heartbeat_stops_the_task(plane, start_agent):
    plane.spec = bash("echo ready; sleep 300")
    agent = start_agent(LEOFLOW_AGENT_HEARTBEAT_SECONDS="0.2")
    wait_until(lambda: "ready" in plane.text("stdout"))
    plane.should_terminate = True
    assert agent.wait() == 1
    assert plane.final().metadata["x-leoflow-reason"] == "cancelled"


def test_an_aborted_log_stream_leads_to_a_heartbeat_at_once(plane, start_agent):
    plane.spec = bash("echo ready; sleep 300")
    agent = start_agent(LEOFLOW_AGENT_HEARTBEAT_SECONDS="3600")
    wait_until(lambda: "ready" in plane.text("stdout"))
    plane.should_terminate = True
    plane.abort_streams()
    assert agent.wait() == 1
    assert plane.count("Heartbeat") >= 1
    assert plane.final().metadata["x-leoflow-reason"] == "cancelled"


def test_should_terminate_in_the_answer_to_running_prevents_the_start(plane, start_agent, tmp_path):
    plane.spec = bash(f"touch {tmp_path}/ran")
    plane.script["ReportState"] = lambda call: pb.ReportStateResponse(acknowledged=True, should_terminate=True)
    assert start_agent().wait() == 1
    assert not (tmp_path / "ran").exists()


def test_a_refused_claim_runs_nothing_and_exits_0(plane, start_agent, tmp_path):
    plane.spec = bash(f"touch {tmp_path}/ran")
    plane.holder = "somebody else"
    agent = start_agent()
    assert agent.wait() == 0
    assert not (tmp_path / "ran").exists()
    assert [call.name for call in plane.calls] == ["Register"]
    assert len(agent.output.splitlines()) == 1
    assert "held" in agent.output
    assert (agent.termination()["state"], agent.termination()["reported"]) == ("none", True)


def test_a_second_agent_of_a_live_attempt_is_refused(plane, start_agent):
    plane.spec = bash("echo ready; sleep 300")
    first = start_agent()
    wait_until(lambda: "ready" in plane.text("stdout"))
    second = start_agent(LEOFLOW_TERMINATION_LOG="", TMPDIR="/tmp")
    second.popen.communicate(timeout=20)
    assert second.popen.returncode == 0
    first.popen.send_signal(signal.SIGTERM)
    first.wait()


def test_a_bad_token_exits_1_and_runs_nothing(plane, start_agent):
    def refuse(call):
        raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "token expired")

    plane.script["Register"] = refuse
    agent = start_agent()
    assert agent.wait() == 1
    assert plane.count("GetTaskSpec") == 0
    assert agent.termination()["reason"] == "forbidden"


def test_a_missing_variable_of_the_environment_is_named(plane, start_agent):
    agent = start_agent(LEOFLOW_AGENT_TOKEN="")
    assert agent.wait() == 1
    assert "LEOFLOW_AGENT_TOKEN is not set" in agent.output


def test_a_process_that_daemonises_with_the_pipe_open_does_not_hang_the_agent(plane, start_agent):
    marker = "daemon-test-marker"
    plane.spec = bash("setsid sleep 300 & echo done", environment={"MARK": marker})
    assert start_agent().wait(timeout=20) == 0
    assert plane.text("stdout") == ["done"]
    assert processes_with(marker) == []


def test_the_token_is_not_in_the_user_environment_and_a_canary_not_in_the_agents_log(plane, start_agent):
    plane.spec = bash("env", environment={"SECRET": "canary-7f3a"})
    agent = start_agent()
    assert agent.wait() == 0
    printed = "\n".join(plane.text("stdout"))
    assert "t0ken" not in printed
    assert "canary-7f3a" in printed
    assert "canary-7f3a" not in agent.output + "".join(plane.text("agent"))


def test_a_foreign_control_plane_without_our_extras_works(plane, start_agent):
    def unimplemented(call):
        raise Refusal(grpc.StatusCode.UNIMPLEMENTED, "no such method")

    plane.spec = bash("echo hi")
    plane.script.update(GetVariables=unimplemented, GetConnections=unimplemented)
    assert start_agent().wait() == 0
    assert not any("going on without" in line for line in plane.text("agent"))


def test_a_task_that_uses_what_is_withheld_hears_why(plane, start_agent):
    def refused(call):
        raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "not on plain text")

    plane.spec = bash("echo $AIRFLOW_VAR_REGION")
    plane.script.update(GetVariables=refused, GetConnections=refused)
    assert start_agent().wait() == 0
    assert any("not on plain text" in line for line in plane.text("agent"))


def test_the_agent_imports_nothing_heavy():
    import subprocess
    import sys

    check = (
        "import sys, leoflow_celery.agent.__main__, leoflow_celery.agent.forkserver\n"
        "print([m for m in ('pydantic','sqlalchemy','requests','celery','kubernetes','docker') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=dict(os.environ))
    assert found.stdout.strip() == "[]", found.stderr
