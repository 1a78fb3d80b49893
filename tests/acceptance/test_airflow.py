"""Airflow 3.3 runs its tasks through us: a real scheduler, API server and DAG processor, and workers on this host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.airflow import Airflow, require_airflow, start_ours
from tests.support.postgres_databases import PostgresDatabases
from tests.support.redis_server import RedisServer
from tests.support.system import System

DAGS = Path(__file__).parent / "airflow_dags"
#: Short, so that what was killed is found within the test.
SETTINGS = {
    "AGENT_REPORT_DEADLINE_SECONDS": 30,
    "AGENT_KILL_GRACE_SECONDS": 1,
    "GATEWAY_LEASE_SECONDS": 8,
    "MAINTENANCE_HEARTBEAT_TIMEOUT_SECONDS": 8,
    "MAINTENANCE_LOST_MESSAGE_SECONDS": 6,
    "MAINTENANCE_INTERVAL_SECONDS": 2,
    "MAINTENANCE_RELAUNCH_BACKOFF_SECONDS": 0.1,
    "BROKER_VISIBILITY_TIMEOUT_SECONDS": 15,
}


@pytest.fixture(scope="module")
def airflow(
    tmp_path_factory: pytest.TempPathFactory, shared_redis: RedisServer, postgres: PostgresDatabases
) -> Iterator[Airflow]:
    require_airflow()
    ours, theirs = postgres.empty(), postgres.empty()
    directory = tmp_path_factory.mktemp("airflow")
    with System(directory, shared_redis.url(), ours, **SETTINGS) as system:
        made = Airflow(system, theirs, DAGS)
        start_ours(system)
        made.start_api_server()
        made.start_dag_processor()
        made.start_scheduler()
        made.wait_for_dags("values", "ends", "waits")
        yield made
    for url in (ours, theirs):
        postgres.drop(url)


def test_every_kind_of_task_ends_as_it_should(airflow: Airflow) -> None:
    airflow.system.shown_on_failure()
    airflow.trigger("r1", "values", "ends", "waits")
    assert airflow.wait_for_run("values", "r1") == "success"
    assert airflow.task_states("values", "r1") == dict.fromkeys(
        ("numbers", "square[0]", "square[1]", "square[2]", "total"), "success"
    )
    assert airflow.wait_for_run("ends", "r1") == "failed"
    assert airflow.task_states("ends", "r1") == {
        "fails": "failed",
        "after": "upstream_failed",
        "branch": "success",
        "left": "success",
        "right": "skipped",
        "second_try": "success",
    }
    assert airflow.wait_for_run("waits", "r1") == "success"
