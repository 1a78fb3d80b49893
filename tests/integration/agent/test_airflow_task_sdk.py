"""A DAG file written with the Airflow Task SDK runs when that SDK is in the chosen interpreter."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

from leoflow_celery.protocol import agent_pb2 as pb
from tests.support.requirements import require

CACHE = Path(__file__).parents[3] / ".cache"
BUILD_SECONDS = 600

DAG = """
from airflow.sdk import DAG, task

@task
def extract(limit: int = 3):
    print("extracting")
    return list(range(limit))

@task(retries=2)
def total(rows, factor=1):
    return sum(rows) * factor

@task
def nothing_to_do():
    from airflow.sdk.exceptions import AirflowSkipException
    raise AirflowSkipException("no rows today")

with DAG("sales", schedule=None):
    total(extract())
    nothing_to_do()
"""


@pytest.fixture(scope="session")
def airflow_python() -> Path:
    """An interpreter with the Task SDK, built once and kept in the repository's ignored cache."""
    CACHE.mkdir(exist_ok=True)
    venv = CACHE / "airflow-task-sdk"
    python = venv / "bin" / "python"
    with (CACHE / "airflow-task-sdk.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not python.exists() or not _has_sdk(python):
            _build(venv, python)
    return python


def _has_sdk(python: Path) -> bool:
    return subprocess.run([python, "-c", "import airflow.sdk"], capture_output=True, check=False).returncode == 0


def _build(venv: Path, python: Path) -> None:
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True, capture_output=True)
        pip = [python, "-m", "pip", "install", "-q", "apache-airflow-task-sdk"]
        subprocess.run(pip, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
    except (subprocess.SubprocessError, OSError) as error:
        require("airflow", f"pip cannot install apache-airflow-task-sdk: {getattr(error, 'stderr', '') or error}")


@pytest.fixture
def run_task(plane, start_agent, airflow_python, tmp_path):
    (tmp_path / "dag.py").write_text(DAG)

    def run(name: str, **spec):
        plane.holder = ""
        plane.spec = pb.TaskSpec(
            operator="python", entrypoint=f"dag:{name}", environment={"AIRFLOW_HOME": str(tmp_path / "home")}, **spec
        )
        return start_agent(LEOFLOW_PYTHON=str(airflow_python)).wait(timeout=120)

    return run


@pytest.mark.timeout(BUILD_SECONDS + 180)
def test_tasks_pass_values_as_in_the_dag(run_task, plane):
    assert run_task("extract", call_args_json='{"limit": 4}') == 0
    assert "extracting" in plane.text("stdout")
    plane.xcoms["extract"] = plane.pushed[-1].value
    assert run_task("total", xcom_input_mapping={"rows": "extract"}, call_args_json='{"factor": 10}') == 0
    assert json.loads(plane.pushed[-1].value) == 60


@pytest.mark.timeout(BUILD_SECONDS + 180)
def test_its_skip_exception_skips(run_task, plane):
    assert run_task("nothing_to_do") == 0
    assert plane.final().request.state == pb.TASK_STATE_SKIPPED
