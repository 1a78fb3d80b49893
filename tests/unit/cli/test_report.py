"""report and status --gantt over a real database without any other server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len

from leoflow_celery.client import Client
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import RunState
from leoflow_celery.domain.xcom import XComKey, XComValue
from leoflow_celery.lite.dag import load_dag, task_request
from leoflow_celery.settings import Settings
from leoflow_celery.store.logs import LogRecord
from leoflow_celery.store.submissions import NewTry
from tests.unit.cli.conftest import Cli

CANARY = "c4n4ry"
TASKS = [
    {"task_id": "load", "type": "bash", "entrypoint": f"echo {CANARY}", "env": {"TOKEN": CANARY}, "retries": 1},
    {"task_id": "clean", "type": "bash", "entrypoint": "true", "depends_on": ["load"]},
]
DAG = {"schema_version": "1.0", "dag_id": "sales", "dag_version": "v7", "image": "none", "tasks": TASKS}


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    """Two runs of a DAG: in the first ``load`` succeeded, in the second it failed and then succeeded."""
    dag = load_dag(json.dumps(DAG).encode())
    with Client(settings) as client:
        store = client.services.store
        ends = {"r0": [Outcome.success()], "r1": [Outcome.failed(FailureReason.OOM_KILLED, "too [big]")]}
        ends["r1"].append(Outcome.success())
        for run_id, outcomes in ends.items():
            client.create_run("sales", run_id, dag_version="v7", dag=dag)
            for number, outcome in enumerate(outcomes, 1):
                request = task_request(dag, "load", run_id, try_number=number)
                store.submissions.record([NewTry(request, ExecutorType.SUBPROCESS, "sealed")])
                view = store.attempts.claim(request.attempt, "me", "host-1", 90, start=True)
                key = XComKey("default", "sales", run_id, "load")
                store.attempts.finish(request.attempt, outcome, xcoms=[(key, XComValue(f'"{CANARY}"'.encode()))])
                with store.logs.writer(view.log_key) as log:
                    log.append([LogRecord(1.5, "info", "stdout", f"line of try {number}")])
            if run_id == "r0":
                client.finish_run("sales", run_id, RunState.SUCCESS)
        yield client


def data_of(page: str) -> dict[str, object]:
    [data] = re.findall(r'id="data">(.*?)</script>', page)
    found: dict[str, object] = json.loads(data)
    return found


def test_a_report_tells_of_graph_tries_reasons_logs_and_earlier_runs_and_no_value(
    cli: Cli, client: Client, tmp_path: Path
) -> None:
    file = tmp_path / "run.html"
    result = cli("report", "sales", "latest", "-o", str(file))
    assert (result.code, result.out) == (0, "")
    assert result.err == f"report: {file}\n"
    page = file.read_text()
    assert CANARY not in page
    data = data_of(page)
    assert (data["dag"], data["run"], data["version"], data["state"]) == ("sales", "r1", "v7", "running")
    load, clean = data["tasks"]  # type: ignore[misc]
    assert (load["id"], load["state"], clean["up"], clean["state"]) == ("load", "success", [0], "none")
    first, second = load["tries"]
    assert (first["reason"], first["message"], first["log"]) == ("oom_killed", "too [big]", ["line of try 1"])
    assert (second["state"], second["log"], second["host"]) == ("success", ["line of try 2"], "host-1")
    assert load["xcoms"] == [["return_value", len(CANARY) + 2]]
    assert [run["run"] for run in data["earlier"]] == ["r0"]  # type: ignore[attr-defined]
    assert load["usual"] is not None


def test_a_report_may_go_to_stdout_and_has_a_name_of_its_own(
    cli: Cli, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("report", "sales", "r1", "-o", "-").out.startswith("<!doctype html>")
    assert "sales-r1.html" in cli("report", "sales", "r1").err
    assert (tmp_path / "sales-r1.html").stat().st_size > 10_000


def test_the_wrong_run_or_file_is_named(cli: Cli, client: Client, tmp_path: Path) -> None:
    for command in (("report", "sales", "nope"), ("status", "sales", "nope", "--gantt")):
        result = cli(*command)
        assert (result.code, result.out) == (2, "")
        assert "run 'nope' of dag 'sales' (tenant 'default') does not exist" in result.err
    result = cli("report", "sales", "r1", "-o", str(tmp_path))
    assert result.code == 2
    assert f"{tmp_path}: cannot be written: Is a directory; name another file" in result.err


def test_a_report_file_that_cannot_be_is_refused_before_the_run_starts(
    cli: Cli, client: Client, tmp_path: Path
) -> None:
    dag = tmp_path / "dag.json"
    dag.write_text(json.dumps(DAG))
    for file, why in ((tmp_path, "is a directory"), (tmp_path / "no" / "run.html", "does not exist; create it first")):
        result = cli("run", str(dag), "--run-id", "new", "--report", str(file))
        assert result.code == 2
        assert f"--report: {'the directory ' if 'exist' in why else ''}" in result.err
        assert why in result.err
    assert [run.run_id for run in client.runs("sales")] == ["r1", "r0"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_chart_of_a_run_fits_the_terminal(
    cli: Cli, client: Client, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    result = cli("status", "sales", "r1", "--gantt")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "sales r1: running"
    assert [line.split()[0] for line in lines[1:4]] == ["load#1", "load#2", "clean"]
    assert max(map(cell_len, lines)) <= width


def test_a_chart_is_of_a_run_and_is_text(cli: Cli, client: Client) -> None:
    assert "--gantt: shows a run; name DAG RUN without a task" in cli("status", "sales", "r1", "load", "--gantt").err
    result = cli("status", "sales", "r1", "--gantt", "--json")
    assert result.code == 2
    assert "--gantt: a chart is text; leave out --json" in result.err
