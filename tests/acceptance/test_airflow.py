"""Airflow 3.3 runs its tasks through us: a real scheduler, API server and DAG processor, and workers on this host."""

from __future__ import annotations

import base64
import contextlib
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from redis.exceptions import ResponseError

from tests.support.airflow import Airflow, require_airflow, start_ours
from tests.support.leaks import keep_process, release_process
from tests.support.postgres_databases import PostgresDatabases
from tests.support.redis_server import RedisServer
from tests.support.system import System
from tests.support.waiting import wait_until

#: More of them take longer (LEOFLOW_TEST_AIRFLOW_TASKS=300 and LEOFLOW_TEST_AIRFLOW_KILLS=100 take --timeout=7200).
TASKS = int(os.environ.get("LEOFLOW_TEST_AIRFLOW_TASKS", "12"))
KILLS = int(os.environ.get("LEOFLOW_TEST_AIRFLOW_KILLS", "5"))
VICTIMS = ("supervisor", "agent", "scheduler", "workers.subprocess", "gateway")
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
        made = Airflow(system, theirs, DAGS, LEOFLOW__ENVIRONMENT="AIRFLOW_VAR_TASKS")
        made.env["AIRFLOW_VAR_TASKS"] = str(TASKS)
        start_ours(system)
        made.start_api_server()
        made.start_dag_processor()
        made.start_scheduler()
        made.wait_for_dags("values", "ends", "waits", "shows", "counted")
        for one in system.processes:
            keep_process(one.pid)
        yield made
        for one in system.processes:
            release_process(one.pid)
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


def test_the_log_is_in_the_ui_while_the_task_runs_and_the_token_is_nowhere(airflow: Airflow) -> None:
    airflow.system.shown_on_failure()
    airflow.trigger("r2", "shows")
    seen = airflow.home / "seen-r2.txt"
    wait_until(seen.exists, 60, "the task has looked around")
    lines = wait_until(
        lambda: found if "the task has begun" in (found := airflow.log("shows", "r2", "look")) else None, 20, "its log"
    )
    assert lines.count("the task has begun") == 1
    assert _tokens(_everything_shown(airflow)) == []
    assert _tokens(seen.read_text()) == []
    (airflow.home / "go-r2").touch()
    assert airflow.wait_for_run("shows", "r2") == "success"
    lines = airflow.log("shows", "r2", "look")
    assert [lines.count(text) for text in ("the task has begun", "the task is over")] == [1, 1]
    assert not any("http://" in line and "8793" in line for line in lines)


def test_a_task_sees_a_token_where_there_is_one() -> None:
    """The check itself: what the test above would find."""
    body = base64.urlsafe_b64encode(b'{"scope":"workload"}').decode().rstrip("=")
    assert len(_tokens(f"x eyJhbGciOiJIUzUxMiJ9.{body}.c2lnbmVk y")) == 1


def _everything_shown(airflow: Airflow) -> str:
    """Arguments and environment of all processes, everything in Redis, and every log."""
    parts = []
    for process in psutil.process_iter():
        for read in (process.cmdline, lambda process=process: [f"{k}={v}" for k, v in process.environ().items()]):
            with contextlib.suppress(psutil.Error):
                parts += read()
    redis = airflow.system.redis
    for key in redis.scan_iter():
        with contextlib.suppress(ResponseError):
            parts.append(str(redis.dump(key)))
    files = [one for one in airflow.system.directory.rglob("*") if one.suffix in (".log", ".out", ".txt")]
    return "\n".join([*parts, *(one.read_text(errors="replace") for one in files)])


def _tokens(text: str) -> list[str]:
    """The tokens of workloads in a text."""
    found = re.findall(r"eyJ[\w-]+\.(eyJ[\w-]+)\.[\w-]+", text)
    bodies = [base64.urlsafe_b64decode(one + "=" * (-len(one) % 4)).decode(errors="replace") for one in found]
    return [one for one in bodies if '"workload"' in one]


def test_what_is_killed_runs_again_once_and_costs_no_retry(airflow: Airflow) -> None:
    """kill -9 of agents, supervisors, the worker, the gateway and the scheduler, with retries=0."""
    airflow.system.shown_on_failure()
    dice = random.Random()
    airflow.trigger("r3", "counted")
    folder = airflow.home / "counted-r3"
    for number in range(KILLS):
        begun = number + 1
        wait_until(
            lambda begun=begun: (
                len(_lines(folder / "starts")) >= begun or airflow.run_state("counted", "r3") != "running"
            ),
            60,
            "tasks begin",
        )
        _kill_one(airflow, VICTIMS[number % len(VICTIMS)], dice)
    assert airflow.wait_for_run("counted", "r3", 60 + 20 * KILLS) == "success"
    assert set(airflow.task_states("counted", "r3").values()) == {"success"}
    assert sorted(set(_lines(folder / "ends")), key=int) == [str(number) for number in range(TASKS)]
    assert not (folder / "overlaps").exists()
    tries = airflow.query("SELECT max(try_number) FROM task_instance WHERE dag_id = 'counted'")
    assert tries == [(1,)]
    told = airflow.query("SELECT extra FROM log WHERE event LIKE 'leoflow: %%'")
    assert told, "the audit log says why tasks were given back"


def _lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def _kill_one(airflow: Airflow, victim: str, dice: random.Random) -> None:
    if victim in ("supervisor", "agent"):
        ours = [one for one in psutil.process_iter(["cmdline"]) if _is(one, victim)]
        if ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                dice.choice(ours).kill()
        return
    process = airflow.system.process(victim)
    process.kill()
    airflow.system.restart(victim)


def _is(process: psutil.Process, kind: str) -> bool:
    """A supervisor is named by Airflow; an agent is a child of the fork server."""
    with contextlib.suppress(psutil.Error):
        line = " ".join(process.cmdline())
        if kind == "supervisor":
            return line.startswith("airflow supervisor")
        parent = process.parent()
        return (
            "leoflow_celery.agent.forkserver" in line
            and parent is not None
            and "forkserver" in " ".join(parent.cmdline())
        )
    return False
