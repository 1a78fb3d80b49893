"""The command back end: what it is asked, how long its answers live, and what no command can do to the gateway."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.gateway import secret_backends
from leoflow_celery.gateway.secret_backends import (
    MAX_OUTPUT_BYTES,
    MAX_TTL_SECONDS,
    BackendFailed,
    CommandBackend,
    Kind,
    Query,
    read_answer,
)
from leoflow_celery.settings import GatewaySettings
from tests.support.waiting import wait_until

#: Each command begins with it. ``asked`` is a file with one line per question.
PREAMBLE = """
import json, os, signal, subprocess, sys, time
question = json.load(sys.stdin)
with open({asked!r}, "a") as file:
    file.write(json.dumps(question) + "\\n")
tenant, dag = question["tenant_id"], question["dag_id"]
"""


class Command:
    """A program of a test, and the back end that runs it."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.asked = directory, directory / "asked"
        self.backends: list[CommandBackend] = []

    def backend(self, body: str, timeout: float = 20, ttl: float = 60, preamble: bool = True) -> CommandBackend:
        program = self.directory / "command"
        head = PREAMBLE.format(asked=str(self.asked)) if preamble else "import os, signal, subprocess, sys, time\n"
        program.write_text(f"#!{sys.executable} -S\n{head}{body}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        settings = GatewaySettings(
            secret_command=f"{program} 'an argument'",
            secret_command_timeout_seconds=timeout,
            secret_command_ttl_seconds=ttl,
        )
        self.backends.append(CommandBackend(settings))
        return self.backends[-1]

    def questions(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.asked.read_text().splitlines()] if self.asked.exists() else []


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


def query(tenant: str = "acme", dag: str = "sales", kind: Kind = Kind.VARIABLE, **more: object) -> Query:
    return Query(kind, tenant, dag, "run:1", "load").evolve(**more)


ECHO = 'print(json.dumps({"values": {"who": f"{tenant}/{dag}"}}))'


def test_it_is_asked_for_one_scope_and_told_in_whose_name(command, monkeypatch):
    monkeypatch.setenv("LEOFLOW_JWT_SECRET", "canary")
    monkeypatch.setenv("VAULT_ADDR", "https://vault")
    body = 'print(json.dumps({"values": {"argv": sys.argv[1], **os.environ}}))'
    answer = command.backend(body).get(query(names=frozenset({"b", "a"})))
    assert command.questions() == [
        {
            "version": 1,
            "kind": "variable",
            "tenant_id": "acme",
            "dag_id": "sales",
            "run_id": "run:1",
            "task_id": "load",
            "names": ["a", "b"],
        }
    ]
    assert (answer["argv"], answer["VAULT_ADDR"]) == ("an argument", "https://vault")
    assert "LEOFLOW_JWT_SECRET" not in answer
    assert "canary" not in str(answer)


def test_answers_are_kept_by_scope(command):
    backend = command.backend(ECHO)
    for _ in range(2):
        for tenant in ("acme", "beta"):
            for dag in ("sales", "stock"):
                assert backend.get(query(tenant, dag)) == {"who": f"{tenant}/{dag}"}
    assert len(command.questions()) == 4
    backend.get(query(run_id="run:2", task_id="other"))
    assert len(command.questions()) == 4, "of the same scope"
    backend.get(query(kind=Kind.CONNECTION))
    backend.get(query(names=frozenset({"who"})))
    assert len(command.questions()) == 6


@pytest.mark.parametrize(("said", "questions"), [('"ttl_seconds": 60', 1), ('"ttl_seconds": 0', 2)])
def test_the_command_says_how_long(command, said, questions):
    backend = command.backend(f"print('{{\"values\": {{}}, {said}}}')", ttl=60 if said[-1] == "0" else 0)
    backend.get(query())
    backend.get(query())
    assert len(command.questions()) == questions


