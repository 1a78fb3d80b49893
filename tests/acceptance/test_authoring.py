"""From a DAG file to a finished run: Python with the Task SDK, YAML, fan-in everywhere, on the embedded system."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.airflow_python import BUILD_SECONDS, airflow_python
from tests.support.waiting import PATIENCE

__all__ = ["airflow_python"]  # a fixture
LEOFLOW = (sys.executable, "-m", "leoflow_celery.cli")


def leoflow(*arguments: str | Path, timeout: float = 90) -> subprocess.CompletedProcess[str]:
    command = [*LEOFLOW, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout * PATIENCE, check=False)


def values(ran: subprocess.CompletedProcess[str]) -> dict[str, object]:
    found = dict(line.split(" = ", 1) for line in ran.stdout.splitlines() if " = " in line)
    return {name.removesuffix(".return_value"): json.loads(text) for name, text in found.items()}


@pytest.mark.timeout(BUILD_SECONDS + 600)
def test_a_new_project_tests_itself_runs_and_compiles(airflow_python: Path, tmp_path: Path) -> None:
    project = tmp_path / "squares"
    assert leoflow("dag", "init", project).returncode == 0
    tests = subprocess.run([airflow_python, "-m", "unittest"], cwd=project, capture_output=True, text=True, check=False)
    assert tests.returncode == 0, tests.stderr
    again = leoflow("dag", "init", project)
    assert (again.returncode, "exists; choose another directory" in again.stderr) == (2, True)
    compiled = leoflow("dag", "compile", project / "dag.py", "--python", airflow_python, "--image", "mine:1")
    assert compiled.returncode == 0, compiled.stderr
    document = json.loads((project / "dag.json").read_text())
    assert (document["image"], document["source"]) == ("mine:1", (project / "dag.py").read_text())
    assert document["tasks"][-1]["xcom_input"] == {"squares": ["square_0", "square_1", "square_2"]}
    options = ("--python", airflow_python, "--state-dir", tmp_path / "s", "--run-id", "one")
    ran = leoflow("lite", "run", project / "dag.py", *options, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert values(ran) == {"numbers": [1, 2, 3], "square_0": 1, "square_1": 4, "square_2": 9, "total": 14}


@pytest.fixture
def url() -> Iterator[str]:
    """A server that answers with what it was sent."""

    class Echo(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


FLOW = """\
schema_version: "1.0"
dag_id: fan
dag_version: 2026-11-27
source: |
  import leoflow_runtime
  def one(n):
      return {"n": n}
  def none():
      leoflow_runtime.skip("nothing")
  def total(parts):
      return sum(part["n"] for part in parts if part)
tasks:
  - {task_id: a, type: python, entrypoint: "dag:one", call_args: {n: 1}}
  - {task_id: b, type: python, entrypoint: "dag:one", call_args: {n: 2}}
  - {task_id: c, type: python, entrypoint: "dag:none"}
  - {task_id: total, type: python, entrypoint: "dag:total", depends_on: [a, b, c], xcom_input: {parts: [b, c, a]},
     trigger_rule: none_failed}
  - &call
    task_id: inline
    type: http_api
    depends_on: [a, b, c]
    trigger_rule: none_failed_min_one_success
    xcom_input: {parts: [b, c, a]}
    http_request: {method: POST, url: "URL{{ xcom.parts.0.n }}", body: {all: "{{ xcom.parts }}"}}
  - {<<: *call, task_id: agent, execution_mode: pod}
  - {task_id: never, type: bash, entrypoint: "false", depends_on: [total, c]}
  - {task_id: cleanup, type: bash, entrypoint: "printf 1 > $LEOFLOW_RETURN_VALUE_PATH", depends_on: [never],
     trigger_rule: all_skipped}
"""


def test_fan_in_and_trigger_rules_of_a_yaml_file_hold_in_every_executor(url: str, tmp_path: Path) -> None:
    flow = tmp_path / "flow.yaml"
    flow.write_text(FLOW.replace("URL", url))
    shown = leoflow("dag", "show", flow)
    assert "total" in shown.stdout, shown.stderr
    ran = leoflow("lite", "run", flow, "--state-dir", tmp_path / "s", "--run-id", "one", timeout=180)
    assert ran.returncode == 0, ran.stderr
    found = values(ran)
    parts = {"all": [{"n": 2}, None, {"n": 1}]}
    assert (found["total"], found["cleanup"]) == (3, 1)
    bodies = [json.loads(found[name]["body"]) if "body" in found[name] else found[name] for name in ("inline", "agent")]
    assert bodies == [parts, parts]
    assert {"c", "never"}.isdisjoint(found)
