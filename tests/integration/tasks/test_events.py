"""What a monitor sees: one start and one end per task instance, under the id that the scheduler holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from leoflow_celery.client import Client
from leoflow_celery.errors import TaskFailed
from tests.support.http_target import HttpTarget
from tests.support.monitor import Monitor
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task
from tests.support.waiting import wait_until


@pytest.fixture
def monitor(client: Client) -> Iterator[Monitor]:
    with Monitor(client.app) as receiver:
        yield receiver


def test_a_success_is_seen_once_with_its_runtime(
    system: System, client: Client, monitor: Monitor, target: HttpTarget
) -> None:
    handle = client.submit(http_task(target.url("a")))
    handle.get(timeout=20)
    [succeeded] = monitor.wait_for(handle.id, "task-succeeded")
    assert "2 keys" in succeeded["result"]
    assert 0 <= succeeded["runtime"] < 20
    assert "inline@" in succeeded["hostname"]
    assert monitor.of(handle.id, "task-started")
    assert not monitor.of(handle.id, "task-failed")


def test_a_failure_is_seen_once_with_its_reason(client: Client, monitor: Monitor, target: HttpTarget) -> None:
    handle = client.submit(http_task(target.url("a", status=404)))
    with pytest.raises(TaskFailed):
        handle.get(timeout=20)
    [failed] = monitor.wait_for(handle.id, "task-failed")
    assert "http_status" in failed["exception"]
    assert failed["hostname"].startswith("inline@")
    monitor.wait_for(handle.id, "task-started")
    assert [event["type"] for event in monitor.events if event.get("uuid") == handle.id][-1] == "task-failed"


def test_a_dispatch_message_ends_in_the_monitor_when_its_try_ends(
    client: Client, monitor: Monitor, target: HttpTarget
) -> None:
    held = target.hold("a")
    result = client.app.send_task("leoflow.dispatch", (http_task(held),), queue="dispatch")
    wait_until(lambda: target.calls["a"], 20, "the call")
    assert not monitor.of(result.id, "task-succeeded")
    target.release("a")
    [succeeded] = monitor.wait_for(result.id, "task-succeeded")
    assert succeeded["hostname"].startswith("inline@")


def test_a_process_that_ends_with_its_task_has_told_the_end(tmp_path: Path, shared_redis: RedisServer) -> None:
    """Each completion ends its process; its events would go out a moment later."""
    with System(tmp_path, shared_redis.url()) as system:
        system.start_gateway()
        system.start_worker("workers.subprocess")
        system.start_worker("workers.control", "-P", "processes", "-c", "1", "--max-tasks-per-child=1")
        with Monitor(system.client.app) as monitor:
            tasks = [
                {**http_task(""), "operator": "bash", "entrypoint": "true", "http_request": None} for _ in range(3)
            ]
            handles = [system.client.submit(task) for task in tasks]
            for handle in handles:
                handle.get(timeout=60)
            for handle in handles:
                assert len(monitor.wait_for(handle.id, "task-succeeded")) == 1
