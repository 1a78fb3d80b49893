"""status, logs, xcom and cancel over a real database without any other server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from leoflow_celery.cli.output import fitted_widths
from leoflow_celery.client import Client
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import RunState
from leoflow_celery.domain.xcom import XComKey, XComValue
from leoflow_celery.settings import Settings
from leoflow_celery.store.logs import LogKey, LogRecord
from leoflow_celery.store.submissions import NewTry
from tests.unit.cli.conftest import Cli


def request_of(task_id: str, try_number: int = 1) -> TaskRequest:
    return TaskRequest.model_validate(
        {
            "task_instance_id": f"ti-{task_id}",
            "dag_id": "sales",
            "run_id": "r1",
            "task_id": task_id,
            "try_number": try_number,
            "operator": "bash",
            "entrypoint": "true",
            "env": {"TOKEN": "canary"},
        }
    )


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    """A run: ``load`` succeeded on its second try, ``clean`` is queued."""
    with Client(settings) as client:
        store = client.services.store
        client.create_run("sales", "r1")
        for number, outcome in enumerate((Outcome.failed(FailureReason.OOM_KILLED, "too [big]"), Outcome.success()), 1):
            request = request_of("load", number)
            store.submissions.record([NewTry(request, ExecutorType.SUBPROCESS, "sealed")])
            store.attempts.claim(request.attempt, "me", "host-1", 90, start=True)
            key = XComKey("default", "sales", "r1", "load")
            store.attempts.finish(request.attempt, outcome, xcoms=[(key, XComValue(b'{"rows": 3}'))])
            with store.logs.writer(LogKey("default", "sales", "r1", "load", number)) as log:
                log.append([LogRecord(1.5, "info", "stdout", f"line of try {number}")])
        store.submissions.record([NewTry(request_of("clean"), ExecutorType.SUBPROCESS, "sealed")])
        yield client


def test_xcom_prints_values_of_any_type(cli: Cli, client: Client) -> None:
    """One that is no JSON, or says so wrongly, must not hide the others."""
    store = client.services.store
    values = {"blob": XComValue(b"\xff\x00", "application/octet-stream"), "note": XComValue(b"hi", "text/plain")}
    with store.database.transaction() as connection:
        items = [*values.items(), ("broken", XComValue(b"{"))]
        store.xcom.put([(XComKey("default", "sales", "r1", "load", key), value) for key, value in items], connection)
    assert client.xcom("sales", "r1", "load", "note") == "hi"
    result = cli("xcom", "sales", "r1", "--json")
    assert result.code == 0
    found = {item["key"]: item["value"] for item in json.loads(result.out)}
    assert found == {"return_value": {"rows": 3}, "blob": "\ufffd\0", "note": "hi", "broken": "{"}


def test_status_of_a_run_shows_every_task(cli: Cli, client: Client) -> None:
    result = cli("status", "sales", "r1")
    assert result.code == 0
    assert "sales r1: running" in result.out
    row = next(line for line in result.out.splitlines() if line.startswith("load"))
    assert row.split()[1:3] == ["success", "2"]
    assert "host-1" in row
    assert "queued" in next(line for line in result.out.splitlines() if line.startswith("clean"))


def test_status_as_json(cli: Cli, client: Client) -> None:
    client.finish_run("sales", "r1", RunState.SUCCESS)
    shown = json.loads(cli("status", "sales", "r1", "--json").out)
    assert shown["run"]["state"] == "success"
    assert shown["run"]["ended_at"].endswith("+00:00")
    by_task = {view["task_id"]: view for view in shown["task_instances"]}
    assert by_task["load"]["try_number"] == 2
    assert by_task["load"]["exit_code"] == 0
    assert "sealed_request" not in by_task["load"]


@pytest.mark.parametrize("target", [["ti-load"], ["sales", "r1", "load"]])
def test_status_of_a_task_has_its_history(cli: Cli, client: Client, target: list[str]) -> None:
    shown = json.loads(cli("status", *target, "--json").out)
    assert shown["try_number"] == 2
    assert {event["event"] for event in shown["events"]} >= {"submitted", "claimed", "finished"}
    first = json.loads(cli("status", *target, "--try", "1", "--json").out)
    assert (first["state"], first["reason"]) == ("failed", "oom_killed")
    text = cli("status", *target, "--try", "1").out
    assert "oom_killed" in text
    assert "too [big]" in text  # not taken for markup


def test_what_does_not_exist_is_an_error_that_helps(cli: Cli, client: Client) -> None:
    assert "'sales' (tenant 'default') does not exist" in cli("status", "sales", "r9").err
    assert "it has: load, clean" in cli("logs", "sales", "r1", "lod").err
    assert "load#2 | " in cli("logs", "sales", "r1").out
    assert "does not exist" in cli("status", "ti-nobody").err
    assert "4 words given" in cli("status", "a", "b", "c", "d").err
    assert cli("status", "sales", "r1", "--tenant", "other").code == 2


def test_logs_are_those_of_the_newest_try_unless_named(cli: Cli, client: Client) -> None:
    assert cli("logs", "sales", "r1", "load").out == "00:00:01.500 INFO    line of try 2\n"
    assert cli("logs", "ti-load", "--try", "1").out.endswith("line of try 1\n")
    line = json.loads(cli("logs", "ti-load", "--json").out)
    assert (line["level"], line["stream"], line["msg"]) == ("info", "stdout", "line of try 2")
    assert cli("logs", "ti-load", "--follow").out.count("line of try 2") == 1


def test_a_task_without_log_says_so_and_where_it_stands(cli: Cli, client: Client) -> None:
    result = cli("logs", "sales", "r1", "clean")
    assert (result.code, result.out) == (0, "")
    assert "no log lines of 'clean', try 1 (state queued)" in result.err


def test_the_last_words_of_a_pod_that_shipped_nothing(cli: Cli, client: Client) -> None:
    outcome = Outcome.failed(
        FailureReason.OOM_KILLED, "killed at 64Mi", 137, last_event="BackOff", log_tail=("loading", "ERROR: no memory")
    )
    client.services.store.attempts.finish(request_of("clean").attempt, outcome)
    result = cli("logs", "sales", "r1", "clean")
    assert "no line was shipped" in result.err
    lines = result.out.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines] == [
        "INFO    [tail] loading",
        "ERROR   [tail] ERROR: no memory",
    ]
    shown = [json.loads(line) for line in cli("logs", "ti-clean", "--json").out.splitlines()]
    assert [(line["stream"], line["level"], line["msg"]) for line in shown] == [
        ("tail", "info", "loading"),
        ("tail", "error", "ERROR: no memory"),
    ]
    status = cli("status", "ti-clean").out
    for text in ("oom_killed", "killed at 64Mi", "BackOff"):
        assert text in status
    assert "loading" not in status


def test_xcom_values(cli: Cli, client: Client) -> None:
    assert cli("xcom", "sales", "r1").out == 'load.return_value = {"rows": 3}\n'
    assert json.loads(cli("xcom", "ti-load", "--key", "return_value").out) == {"rows": 3}
    shown = json.loads(cli("xcom", "sales", "r1", "--json").out)
    assert [(item["task_id"], item["key"], item["value"]) for item in shown] == [("load", "return_value", {"rows": 3})]
    assert "no XCom values" in cli("xcom", "sales", "r1", "clean").err
    assert "no XCom values" in cli("xcom", "sales", "r1", "--key", "rows").err
    missing = cli("xcom", "sales", "r1", "clean", "--key", "rows")
    assert missing.code == 2
    assert "no XCom 'rows'" in missing.err


def test_staging_volumes_with_their_place_and_what_became_of_others(cli: Cli, client: Client) -> None:
    store = client.services.store.staging
    for name, backend in (("kept", "docker:h1"), ("gone", "kubernetes")):
        store.record_staging_volume("default", "sales", "r1", name, "1Gi", backend)
    store.mark_staging_deleted("gone", "run_succeeded")
    [row] = [line.split() for line in cli("staging").out.splitlines() if line.startswith("kept")]
    assert row == ["kept", "docker:h1", "1Gi", "sales", "r1", "run", "running"]
    [shown] = json.loads(cli("staging", "--deleted", "--json").out)
    assert (shown["claim_name"], shown["reason"]) == ("gone", "run_succeeded")
    assert "kept is on no host now" in cli("staging", "--release", "kept").err
    again = cli("staging", "--release", "kept")
    assert (again.code, "is bound to a Docker host" in again.err) == (2, True)


def test_cancel_asks_every_live_task_of_a_run(cli: Cli, client: Client) -> None:
    assert cli("cancel", "sales", "r1").out == "asked clean (try 1) to stop\n"
    assert client.task_instance("ti-clean").cancel_requested_at is not None
    assert "nothing to cancel" in cli("cancel", "ti-load").err


def test_nothing_sealed_is_shown(cli: Cli, client: Client) -> None:
    for command in (["status", "ti-load"], ["status", "sales", "r1", "--json"], ["status", "ti-load", "--json"]):
        assert "sealed" not in cli(*command).out


def test_a_cleared_try_is_shown_as_cleared_until_the_next_one_stands_beside_it(cli: Cli, client: Client) -> None:
    client.clear("sales", "r1", ["load"])
    assert "success (cleared)" in cli("status", "sales", "r1").out
    tries = json.loads(cli("tasks", "sales", "latest", "--all", "--json").out)
    assert [(one["task_id"], one["try_number"], one["cleared"]) for one in tries] == [
        ("load", 1, True),
        ("load", 2, True),
        ("clean", 1, False),
    ]
    result = cli("tasks", "sales", "r1")
    assert [line.split()[0] for line in result.out.splitlines()[2:]] == ["load", "clean"]


def test_runs_are_listed_and_latest_stands_for_the_newest(cli: Cli, client: Client) -> None:
    client.create_run("stock", "s1")
    client.finish_run("stock", "s1", RunState.FAILED)
    listed = [line.split()[:3] for line in cli("runs").out.splitlines()[2:]]
    assert listed == [["stock", "s1", "failed"], ["sales", "r1", "running"]]
    assert [run["run_id"] for run in json.loads(cli("runs", "--state", "running", "--json").out)] == ["r1"]
    assert "no runs that match" in cli("runs", "nothing").err
    assert "line of try 2" in cli("logs", "sales", "latest", "load").out
    lines = cli("logs", "sales", "r1").out.splitlines()
    assert lines == [line for line in lines if line.startswith("load#2 | ")] != []
    for command in (["logs"], ["status"], ["status", "--gantt"], ["cancel"]):
        refused = cli(*command, "sales", "r1", "--try", "1")
        assert (refused.code, "--try: a run has no tries" in refused.err) == (2, True)
    assert "dag 'nope' (tenant 'default') has no run" in cli("status", "nope", "latest").err
    assert [run["run_id"] for run in json.loads(cli("runs", "--since", "2w", "--json").out)] == ["s1", "r1"]
    for since in ("5", "1_0d", "0h", "-1h", "1e3s", "nan", "infd", "1" * 5_000 + "d", "1d" + "x" * 5_000):
        refused = cli("runs", "--since", since)
        assert (refused.code, f"--since: '{since[:5]}"[:12] in refused.err) == (2, True)
        assert "neither a time ago" in refused.err
        assert len(refused.err) < 200
    for words in (["runs", ""], ["tasks", "sales", ""], ["status", ""], ["logs", "", "r1"]):
        refused = cli(*words)
        assert (refused.code, "is empty" in refused.err) == (2, True), words


def test_looking_creates_no_database(
    cli: Cli, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEOFLOW_DATABASE_URL", "sqlite:///leoflow.db")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for command in (["runs"], ["status", "d", "r"], ["tasks", "d", "latest"], ["staging"], ["xcom", "d", "r"]):
        refused = cli(*command)
        assert (refused.code, "the database leoflow.db does not exist" in refused.err) == (2, True)
    assert list(Path.cwd().iterdir()) == []


def test_a_table_fits_the_terminal_and_keeps_its_states() -> None:
    needed = {"task": 60, "state": 15, "try": 3, "queued": 19, "time": 8, "reason": 120, "host": 40}
    for room in (60, 80, 120, 200):
        widths = fitted_widths(needed, room)
        assert sum(widths.values()) + 2 * (len(widths) - 1) <= room
        assert (widths["state"], widths["try"]) == (15, 3)
        assert widths["task"] >= (14 if room >= 80 else 10)
    assert list(fitted_widths(needed, 80)) == ["task", "state", "try", "time", "reason"]
    assert list(fitted_widths(needed, 120)) == list(needed)
    assert fitted_widths({"task": 5, "state": 7}, 80) == {"task": 5, "state": 7}
    # Nothing more can be left out: what remains is as narrow as it must be.
    assert fitted_widths({"dag": 200, "run": 300, "state": 7}, 30) == {"dag": 9, "run": 10, "state": 7}
