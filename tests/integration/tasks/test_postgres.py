"""The same over PostgreSQL, in short: submit, dispatch, a chord, a failure, maintenance."""

from __future__ import annotations

from pathlib import Path

import pytest
from celery import chord, group, signature

from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import TaskFailed
from tests.support.http_target import HttpTarget
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task
from tests.support.waiting import wait_until


def test_tasks_run_and_complete_over_postgresql(
    tmp_path: Path, shared_redis: RedisServer, postgres_url: str, target: HttpTarget
) -> None:
    overrides = {"MAINTENANCE_LOST_MESSAGE_SECONDS": 0.2, "MAINTENANCE_RELAUNCH_BACKOFF_SECONDS": 0.1}
    with System(tmp_path, shared_redis.url(), postgres_url, **overrides) as system:
        client = system.client
        lost = client.submit(http_task(target.url("lost")))
        system.redis.flushdb()
        system.start_worker("workers.lite")
        assert client.submit(http_task(target.url("a"))).get(timeout=20)["call"] == 1
        with pytest.raises(TaskFailed, match="http_status"):
            client.submit(http_task(target.url("b", status=404))).get(timeout=20)

        names = ("c", "d", "e")
        header = [signature("leoflow.dispatch", (http_task(target.url(name)),), app=client.app) for name in names]
        body = signature("leoflow.dispatch", (http_task(target.url("body")),), immutable=True, app=client.app)
        assert chord(group(header), app=client.app)(body).get(timeout=30)["path"] == "/200/body"

        wait_until(lambda: system.maintain("reap") or lost.state() is TaskState.SUCCESS, 30, "reaping", interval=0.3)
        assert (lost.task_instance().launch, lost.get(timeout=20)["call"]) == (2, 1)
