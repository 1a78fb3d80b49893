"""Airflow's own example DAGs end in the same states under LocalExecutor and under ours.

Both executors run all of them, which takes minutes, so it is asked for: ``LEOFLOW_TEST_AIRFLOW_EXAMPLES=1``, with
``--timeout=1800``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.test_airflow import SETTINGS
from tests.support.airflow import OURS, VENV, Airflow, require_airflow, start_ours
from tests.support.postgres_databases import PostgresDatabases
from tests.support.redis_server import RedisServer
from tests.support.system import System
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not os.environ.get("LEOFLOW_TEST_AIRFLOW_EXAMPLES"), reason="LEOFLOW_TEST_AIRFLOW_EXAMPLES asks for it"
)
#: Of core and of the standard provider: what needs no external service, no person and no hour of the day.
FILES = {
    "airflow/example_dags": (
        *("example_branch_labels", "example_branch_python_dop_operator_3", "example_complex", "example_dag_decorator"),
        *("example_dynamic_task_mapping", "example_dynamic_task_mapping_with_no_taskflow_operators"),
        *(
            "example_failed_dag",
            "example_nested_branch_dag",
            "example_setup_teardown",
            "example_setup_teardown_taskflow",
        ),
        *("example_simplest_dag", "example_skip_dag", "example_task_group", "example_task_group_decorator"),
        *("example_xcom", "example_xcomargs", "tutorial_taskflow_api", "tutorial_dag"),
    ),
    "airflow/providers/standard/example_dags": (
        *("example_bash_decorator", "example_bash_operator", "example_branch_operator_decorator"),
        *("example_python_decorator", "example_short_circuit_operator", "example_short_circuit_decorator"),
    ),
}
#: These choose at random.
RANDOM = frozenset({"example_branch_operator", "example_branch_labels", "example_branch_operator_decorator"})


@pytest.fixture
def airflow(tmp_path: Path, redis_server: RedisServer, postgres: PostgresDatabases) -> Iterator[Airflow]:
    require_airflow()
    dags = tmp_path / "dags"
    dags.mkdir()
    [packages] = VENV.glob("lib/python3*/site-packages")
    for folder, names in FILES.items():
        for name in names:
            shutil.copy(packages / folder / f"{name}.py", dags)
    ours, theirs = postgres.empty(), postgres.empty()
    with System(tmp_path, redis_server.url(), ours, **SETTINGS) as system:
        made = Airflow(system, theirs, dags)
        start_ours(made)
        made.start_api_server()
        made.start_dag_processor()
        yield made
    for url in (ours, theirs):
        postgres.drop(url)


@pytest.mark.timeout(1800)
def test_the_examples_end_in_the_same_states(airflow: Airflow) -> None:
    count = sum(map(len, FILES.values()))
    query = "SELECT DISTINCT dag_id FROM serialized_dag"
    dag_ids = wait_until(
        lambda: found if len(found := sorted(one for (one,) in airflow.query(query))) >= count else None, 120, "parsed"
    )
    states = {}
    for name, executor in (("local", "LocalExecutor"), ("ours", OURS)):
        airflow.env["AIRFLOW__CORE__EXECUTOR"] = executor
        scheduler = airflow.start_scheduler(name)
        airflow.trigger(name, *dag_ids)
        for dag_id in dag_ids:
            airflow.wait_for_run(dag_id, name, 900)
        states[name] = {dag_id: airflow.task_states(dag_id, name) for dag_id in dag_ids if dag_id not in RANDOM}
        scheduler.stop(30)
    assert states["ours"] == states["local"]
    assert sum(map(len, states["ours"].values())) > count
