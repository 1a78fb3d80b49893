"""Nothing is lost while the control plane is slow, away or restarted."""

from __future__ import annotations

import json
import signal

import grpc
import psutil
import pytest

from leoflow_celery.protocol import agent_pb2 as pb
from tests.integration.agent.control_plane import Refusal
from tests.support.waiting import wait_until


def test_a_restart_in_the_middle_loses_no_line_and_no_report(plane, start_agent, tmp_path):
    plane.spec = pb.TaskSpec(
        operator="bash",
        entrypoint=f"for i in $(seq 200); do echo a$i; done; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; "
        "for i in $(seq 200); do echo b$i; done; echo 7 > $LEOFLOW_RETURN_VALUE_PATH",
    )
    agent = start_agent()
    wait_until(lambda: "a200" in plane.text("stdout"))
    plane.stop()
    (tmp_path / "go").touch()
    wait_until(lambda: agent.log.exists() and agent.termination()["state"] == "success")
    assert agent.termination()["reported"] is False
    assert agent.termination()["return_value"] == "7"
    plane.start()
    assert agent.wait() == 0
    assert plane.text("stdout") == [f"a{i}" for i in range(1, 201)] + [f"b{i}" for i in range(1, 201)]
    assert sorted(plane.lines) == list(range(1, len(plane.lines) + 1))
    assert all(len(versions) == 1 for versions in plane.line_versions.values()), "a line sent again is the same line"
    assert plane.final().request.state == pb.TASK_STATE_SUCCESS
    assert plane.pushed[-1].value == b"7"
    assert agent.termination()["reported"] is True
    assert "return_value" not in agent.termination()


def test_a_control_plane_that_comes_up_late_is_waited_for(plane, start_agent):
    plane.spec = pb.TaskSpec(operator="bash", entrypoint="true")
    plane.stop()
    agent = start_agent()
    wait_until(lambda: psutil.Process(agent.popen.pid).num_threads() > 1)
    plane.start()
    assert agent.wait() == 0


def test_one_that_never_comes_up_leaves_the_reason_in_the_termination_log(plane, start_agent):
    plane.stop()
    agent = start_agent(LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS="1")
    assert agent.wait() == 1
    assert (agent.termination()["state"], agent.termination()["reason"]) == ("failed", "launch_failed")


def until(path, then=":"):
    """Shell text: say ready, wait for a file, go on."""
    return f"echo ready; while [ ! -e {path} ]; do sleep 0.02; done; {then}"


def end_while_away(plane, start_agent, gate, command):
    """Run a command with the control plane gone for good before it ends."""
    plane.spec = pb.TaskSpec(operator="bash", entrypoint=until(gate, command))
    agent = start_agent(LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS="1")
    wait_until(lambda: "ready" in plane.text("stdout"))
    plane.stop()
    gate.touch()
    assert agent.wait() == 1
    return agent


def test_one_that_never_comes_back_leaves_the_outcome_there(plane, start_agent, tmp_path):
    write = "echo '{\"rows\": 3}' > $LEOFLOW_RETURN_VALUE_PATH"
    left = end_while_away(plane, start_agent, tmp_path / "go", write).termination()
    assert (left["state"], left["reported"]) == ("success", False)
    assert json.loads(left["return_value"]) == {"rows": 3}


def test_a_value_that_cannot_be_kept_is_not_called_a_success(plane, start_agent, tmp_path):
    # What can be compressed would be kept.
    write = "(printf '\"'; head -c 15000 /dev/urandom | base64 -w 0; printf '\"') > $LEOFLOW_RETURN_VALUE_PATH"
    agent = end_while_away(plane, start_agent, tmp_path / "go", write)
    assert (agent.termination()["state"], agent.termination()["reason"]) == ("failed", "agent_lost")
    assert agent.log.stat().st_size <= 4096