def test_what_is_kept_ends_and_is_bounded(command, monkeypatch):
    now = [1000.0]
    backend = command.backend(ECHO, ttl=10)
    backend._ask = lambda asked: read_answer(json.dumps({"values": {"x": asked.dag_id}}).encode(), 10)  # no process
    monkeypatch.setattr(secret_backends.time, "monotonic", lambda: now[0])
    backend.get(query())
    assert len(backend._kept) == 1
    now[0] += 10
    assert backend._fresh((Kind.VARIABLE, "acme", "sales", None)) is None
    assert (len(backend._kept), backend._kept_bytes) == (0, 0)
    for number in range(5_000):
        backend.get(query(dag=f"dag-{number}"))
    assert len(backend._kept) == 4_096
    assert backend._kept_bytes == sum(answer.size for _, answer in backend._kept.values())
    monkeypatch.setattr(secret_backends, "_MAX_KEPT_BYTES", 100)
    backend.get(query(dag="last"))
    assert backend._kept_bytes <= 100


def test_equal_questions_are_one_process(command, tmp_path):
    gate = tmp_path / "gate"
    body = f"while not os.path.exists({str(gate)!r}): time.sleep(0.01)\n{ECHO}"
    backend = command.backend(body)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(backend.get, query(task_id=f"t{number}")) for number in range(8)]
        wait_until(lambda: command.questions(), 20)
        gate.touch()
        assert [answer.result(20) for answer in answers] == [{"who": "acme/sales"}] * 8
    assert len(command.questions()) == 1


def test_an_answer_that_may_not_be_kept_is_not_shared(command, tmp_path):
    gate = tmp_path / "gate"
    body = f"""
while not os.path.exists({str(gate)!r}): time.sleep(0.01)
print(json.dumps({{"values": {{"task": question["task_id"]}}, "ttl_seconds": 0}}))"""
    backend = command.backend(body)
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(backend.get, query(task_id=f"t{number}")) for number in range(3)]
        wait_until(lambda: command.questions(), 20)
        gate.touch()
        assert [answer.result(20) for answer in answers] == [{"task": f"t{number}"} for number in range(3)]


LARGE = "x" * 1000

