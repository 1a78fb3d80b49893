"""The database goes away while an inline call is under way: its answer waits, and the call is not made again."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from leoflow_celery.domain.states import TaskState
from tests.support.http_target import HttpTarget
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task
from tests.support.waiting import wait_until


def test_an_answer_waits_for_the_database(tmp_path: Path, redis_server: RedisServer, target: HttpTarget) -> None:
    with System(tmp_path, redis_server.url(), DATABASE_TIMEOUT_SECONDS=0.5) as system:
        system.start_workers("workers.inline", "workers.control")
        handle = system.client.submit(http_task(target.hold("a")))
        wait_until(lambda: target.calls["a"] and handle.state() is TaskState.RUNNING, 20, "the call is under way")
        locker = sqlite3.connect(tmp_path / "leoflow.db", isolation_level=None)
        locker.execute("BEGIN IMMEDIATE")
        try:
            target.release("a")
            system.processes[0].wait_for_line("_finish.*DatabaseUnavailable", 30)
        finally:
            locker.execute("ROLLBACK")
            locker.close()
        assert handle.get(timeout=30)["call"] == 1
        assert (target.calls["a"], handle.task_instance().launch) == (1, 1)
