"""What a task is told of its run, which values it declared, and a task that releases its place until later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.client import Handle
from leoflow_celery.domain.states import TERMINAL, TaskState
from tests.support.redis_server import RedisServer
from tests.support.system import System
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, shared_redis: RedisServer) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("context")
    for kind, values in (
        ("variables", {"region": "eu", "other": "x"}),
        ("connections", {"db": "db://h", "mq": "mq://h"}),
    ):
        folder = directory / "values" / "tenants" / "default" / kind
        folder.mkdir(parents=True)
        for name, value in values.items():
            (folder / name).write_text(value)
    settings = {
        "MAINTENANCE_INTERVAL_SECONDS": 1,
        "SUBPROCESS_PRELOAD_AGENT": "false",
        "GATEWAY_SECRET_FILES": directory / "values",
        "GATEWAY_ALLOW_INSECURE_SECRETS": "true",
    }
    with System(directory, shared_redis.url(), **settings) as system:
        system.start_gateway()
        system.start_workers("workers.control", "workers.subprocess")
        system.start_beat()
        yield system


def submit(system: System, name: str, **fields: Any) -> Handle:
    values = {"task_instance_id": name, "dag_id": "context", "run_id": "r", "task_id": name, "executor": "subprocess"}
    return system.client.submit({**values, "operator": "bash", **fields})


def ended(handle: Handle) -> Handle:
    wait_until(lambda: handle.state() in TERMINAL, 60)
    return handle


def said(system: System, name: str) -> list[str]:
    return [one["msg"] for one in system.client.logs("context", "r", name) if one["stream"] == "stdout"]


def test_a_task_knows_what_its_run_stands_for(system: System) -> None:
    interval = ("DATA_INTERVAL_START", "DATA_INTERVAL_END")
    names = ("TS", "DS", *interval, "PARAMS", "MAX_TRIES", "TRY_NUMBER", "DAG_ID", "RUN_ID", "TASK_ID")
    handle = submit(
        system,
        "facts",
        entrypoint="; ".join(f'echo "$LEOFLOW_{name}"' for name in names),
        logical_date="2030-01-31T00:00:00+00:00",
        data_interval_start="2030-01-30T00:00:00+00:00",
        data_interval_end="2030-01-31T00:00:00+00:00",
        params={"full": True},
        max_tries=3,
    )
    assert ended(handle).state() is TaskState.SUCCESS
    found = dict(zip(names, said(system, "facts"), strict=True))
    assert (found["TS"], found["DS"]) == ("2030-01-31T00:00:00+00:00", "2030-01-31")
    assert found["DATA_INTERVAL_START"] < found["DATA_INTERVAL_END"]
    assert json.loads(found["PARAMS"]) == {"full": True}
    assert [found[name] for name in ("MAX_TRIES", "TRY_NUMBER", "DAG_ID", "RUN_ID", "TASK_ID")] == [
        *("3", "1", "context", "r", "facts")
    ]


@pytest.mark.parametrize(
    ("name", "declared", "shown"),
    [
        ("all", {}, ["eu", "x", "db://h", "mq://h"]),
        ("some", {"variables": ["region"], "connections": ["mq"]}, ["eu", "", "", "mq://h"]),
        ("none", {"variables": [], "connections": []}, ["", "", "", ""]),
    ],
)
def test_what_a_task_declared_is_all_that_it_gets(
    system: System, name: str, declared: dict[str, Any], shown: list[str]
) -> None:
    variables = ("VAR_REGION", "VAR_OTHER", "CONN_DB", "CONN_MQ")
    entrypoint = "; ".join(f'echo "$AIRFLOW_{variable}"' for variable in variables)
    assert ended(submit(system, name, entrypoint=entrypoint, **declared)).state() is TaskState.SUCCESS
    assert said(system, name) == shown


LOOK = """
import datetime, os, pathlib
from leoflow_fake_sdk import AirflowRescheduleException

def look():
    looks = pathlib.Path({looks!r})
    looks.open("a").write(os.environ.get("LEOFLOW_FIRST_RESCHEDULE_AT", "-") + "\\n")
    if len(looks.read_text().split()) < 3:
        raise AirflowRescheduleException(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1))
    return "found"
"""
SDK = """
class AirflowRescheduleException(Exception):
    def __init__(self, reschedule_date):
        self.reschedule_date = reschedule_date
"""


def test_a_sensor_releases_its_place_and_looks_again(system: System, tmp_path: Path) -> None:
    looks = tmp_path / "looks"
    (tmp_path / "leoflow_fake_sdk.py").write_text(SDK)
    (tmp_path / "sensor.py").write_text(LOOK.format(looks=str(looks)))
    handle = submit(
        system, "sensor", operator="python", entrypoint="sensor:look", env={"PYTHONPATH": str(tmp_path)}, max_tries=1
    )
    assert ended(handle).state() is TaskState.SUCCESS
    assert handle.get(timeout=10) == "found"
    first, second, third = looks.read_text().split()
    assert first == "-"
    assert second == third != "-", "when it released its place for the first time"
    view = handle.task_instance()
    assert (view.try_number, view.launch, view.reschedules) == (1, 3, 2)
    text = "\n".join(one["msg"] for one in system.client.logs("context", "r", "sensor"))
    assert "it looks again at" in text


def test_one_that_looks_again_in_an_hour_can_be_cancelled_now(system: System) -> None:
    entrypoint = 'printf "up_for_reschedule\\n%s" "$(date -d "+1 hour" +%s)" >"$LEOFLOW_REASON_PATH"'
    handle = submit(system, "hour", entrypoint=entrypoint)
    wait_until(lambda: handle.task_instance().reschedules == 1, 30)
    assert handle.state() is TaskState.QUEUED
    handle.cancel()
    assert ended(handle).task_instance().reason == "cancelled"