FAILURES = {
    "garbage": ("print('canary {')", "the command's output is not valid JSON"),
    "nothing": ("", "the command's output is not valid JSON"),
    "deep": ("print('[' * 200_000)", "the command's output is not valid JSON"),
    "list": ("print('[\"canary\"]')", "the command's output has no object 'values'"),
    "number": ('print(\'{"values": {"canary": 1}}\')', "the command's output has no object 'values'"),
    "ttl": ('print(\'{"values": {"x": "canary"}, "ttl_seconds": "60"}\')', "'ttl_seconds' is not a number"),
    "ttl nan": ('print(\'{"values": {"x": "canary"}, "ttl_seconds": NaN}\')', "'ttl_seconds' is not a number"),
    "ttl negative": ('print(\'{"values": {"x": "canary"}, "ttl_seconds": -1}\')', "'ttl_seconds' is not a number"),
    "status": (f"{ECHO}\nsys.stdout.flush()\nsys.exit('no \\x1b[31m token')", "the command ended with status 1"),
    "signal": ("os.kill(os.getpid(), signal.SIGKILL)", "the command ended with a signal (9)"),
    "hangs": ("signal.pause()", "the command did not answer within 1 s and was stopped"),
    "100 MB": ("[os.write(1, b'x' * 1_000_000) for _ in range(100)]", "the command printed more than 1048576 bytes"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_command_that_fails_is_a_failure_and_no_unknown_name(command, caplog, case):
    body, text = FAILURES[case]
    backend = command.backend(body, timeout=1 if case == "hangs" else 20)
    with pytest.raises(BackendFailed) as caught:
        backend.get(query())
    assert text in str(caught.value)
    with pytest.raises(BackendFailed):
        backend.get(query())
    assert len(command.questions()) == 1, "a failure is kept for a moment"
    assert "canary" not in str(caught.value) + caplog.text
    wait_until(lambda: backend._fresh((Kind.VARIABLE, "acme", "sales", None)) is None, 5)


def test_100_mb_of_remarks_and_input_that_is_not_read_are_no_reason_to_fail(command):
    body = '[os.write(2, b\'x\' * 1_000_000) for _ in range(100)]\nprint(\'{"values": {"x": "1"}}\')'
    backend = command.backend(body, preamble=False)
    names = frozenset(f"{number:06}{LARGE}" for number in range(1_000))
    assert backend.get(query(names=names)) == {"x": "1"}


def test_the_end_of_what_it_said_is_logged_without_values_and_control_characters(command, caplog):
    body = """
print(json.dumps({"values": {"x": "canary", "y": "canary-longer"}}))
sys.stdout.flush()
os.write(2, b"x" * 100_000 + b"cannot\\x1b[2J\\nlog in with canary-longer or canary\\xff")
sys.exit(3)"""
    with caplog.at_level(logging.WARNING), pytest.raises(BackendFailed):
        command.backend(body).get(query())
    (record,) = (record for record in caplog.records if record.message == "secrets.command_failed")
    assert record.stderr.endswith("cannot [2J log in with *** or ***\ufffd")
    assert len(record.stderr) <= 2_000
    assert record.tenant_id == "acme"


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("ending", ["answers", "fails", "hangs"])
def test_children_that_stay_end_with_it(command, tmp_path, ending):
    """A child keeps the pipes open: whoever waits for their end waits for the child."""
    pids = tmp_path / "pids"
    body = f"""
child = subprocess.Popen(["sleep", "600"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
if {ending!r} == "hangs": signal.pause()
if {ending!r} == "fails": sys.exit(1)
{ECHO}"""
    backend = command.backend(body, timeout=2 if ending == "hangs" else 20)
    started = time.monotonic()
    if ending == "answers":
        assert backend.get(query()) == {"who": "acme/sales"}
    else:
        with pytest.raises(BackendFailed):
            backend.get(query())
    assert time.monotonic() - started < 15
    for pid in map(int, pids.read_text().split()):
        wait_until(lambda pid=pid: not _lives(pid), 5)


def test_a_child_that_left_the_group_and_holds_the_pipes_does_not_hold_us(command, tmp_path):
    pid = tmp_path / "pid"
    body = f"""
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
open({str(pid)!r}, "w").write(str(child.pid))
{ECHO}"""
    try:
        started = time.monotonic()
        assert command.backend(body).get(query()) == {"who": "acme/sales"}
        assert time.monotonic() - started < 15
    finally:
        os.kill(int(pid.read_text()), 9)


def test_it_ends_with_the_gateway(command):
    backend = command.backend("signal.pause()", timeout=60)
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            backend.get(query())
        except BackendFailed as error:
            failures.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(command.questions, 20)
    backend.close()
    thread.join(10)
    assert not thread.is_alive()
    assert "shuts down" in str(failures[0])


def test_a_ttl_has_a_limit():
    assert read_answer(b'{"values": {}, "ttl_seconds": 1e300}', 60).ttl_seconds == MAX_TTL_SECONDS
    assert read_answer(b'{"values": {}}', 60).ttl_seconds == 60
    assert read_answer(b'{"values": {}, "ttl_seconds": true}', 60).failure
    assert MAX_OUTPUT_BYTES == 1024 * 1024


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names 'command'; set LEOFLOW_GATEWAY_SECRET_COMMAND"),
        ("'unfinished", "LEOFLOW_GATEWAY_SECRET_COMMAND has a quote without an end"),
        ("./command", "'./command' is not a program"),
        ("no-such-program-anywhere", "'no-such-program-anywhere' is not a program"),
        ("/etc/passwd", "'/etc/passwd' is not a program"),
    ],
)
def test_a_command_that_cannot_be_run_stops_the_start(text, says):
    with pytest.raises(ConfigurationError) as caught:
        CommandBackend(GatewaySettings(secret_command=text))
    assert says in str(caught.value)


def test_the_command_of_the_docs_works(command):
    text = (Path(__file__).parents[3] / "docs" / "secrets.md").read_text()
    (example,) = re.findall(r"```python\n(#!.*?)```", text, re.DOTALL)
    known = command.directory / "values.json"
    known.write_text('{"acme": {"variable": {"region": "eu", "table": "t"}}}')
    body = example.partition("\n")[2].replace("/etc/values.json", str(known))
    backend = command.backend(body, preamble=False)
    assert backend.get(query()) == {"region": "eu", "table": "t"}
    assert backend.get(query(names=frozenset({"region", "other"}))) == {"region": "eu"}
    assert backend.get(query("beta")) == {}


def test_a_program_that_went_away_is_a_failure(command):
    backend = command.backend(ECHO)
    (command.directory / "command").unlink()
    with pytest.raises(BackendFailed, match="cannot be started: No such file"):
        backend.get(query())