def test_200_000_lines_while_away_are_all_delivered_in_little_memory(plane, start_agent, tmp_path):
    plane.spec = pb.TaskSpec(
        operator="bash",
        entrypoint=until(tmp_path / "go", f"seq 200000; touch {tmp_path}/written"),
    )
    agent = start_agent(LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS="120")
    wait_until(lambda: "ready" in plane.text("stdout"))
    process = psutil.Process(agent.popen.pid)
    before = process.memory_info().rss
    plane.stop()
    (tmp_path / "go").touch()
    wait_until(lambda: (tmp_path / "written").exists(), timeout=60)
    plane.start()
    wait_until(lambda: len(plane.lines) > 100_000, timeout=100)
    assert process.memory_info().rss - before < 30 * 1024 * 1024
    assert agent.wait(timeout=100) == 0
    assert plane.text("stdout")[1:] == [str(i) for i in range(1, 200_001)]


def test_beyond_the_spool_lines_are_dropped_and_counted(plane, start_agent, tmp_path):
    plane.spec = pb.TaskSpec(
        operator="bash",
        entrypoint=until(tmp_path / "go", f"sleep 6; seq 20000; touch {tmp_path}/written"),
    )
    agent = start_agent(LEOFLOW_AGENT_SPOOL_BYTES="100000")
    wait_until(lambda: "ready" in plane.text("stdout"))
    plane.stop()
    (tmp_path / "go").touch()
    wait_until(lambda: (tmp_path / "written").exists(), timeout=60)
    plane.start()
    assert agent.wait() == 0
    notices = [line for line in plane.text("agent") if "log lines were dropped" in line]
    dropped = sum(int(notice.split()[0]) for notice in notices)
    frame_lost = 0 if plane.text("agent")[-1].startswith("task succeeded") else 1
    assert notices
    assert dropped + len(plane.text("stdout")) == 20_001 + frame_lost


def test_a_slow_control_plane_slows_the_task_and_drops_nothing(plane, start_agent):
    plane.spec = pb.TaskSpec(operator="bash", entrypoint="seq 60000")
    agent = start_agent(LEOFLOW_AGENT_SPOOL_BYTES="1600000")
    assert agent.wait(timeout=60) == 0
    assert plane.text("stdout") == [str(i) for i in range(1, 60_001)]


def test_one_line_of_10_mb_and_binary_bytes_arrive(plane, start_agent):
    plane.spec = pb.TaskSpec(
        operator="bash", entrypoint="head -c 10000000 /dev/zero | tr '\\0' x; echo; printf 'a\\0b\\377\\xc3\\xa9\\n'"
    )
    agent = start_agent()
    assert agent.wait() == 0
    *pieces, last = plane.text("stdout")
    assert "".join(pieces) == "x" * 10_000_000
    assert max(map(len, pieces)) == 16_384
    assert last == "a\0b\ufffdé"


def test_an_internal_error_of_the_server_is_tried_again(plane, start_agent):
    answers = iter([Refusal(grpc.StatusCode.INTERNAL, "boom"), Refusal(grpc.StatusCode.UNAVAILABLE, "away")])

    def fail_twice(call):
        if call.request.state == pb.TASK_STATE_SUCCESS and (refusal := next(answers, None)):
            raise refusal

    plane.spec = pb.TaskSpec(operator="bash", entrypoint="true")
    plane.script["ReportState"] = fail_twice
    assert start_agent().wait() == 0
    assert [r.state for r in plane.reports()].count(pb.TASK_STATE_SUCCESS) == 3


def test_lines_are_delivered_before_the_final_report(plane, start_agent):
    seen = []
    plane.spec = pb.TaskSpec(operator="bash", entrypoint="seq 5000")
    plane.script["ReportState"] = lambda call: seen.append(len(plane.lines))
    assert start_agent().wait() == 0
    assert seen[-1] == len(plane.lines) == 5002


