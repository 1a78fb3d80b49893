"""kill -9 of a control worker in the middle of a maintenance task: another one goes on in seconds."""

from __future__ import annotations

from pathlib import Path

import psycopg

from leoflow_celery.domain.states import TaskState
from tests.support.http_target import HttpTarget
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task
from tests.support.waiting import wait_until

#: Ten seconds of a lease, and what two busy processors add. It used to take two minutes.
SECONDS = 25


def test_what_a_killed_worker_held_is_free_in_seconds(
    tmp_path: Path, shared_redis: RedisServer, postgres_url: str, target: HttpTarget
) -> None:
    overrides = {"MAINTENANCE_LOST_MESSAGE_SECONDS": 0.2, "MAINTENANCE_RELAUNCH_BACKOFF_SECONDS": 0.1}
    with System(tmp_path, shared_redis.url(), postgres_url, **overrides) as system:
        lost = system.client.submit(http_task(target.url("lost")))
        system.redis.flushdb()
        victim = system.start_worker("workers.control", name="victim")
        address = postgres_url.replace("+psycopg", "")
        with psycopg.connect(address) as connection, psycopg.connect(address, autocommit=True) as watching:
            connection.execute("LOCK TABLE task_instance IN ACCESS EXCLUSIVE MODE")
            system.maintain("reap")
            held = "SELECT 1 FROM lease WHERE name = 'maintenance.reap'"
            waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            wait_until(lambda: watching.execute(held).fetchone(), 20, victim.output)
            wait_until(lambda: watching.execute(waits).fetchone(), 20, victim.output)
            victim.kill()
        survivor = system.start_worker("workers.control", name="survivor")
        wait_until(
            lambda: system.maintain("reap") or lost.task_instance().launch == 2, SECONDS, survivor.output, interval=0.5
        )
        assert lost.state() is TaskState.QUEUED
