"""Tasks with operator exec: an argument list as it is, and input that nobody sees but the program."""

from __future__ import annotations

import json
import sys

from leoflow_celery.agent.command import PYTHON
from leoflow_celery.protocol import agent_pb2 as pb

TOKEN = "canary-7f3a"
PROGRAM = """
import hashlib, json, os, sys
text = sys.stdin.read()
seen = {"argv": sys.argv[1:], "input": hashlib.sha256(text.encode()).hexdigest(), "again": sys.stdin.read()}
seen["shown"] = open("/proc/self/cmdline").read() + open("/proc/self/environ").read()
json.dump(seen, open(os.environ["LEOFLOW_RETURN_VALUE_PATH"], "w"))
"""


def _run(plane, start_agent, argv: list[str], stdin: str = "") -> tuple[int, pb.ReportStateRequest]:
    plane.spec = pb.TaskSpec(operator="exec", dag_id="d", run_id="r", task_id="t", try_number=1)
    plane.spec.extra["argv"] = argv
    plane.spec.extra["stdin"] = stdin
    code = start_agent().wait()
    return code, plane.reports()[-1]


def test_the_input_is_read_once_and_is_neither_argument_nor_environment(plane, start_agent) -> None:
    import hashlib

    text = TOKEN * 100_000  # more than a pipe holds
    code, _ = _run(plane, start_agent, [PYTHON, "-c", PROGRAM, "a b", "$HOME", "*"], text)
    assert code == 0
    seen = json.loads(plane.pushed[-1].value)
    assert seen["argv"] == ["a b", "$HOME", "*"]  # no shell
    assert seen["input"] == hashlib.sha256(text.encode()).hexdigest()
    assert seen["again"] == ""
    assert TOKEN not in seen["shown"]


def test_a_program_may_leave_its_input_unread(plane, start_agent) -> None:
    code, report = _run(plane, start_agent, [sys.executable, "-c", "raise SystemExit(3)"], "x" * 1_000_000)
    assert (code, report.state, report.exit_code) == (1, pb.TASK_STATE_FAILED, 3)


def test_a_program_that_is_not_there_is_named(plane, start_agent) -> None:
    _, report = _run(plane, start_agent, ["/no/such/program"])
    assert "/no/such/program" in report.error_message
