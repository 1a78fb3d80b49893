"""An agent that is not ours, under our gateway and executors: same states, true reasons, every line once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.client import Handle
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from tests.support.redis_server import RedisServer
from tests.support.system import System
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "SUBPROCESS_PRELOAD_AGENT": "false",
    "MAINTENANCE_INTERVAL_SECONDS": 1,
    "MAINTENANCE_MAX_RELAUNCHES": 1,
    "MAINTENANCE_RELAUNCH_BACKOFF_SECONDS": 0.1,
}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, shared_redis: RedisServer) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("foreign")
    agent = directory / "agent"
    agent.write_text(f"#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tests.support.foreign_agent\n")
    agent.chmod(0o755)
    with System(directory, shared_redis.url(), SUBPROCESS_AGENT_PATH=agent, **SETTINGS) as system:
        system.start_gateway()
        system.start_workers("workers.control", "workers.subprocess")
        system.start_beat()
        yield system


def run(system: System, name: str, **fields: Any) -> Handle:
    values = {"task_instance_id": name, "dag_id": "foreign", "run_id": "r", "task_id": name, "executor": "subprocess"}
    handle = system.client.submit({**values, "operator": "bash", **fields})
    wait_until(lambda: handle.state() in (TaskState.SUCCESS, TaskState.FAILED, TaskState.SKIPPED), 60, name)
    return handle


def lines(system: System, name: str) -> list[tuple[str, str]]:
    return [(one["stream"], one["msg"]) for one in system.client.logs("foreign", "r", name)]


def test_each_line_of_both_streams_is_there_once(system: System) -> None:
    handle = run(system, "both", entrypoint="for n in $(seq 50); do echo out-$n; echo err-$n >&2; done")
    assert handle.state() is TaskState.SUCCESS
    found = lines(system, "both")
    assert sorted(text for stream, text in found if stream == "stdout") == sorted(f"out-{n}" for n in range(1, 51))
    assert sorted(text for stream, text in found if stream == "stderr") == sorted(f"err-{n}" for n in range(1, 51))


def test_values_go_in_and_out(system: System) -> None:
    assert run(system, "up", entrypoint='printf %s \'{"rows": 3}\' >"$LEOFLOW_RETURN_VALUE_PATH"').state() == "success"
    entrypoint = 'echo "got $LEOFLOW_XCOM_ROWS"'
    assert run(system, "down", entrypoint=entrypoint, xcom_input={"rows": "up"}).state() is TaskState.SUCCESS
    assert [text for _, text in lines(system, "down")] == ['got {"rows": 3}']


@pytest.mark.parametrize(
    ("name", "value", "schema", "reason"),
    [
        ("schema", "[1]", {"type": "object"}, FailureReason.SCHEMA_MISMATCH),
        ("words", "no JSON", None, FailureReason.INVALID_XCOM),
    ],
)
def test_a_refused_value_is_the_reason(system: System, name: str, value: str, schema: Any, reason: str) -> None:
    found = run(
        system, name, entrypoint=f"echo '{value}' >\"$LEOFLOW_RETURN_VALUE_PATH\"", xcom_schema=schema
    ).task_instance()
    assert (found.state, found.reason, found.exit_code) == (TaskState.FAILED, reason, 0)
    assert found.attempt.launch == 1


def test_the_users_failure_is_the_users(system: System) -> None:
    found = run(system, "three", entrypoint="echo bad row >&2; exit 3").task_instance()
    assert (found.state, found.reason, found.exit_code) == (TaskState.FAILED, FailureReason.NON_ZERO_EXIT, 3)
    assert found.attempt.launch == 1


def test_a_task_of_our_runtime_skips_itself(system: System, tmp_path: Path) -> None:
    (tmp_path / "skipping.py").write_text(
        "class AirflowSkipException(Exception): pass\ndef look(): raise AirflowSkipException('nothing new')\n"
    )
    found = run(
        system, "skip", operator="python", entrypoint="skipping:look", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ).task_instance()
    assert (found.state, found.message) == (TaskState.SKIPPED, "nothing new")
    assert system.client.xcoms("foreign", "r") is not None
    assert "skip" not in {task for task, *_ in system.client.xcoms("foreign", "r")}


def test_a_call_that_it_cannot_make_is_tried_once(system: System) -> None:
    found = run(
        system, "http", operator="http_api", http_request={"method": "GET", "url": "http://127.0.0.1:9/"}
    ).task_instance()
    assert (found.state, found.reason) == (TaskState.FAILED, FailureReason.INVALID_SPEC)
    assert "run inline" in (found.message or "")
    assert found.attempt.launch == 1


def test_an_end_that_it_cannot_report_is_the_agents_not_the_tasks(system: System, tmp_path: Path) -> None:
    """The task succeeds while the gateway is away for longer than this agent waits."""
    marker, go_on = tmp_path / "began", tmp_path / "go-on"
    handle = system.client.submit(
        {
            "task_instance_id": "away",
            "dag_id": "foreign",
            "run_id": "r",
            "task_id": "away",
            "executor": "subprocess",
            "operator": "bash",
            "entrypoint": f"echo x >>{marker}; while [ ! -e {go_on} ]; do sleep 0.05; done",
        }
    )
    wait_until(lambda: marker.exists() and handle.state() is TaskState.RUNNING, 30)
    gateway = system.process("gateway")
    gateway.kill()
    gateway.wait(30)
    go_on.touch()
    wait_until(lambda: handle.task_instance().attempt.launch == 2, 60, lambda: system.output())
    system.restart("gateway")
    wait_until(lambda: handle.state() in (TaskState.SUCCESS, TaskState.FAILED), 60)
    assert handle.state() is TaskState.SUCCESS
    assert marker.read_text().split() == ["x", "x"]
