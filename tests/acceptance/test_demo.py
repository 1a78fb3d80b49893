"""The example and ``leoflow lite``, end to end: real processes, nothing started by the test but the command."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from leoflow_celery.lite.dag import Dag
from tests.support.waiting import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]
LEOFLOW = (sys.executable, "-m", "leoflow_celery.cli")


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    """A directory for one system; afterwards none of its processes is left."""
    directory = tmp_path / "s"  # short: sockets live in it
    yield directory
    wait_until(lambda: not processes_of(directory), 15, lambda: f"still there: {processes_of(directory)}")


def processes_of(directory: Path) -> list[str]:
    """The command lines that name the system's directory, or run in it."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command = " ".join(process.info["cmdline"] or ())
        if str(directory) in command or str(directory) in (process.info["cwd"] or ""):
            found.append(command)
    return found


def leoflow(*arguments: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    command = [*LEOFLOW, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout * PATIENCE, check=False)


def spawn(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start the command; its stderr is read from the pipe."""
    return subprocess.Popen([*LEOFLOW, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_dag(directory: Path, *tasks: dict[str, Any]) -> Path:
    path = directory / "dag.json"
    head = {"schema_version": "1.0", "dag_id": "d", "dag_version": "1", "image": "none"}
    path.write_text(json.dumps({**head, "tasks": list(tasks)}))
    return path


def bash(task_id: str, command: str, *upstreams: str) -> dict[str, Any]:
    return {"task_id": task_id, "type": "bash", "entrypoint": command, "depends_on": list(upstreams)}


def status(state_dir: Path, run_id: str, dag_id: str = "d") -> dict[str, Any]:
    """The run and, by task id, its task instances."""
    shown = json.loads(leoflow("--state-dir", state_dir, "status", dag_id, run_id, "--json").stdout)
    return {"run": shown["run"], **{view["task_id"]: view for view in shown["task_instances"]}}


def test_the_demo_runs_and_can_be_looked_at_afterwards(state_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/sales/demo.py"), "--state-dir", str(state_dir), "--run-id", "demo"]
    environment = {**os.environ, "COLUMNS": "80"}
    demo = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path, env=environment
    )
    assert demo.returncode == 0, demo.stderr
    assert_it_ends_with_a_chart_a_report_and_commands_that_work(demo.stderr, tmp_path)
    values = dict(line.split(" = ", 1) for line in demo.stdout.splitlines())
    summary = json.loads(values["convert.return_value"])
    assert (summary["currency"], summary["total"], summary["best_region"]) == ("EUR", 251.34, "north")
    assert json.loads(values["report.return_value"]) == "6 lines"
    written = json.dumps(summary, separators=(",", ":")) + "\n"
    assert json.loads(values["archive.return_value"]) == len(written)

    after = status(state_dir, "demo", "sales")
    assert after["run"]["state"] == "success"
    assert {view["state"] for name, view in after.items() if name != "run"} == {"success"}
    assert after["exchange_rate"]["try_number"] == 2
    executors = [after[name]["executor"] for name in ("fetch_orders", "exchange_rate", "report")]
    assert executors == ["inline", "inline", "subprocess"]
    first_try = leoflow("--state-dir", state_dir, "logs", "sales", "demo", "exchange_rate", "--try", "1")
    assert "http_status" in first_try.stdout
    assert "425" in first_try.stdout
    report = leoflow("--state-dir", state_dir, "logs", "sales", "demo", "report")
    assert "sales report: " in report.stdout


def assert_it_ends_with_a_chart_a_report_and_commands_that_work(printed: str, directory: Path) -> None:
    lines = printed.splitlines()
    start = lines.index("sales demo: success")
    chart, (after, *commands) = lines[start + 1 : -5], lines[-4:]
    assert [line.split()[0] for line in chart[:3]] == ["fetch_orders", "exchange_rate#1", "exchange_rate#2"]
    assert len(chart) == 7 + 2
    assert max(map(len, chart)) <= 80
    assert after == "open sales-report.html in a browser, or go on with:"
    page = (directory / "sales-report.html").read_text()
    assert '"dag":"sales","run":"demo"' in page
    assert "unit_price" not in page  # the values of a run are not in its report
    assert len(commands) == 3
    for command in commands:
        done = subprocess.run(
            shlex.split(command), capture_output=True, text=True, timeout=60, check=False, cwd=directory
        )
        assert (done.returncode, done.stderr) == (0, ""), command
        assert done.stdout, command


def test_a_run_that_failed_has_its_report_too(state_dir: Path, tmp_path: Path) -> None:
    dag = write_dag(tmp_path, bash("a", "echo oh no >&2; exit 3"), bash("b", "true", "a"))
    file = tmp_path / "run.html"
    result = leoflow("lite", "run", dag, "--state-dir", state_dir, "--run-id", "r", "--report", file)
    assert result.returncode == 1, result.stderr
    assert f"report: {file}" in result.stderr
    page = file.read_text()
    for text in ('"reason":"non_zero_exit"', '"oh no"', '"state":"upstream_failed"'):
        assert text in page
    chart = leoflow("--state-dir", state_dir, "status", "d", "latest", "--gantt")
    assert re.search(r"^a .*failed$", chart.stdout, re.MULTILINE)


def test_the_compiled_dag_is_that_of_the_source_beside_it() -> None:
    compiled = runpy.run_path(str(ROOT / "examples/sales/compile.py"))["compiled"]
    dag = json.loads((ROOT / "examples/sales/dag.json").read_text())
    assert dag == compiled(), "run: python examples/sales/compile.py"
    Dag.model_validate(dag)


def test_a_failed_run_exits_1_and_shows_the_reason_and_the_end_of_the_log(state_dir: Path, tmp_path: Path) -> None:
    dag = write_dag(tmp_path, bash("a", "echo oh no >&2; exit 3"), bash("b", "true", "a"))
    result = leoflow("lite", "run", dag, "--state-dir", state_dir, "--run-id", "r")
    assert result.returncode == 1, result.stderr
    assert re.search(r"a failed \(non_zero_exit\): .*3", result.stderr)
    assert "oh no" in result.stderr
    assert status(state_dir, "r")["b"]["state"] == "upstream_failed"


def test_ctrl_c_cancels_the_run_and_leaves_nothing_behind(state_dir: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"
    dag = write_dag(tmp_path, bash("a", f"touch {started}; exec sleep 300"), bash("b", "true", "a"))
    run = spawn("lite", "run", dag, "--state-dir", state_dir, "--run-id", "r")
    wait_until(started.exists, 30, "the task starts")
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60 * PATIENCE)
    assert run.returncode == 130, errors
    assert "Traceback" not in errors
    after = status(state_dir, "r")
    assert after["run"]["state"] == "failed"
    assert (after["a"]["state"], after["a"]["reason"]) == ("failed", "cancelled")
    assert "b" not in after


def test_a_run_killed_with_its_whole_system_is_picked_up_where_it_was(state_dir: Path, tmp_path: Path) -> None:
    starts, go = tmp_path / "starts", tmp_path / "go"
    waits = f"echo started >> {starts}; until [ -e {go} ]; do sleep 0.05; done"
    dag = write_dag(tmp_path, bash("a", waits), bash("b", "true", "a"))
    run = spawn("lite", "run", dag, "--state-dir", state_dir, "--run-id", "r")
    wait_until(starts.exists, 30, "the task starts")
    run.kill()
    run.communicate(timeout=30 * PATIENCE)

    again = spawn("lite", "run", dag, "--state-dir", state_dir, "--run-id", "r")
    wait_until(lambda: status(state_dir, "r")["a"]["state"] == "running", 30, "the agent is still at work")
    go.touch()
    _, errors = again.communicate(timeout=120 * PATIENCE)
    assert again.returncode == 0, errors
    assert "resumed" in errors
    assert starts.read_text() == "started\n"
    after = status(state_dir, "r")
    assert after["run"]["state"] == "success"
    assert (after["a"]["state"], after["b"]["state"]) == ("success", "success")


@pytest.fixture
def system(state_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """``leoflow lite up``, once it says that it is up."""
    process = spawn("lite", "up", "--state-dir", state_dir)
    assert process.stdout is not None
    said = process.stdout.readline()
    if "is up" not in said:
        pytest.fail(f"{said}{process.communicate()[1]}")
    yield process
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60 * PATIENCE)


def test_lite_up_serves_other_shells(system: subprocess.Popen[str], state_dir: Path, tmp_path: Path) -> None:
    doctor = leoflow("--state-dir", state_dir, "doctor")
    assert doctor.returncode == 0, doctor.stdout

    dag = write_dag(tmp_path, bash("a", "true"))
    run = leoflow("lite", "run", dag, "--state-dir", state_dir)
    assert run.returncode == 0, run.stderr
    assert f"(process {system.pid})" in run.stderr

    request = {"task_instance_id": "ti", "dag_id": "d", "run_id": "r", "task_id": "t", "operator": "bash"}
    (tmp_path / "request.json").write_text(json.dumps({**request, "entrypoint": "exit 7"}))
    submitted = leoflow("--state-dir", state_dir, "submit", tmp_path / "request.json", "--wait", "--json")
    assert submitted.returncode == 1
    assert json.loads(submitted.stdout)["exit_code"] == 7

    second = leoflow("lite", "up", "--state-dir", state_dir)
    assert second.returncode == 2
    assert f"in use by 'leoflow lite up' (process {system.pid})" in second.stderr
    assert system.poll() is None

    system.send_signal(signal.SIGTERM)
    assert system.wait(timeout=60 * PATIENCE) == 143


def test_lite_up_ends_cleanly_with_ctrl_c(system: subprocess.Popen[str]) -> None:
    os.kill(system.pid, signal.SIGINT)
    _, errors = system.communicate(timeout=60 * PATIENCE)
    assert system.returncode == 130
    assert "Traceback" not in errors
