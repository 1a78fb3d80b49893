"""What others chose never commands the terminal of whoever looks at it."""

from __future__ import annotations

import json
import time

import pytest

from leoflow_celery.cli.output import echo_json, json_text, log_line, note, table
from leoflow_celery.client import Client
from leoflow_celery.domain.fields import is_printable
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.xcom import XComKey, XComValue
from leoflow_celery.settings import Settings
from leoflow_celery.store.submissions import NewTry
from tests.unit.cli.conftest import Cli

HOSTILE = "a\x1b[2J\x1b]0;t\x07\x9b31m\x85\u202eb\u200b\u2066\u2028\r\x7f\ufeffend"


def obeyed(text: str) -> list[str]:
    return [one for one in text if one != "\n" and not is_printable(one)]


def test_lines_notes_and_tables_show_what_they_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    note(HOSTILE)
    table(HOSTILE, ("id",), [(HOSTILE,)])
    said = capsys.readouterr()
    assert not obeyed(said.out + said.err + log_line({"msg": HOSTILE, "stream": "agent", "level": HOSTILE}))
    assert "\\x1b[2J" in said.err


def test_json_is_exact_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    value = {HOSTILE: [HOSTILE, "é", "\U000e0041"]}
    echo_json(value)
    said = capsys.readouterr().out
    assert not obeyed(said)
    assert json.loads(said) == json.loads(json_text(value)) == value


def test_a_long_line_is_shown_in_linear_time() -> None:
    for text in ("\x01" * (4 << 20), "é\u202e" * (2 << 20), "漢字" * (2 << 20) + "\x1b"):
        started = time.process_time()
        assert not obeyed(log_line({"msg": text})[-100:])
        assert json.loads(json_text({"msg": text}))["msg"] == text
        assert time.process_time() - started < 15


def test_what_older_rules_let_into_sql_is_shown_by_every_command(cli: Cli, settings: Settings) -> None:
    """Ids, messages and values that no door would take today."""
    hostile = HOSTILE.replace("\ufeff", "")
    request = TaskRequest.model_validate(
        {"task_instance_id": "ti", "dag_id": "d", "run_id": "r", "task_id": "t", "operator": "bash", "entrypoint": "x"}
    ).evolve(task_instance_id=f"ti{hostile}", dag_id=f"d{hostile}", run_id=f"r{hostile}", task_id=f"t{hostile}")
    with Client(settings) as client:
        store = client.services.store
        store.submissions.record([NewTry(request, ExecutorType.SUBPROCESS, "sealed")])
        store.attempts.claim(request.attempt, "me", f"host{hostile}", 90, start=True)
        key = XComKey("default", request.dag_id, request.run_id, request.task_id, f"k{hostile}")
        outcome = Outcome.failed(FailureReason.NON_ZERO_EXIT, hostile).evolve(log_tail=(hostile,))
        store.attempts.finish(request.attempt, outcome, xcoms=[(key, XComValue(json.dumps(hostile).encode()))])
    task, run, nobody = (request.task_instance_id,), (request.dag_id, request.run_id), (f"nobody{hostile}",)
    commands = [
        [command, *target, *more]
        for more in ((), ("--json",))
        for command in ("status", "logs", "xcom")
        for target in (task, run, nobody)
        if (command, target) != ("logs", run)
    ]
    commands += [["cancel", *task], ["cancel", *nobody], ["run", f"no{hostile}.json"]]
    for command in commands:
        result = cli(*command)
        assert not obeyed(result.out + result.err), (command, result)
        shown = result.out + result.err
        assert "\\x1b" in shown or "\\u001b" in shown or "every task named has ended" in shown, (command, result)


def test_a_tab_stays_a_tab() -> None:
    assert log_line({"msg": "a\tb"}).endswith("a\tb")
