"""Publishers that import nothing of ours get a task run through ``leoflow.dispatch``, as docs/publishing.md says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leoflow_celery.domain.states import TaskState
from tests.support.http_target import HttpTarget
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task

PUBLISHERS = Path(__file__).parent / "publishers"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, shared_redis: RedisServer) -> Iterator[System]:
    with System(tmp_path_factory.mktemp("system"), shared_redis.url()) as system:
        system.start_workers("workers.inline", "workers.control")
        yield system


@pytest.fixture
def system(running: System) -> System:
    running.shown_on_failure()
    return running


@pytest.fixture
def target() -> Iterator[HttpTarget]:
    with HttpTarget() as http_target:
        yield http_target


def publish(system: System, publisher: str, request: dict[str, Any], *more: str) -> dict[str, Any]:
    """Run a publisher as a process of its own; what its task id got."""
    command = [sys.executable, str(PUBLISHERS / publisher), system.broker_url, json.dumps(request), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=PUBLISHERS)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("publisher", ["raw_redis.py", "with_kombu.py"])
def test_a_foreign_publisher_gets_its_task_run_and_its_id_completed(
    system: System, target: HttpTarget, publisher: str
) -> None:
    request = http_task(target.url("a"))
    meta = publish(system, publisher, request)
    assert (meta["status"], meta["result"]) == ("SUCCESS", {"path": "/200/a", "call": 1})
    view = system.client.task_instance(request["task_instance_id"])
    assert view.state is TaskState.SUCCESS
    # The try has an id of its own; the publisher's waited beside it.
    assert meta["task_id"] != view.celery_task_id
    assert system.client.app.AsyncResult(view.celery_task_id).get(timeout=20) == meta["result"]


def test_a_failed_task_has_its_reason_as_data(system: System, target: HttpTarget) -> None:
    meta = publish(system, "raw_redis.py", http_task(target.url("a", status=404), "gone"))
    assert meta["status"] == "FAILURE"
    assert (meta["result"]["exc_module"], meta["result"]["exc_type"]) == ("leoflow_celery.errors", "TaskFailed")
    reason, message, exit_code, task = meta["result"]["exc_message"]
    assert (reason, exit_code, task) == ("http_status", None, "d.t-gone")
    assert "404" in message


def test_an_invalid_request_has_its_field_as_data(system: System) -> None:
    meta = publish(system, "raw_redis.py", http_task("http://127.0.0.1:1/", timeout_seconds=-1))
    assert (meta["status"], meta["result"]["exc_type"]) == ("FAILURE", "InvalidRequest")
    message, field = meta["result"]["exc_message"]
    assert field == "timeout_seconds"
    assert "-1" in message


@pytest.mark.parametrize("priority", range(10))
def test_every_priority_has_a_list_that_is_served(system: System, target: HttpTarget, priority: int) -> None:
    assert publish(system, "raw_redis.py", http_task(target.url("a")), str(priority))["status"] == "SUCCESS"


def test_a_sealed_request_needs_no_more_than_a_fernet_token(system: System, target: HttpTarget) -> None:
    request = http_task(target.url("a"))
    sealed = {"sealed": system.client.services.keys.sealer("dispatch").seal(request)}
    assert publish(system, "raw_redis.py", sealed)["result"]["call"] == 1
    assert publish(system, "with_kombu.py", request)["result"]["call"] == 1
    assert target.calls["a"] == 1
