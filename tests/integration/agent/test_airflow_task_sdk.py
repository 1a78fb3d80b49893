"""A DAG file written with the Airflow Task SDK runs when that SDK is in the chosen interpreter."""

from __future__ import annotations

import json

import pytest

from leoflow_celery.protocol import agent_pb2 as pb
from tests.support.airflow_python import BUILD_SECONDS, airflow_python

__all__ = ["airflow_python"]  # a fixture

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
