"""The deployed form: one process per worker, gateway and beat on PostgreSQL; tasks of both executors; leoflow run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chord, group, signature

from leoflow_celery.client import Client
from leoflow_celery.errors import TaskFailed
from tests.support.http_target import HttpTarget
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task
from tests.support.waiting import wait_until

SOURCE = """
def extract(rows):
    print("extracting", rows)
    return list(range(rows))


def total(values):
    return sum(values)
"""


@pytest.fixture(scope="module")
def deployed(
    tmp_path_factory: pytest.TempPathFactory, shared_redis: RedisServer, request: pytest.FixtureRequest
) -> Iterator[System]:
    postgres = request.getfixturevalue("postgres")
    url = postgres.empty()
    directory = tmp_path_factory.mktemp("deployed")
    with System(directory, shared_redis.url(), url, MAINTENANCE_INTERVAL_SECONDS=2) as system:
        system.start_gateway()
        system.start_workers("workers.subprocess", "workers.inline", "workers.control")
        system.start_beat()
        # The worker's fork server starts with the first task and stays: it is the system's, not a test's.
        system.client.submit(bash("warm-up", "true")).get(timeout=60)
        yield system
    postgres.drop(url)


@pytest.fixture
def system(deployed: System) -> System:
    deployed.shown_on_failure()
    return deployed


@pytest.fixture
def client(system: System) -> Client:
    return system.client


def bash(name: str, command: str, **fields: Any) -> dict[str, Any]:
    identity = {"task_instance_id": name, "dag_id": "d", "run_id": "r", "task_id": name}
    return {**identity, "operator": "bash", "entrypoint": command, **fields}


def python(name: str, entrypoint: str, **fields: Any) -> dict[str, Any]:
    return {**bash(name, entrypoint), "operator": "python", "source": SOURCE, **fields}


def test_leoflow_run_drives_a_dag_on_it(system: System, tmp_path: Path) -> None:
    tasks = [
        {"task_id": "extract", "type": "python", "entrypoint": "dag:extract", "call_args": {"rows": 5}},
        {
            "task_id": "total",
            "type": "python",
            "entrypoint": "dag:total",
            "depends_on": ["extract"],
            "xcom_input": {"values": "extract"},
        },
        {"task_id": "bad", "type": "bash", "entrypoint": "echo going; exit 7", "depends_on": ["extract"]},
        {"task_id": "never", "type": "bash", "entrypoint": "true", "depends_on": ["bad"]},
    ]
    head = {"schema_version": "1.0", "dag_id": "dep", "dag_version": "1", "image": "none", "source": SOURCE}
    (tmp_path / "dag.json").write_text(json.dumps({**head, "tasks": tasks}))
    command = [sys.executable, "-m", "leoflow_celery.cli", "run", str(tmp_path / "dag.json"), "--run-id", "one"]
    ran = subprocess.run(
        command, env={**_path(), **system.env}, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 1, ran.stderr
    views = {view.task_id: view for view in system.client.task_instances("dep", "one")}
    assert {name: view.state.value for name, view in views.items()} == {
        "extract": "success",
        "total": "success",
        "bad": "failed",
        "never": "upstream_failed",
    }
    assert (views["bad"].reason, views["bad"].exit_code) == ("non_zero_exit", 7)
    assert system.client.xcom("dep", "one", "total") == 10
    lines = [line["msg"] for line in system.client.logs("dep", "one", "extract")]
    assert "extracting 5" in lines


def _path() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}


def test_results_callbacks_and_failures_of_agents_reach_the_scheduler(client: Client, tmp_path: Path) -> None:
    value = client.submit(python("value", "dag:extract", call_args={"rows": 3}))
    assert value.get(timeout=30) == [0, 1, 2]
    failed = client.submit(bash("failed", "echo oh no >&2; exit 3"))
    with pytest.raises(TaskFailed, match=r"d\.failed: non_zero_exit: .*3"):
        failed.get(timeout=30)


def test_groups_and_chords_wait_for_agents_and_calls_alike(client: Client, system: System) -> None:
    with HttpTarget() as target:
        members = [
            python("member-a", "dag:extract", call_args={"rows": 1}),
            http_task(target.url("b")),
            bash("member-c", "true"),
        ]
        header = group(_dispatch(client, member) for member in members)
        body = _dispatch(client, bash("chord-body", "true"))
        results = header.apply_async()
        assert results.get(timeout=60) == [[0], {"path": "/200/b", "call": 1}, None]
        done = chord(
            [_dispatch(client, bash(f"chord-{number}", "true")) for number in range(3)], body.clone(immutable=True)
        ).apply_async()
        assert done.get(timeout=60) is None
        order = [client.task_instance(name) for name in ("chord-0", "chord-1", "chord-2", "chord-body")]
        assert max(view.ended_at or 0 for view in order[:3]) <= order[3].queued_at


def _dispatch(client: Client, request: dict[str, Any]) -> Any:
    return signature("leoflow.dispatch", args=[request], immutable=True, app=client.app)


def test_an_http_task_with_execution_mode_pod_is_called_by_an_agent(client: Client) -> None:
    with HttpTarget() as target:
        handle = client.submit(http_task(target.url("pod"), execution_mode="pod"))
        assert handle.get(timeout=30)["path"] == "/200/pod"
        assert handle.task_instance().executor == "subprocess"


def test_cancel_reaches_a_running_agent(client: Client, tmp_path: Path) -> None:
    started = tmp_path / "started"
    handle = client.submit(bash("cancelled", f"touch {started}; exec sleep 300"))
    wait_until(started.exists, 30, "the command starts")
    assert handle.cancel()
    with pytest.raises(TaskFailed, match="cancelled"):
        handle.get(timeout=60)


def test_no_canary_is_readable_anywhere(client: Client, system: System, tmp_path: Path) -> None:
    canary = "canary-6b1f0c2d"
    go, started = tmp_path / "go", tmp_path / "started"
    command = f'test "$SECRET" = {canary[:6]}"$REST" && touch {started}; until [ -e {go} ]; do sleep 0.05; done'
    handle = client.submit(bash("secret", command, env={"SECRET": canary, "REST": canary[6:]}))
    with HttpTarget() as target:
        headers = {"Authorization": f"Bearer {canary}"}
        call = client.submit(http_task(target.url("secret"), method="POST", http={"headers": headers, "body": canary}))
        wait_until(started.exists, 30, "the command sees its secret")
        assert canary not in _everything(system)
        go.touch()
        handle.get(timeout=30)
        call.get(timeout=30)
    assert canary not in _everything(system)


def _everything(system: System) -> str:
    """All of Redis, every process's output and every task log."""
    parts = [system.output()]
    for key in system.redis.scan_iter(count=1_000):
        parts.append(repr(key) + repr(system.redis.dump(key)))
        kind = system.redis.type(key)
        if kind == b"list":
            parts.append(repr(system.redis.lrange(key, 0, -1)))
        elif kind == b"hash":
            parts.append(repr(system.redis.hgetall(key)))
        elif kind == b"string":
            parts.append(repr(system.redis.get(key)))
    parts += [path.read_text(errors="replace") for path in (system.directory / "logs").rglob("*.log")]
    return "\n".join(parts)