def test_a_log_stream_that_is_refused_does_not_stop_the_task(plane, start_agent):
    def refuse(call):
        raise Refusal(grpc.StatusCode.UNIMPLEMENTED, "no logs here")

    plane.spec = pb.TaskSpec(operator="bash", entrypoint="echo hi")
    plane.script["StreamLogs"] = refuse
    assert start_agent().wait() == 0
    assert plane.final().request.state == pb.TASK_STATE_SUCCESS


def refuse_for_now(call):
    raise Refusal(grpc.StatusCode.UNAVAILABLE, "the log cannot be written: No space left on device")


def test_a_log_that_nobody_writes_does_not_hold_the_end_of_a_task(plane, start_agent):
    plane.spec = pb.TaskSpec(operator="bash", entrypoint="echo hi")
    plane.script["StreamLogs"] = refuse_for_now
    agent = start_agent(LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS="600")
    assert agent.wait() == 0
    assert plane.final().request.state == pb.TASK_STATE_SUCCESS
    assert "not all log lines could be delivered" in agent.output


@pytest.mark.parametrize("held", ["StreamLogs", "PushXCom"])
def test_sigterm_while_the_outcome_waits_ends_the_wait_soon(plane, start_agent, held):
    """The other calls are refused as well: a control plane that answers them is not waited for anyway."""
    plane.spec = pb.TaskSpec(operator="bash", entrypoint="echo 7 > $LEOFLOW_RETURN_VALUE_PATH")
    plane.script[held] = plane.script["Heartbeat"] = refuse_for_now
    agent = start_agent(LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS="600")
    wait_until(lambda: agent.log.exists() and agent.termination()["state"] == "success")
    wait_until(lambda: plane.count(held) > 2)
    agent.popen.send_signal(signal.SIGTERM)
    assert agent.wait() == (0 if held == "StreamLogs" else 1)
    assert agent.termination()["state"] == "success"
    assert agent.termination()["reported"] is (held == "StreamLogs")


def test_a_cancellation_while_the_lines_wait_ends_the_wait_soon(plane, start_agent):
    plane.spec = pb.TaskSpec(operator="bash", entrypoint="echo hi")
    plane.ack_logs = False
    agent = start_agent(LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS="600", LEOFLOW_AGENT_HEARTBEAT_SECONDS="0.2")
    wait_until(lambda: agent.log.exists() and agent.termination()["state"] == "success")
    plane.should_terminate = True
    assert agent.wait() == 0


NO_SPACE = """
import os
def full(*_):
    raise OSError(28, "No space left on device")
os.pwrite = full
"""


def test_a_full_disk_ends_the_task_and_keeps_its_lines(plane, start_agent):
    plane.spec = pb.TaskSpec(operator="bash", entrypoint="for i in $(seq 50); do echo a$i; done")
    assert start_agent(defect=NO_SPACE).wait() == 0
    assert plane.text("stdout") == [f"a{i}" for i in range(1, 51)]


def test_a_full_disk_beyond_memory_drops_lines_and_has_an_end(plane, start_agent):
    """Nothing fits, not even the line that says so: streams that carry nothing are paused, and given up."""
    plane.spec = pb.TaskSpec(operator="bash", entrypoint="echo lost")
    defect = NO_SPACE + "from leoflow_celery.agent import logs\nlogs._MAX_MEMORY_BYTES = 1\n"
    agent = start_agent(defect=defect, LEOFLOW_AGENT_REPORT_DEADLINE_SECONDS="4")
    assert agent.wait() == 0
    assert plane.final().request.state == pb.TASK_STATE_SUCCESS
    assert plane.count("StreamLogs") < 50


def test_a_progress_bar_and_a_prompt_are_seen_while_the_task_runs(plane, start_agent, tmp_path):
    plane.spec = pb.TaskSpec(
        operator="bash",
        entrypoint=f"printf '10%%\\r20%%\\rname? '; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done",
    )
    agent = start_agent()
    wait_until(lambda: plane.text("stdout") == ["10%", "20%", "name? "])
    (tmp_path / "go").touch()
    assert agent.wait() == 0
