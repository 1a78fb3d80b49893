"""A host runs so many attempts at once; the messages of the others wait in the queue, where other hosts take them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from leoflow_celery.domain.states import TaskState
from tests.support.process import ManagedProcess
from tests.support.redis_server import RedisServer
from tests.support.system import System, wait_for_worker
from tests.support.waiting import wait_until

LIMIT, MANY = 3, 10


@pytest.fixture
def system(tmp_path: Path, redis_server: RedisServer) -> Iterator[System]:
    with System(
        tmp_path, redis_server.url(), SUBPROCESS_MAX_RUNNING=LIMIT, BROKER_VISIBILITY_TIMEOUT_SECONDS=5
    ) as system:
        system.start_gateway()
        system.start_workers("workers.control", "workers.subprocess")
        yield system


def other_host(system: System, directory: Path) -> ManagedProcess:
    """A worker with a state directory of its own counts what runs there, as one on another host would."""
    command = (sys.executable, "-m", "celery", "-A", "workers.subprocess", "worker", "-l", "INFO", "-n", "other@%h")
    worker = system.start("other", *command, env={"LEOFLOW_SUBPROCESS_STATE_DIR": str(directory)})
    wait_for_worker(worker)
    return worker


def test_a_full_host_leaves_messages_to_other_hosts(system: System, tmp_path: Path) -> None:
    starts, go = tmp_path / "starts", tmp_path / "go"
    starts.touch()
    requests = [
        {
            "task_instance_id": f"ti-{number}",
            "dag_id": "d",
            "run_id": "r",
            "task_id": f"t{number}",
            "operator": "bash",
            "entrypoint": f"echo {number} >>{starts}; until [ -e {go} ]; do sleep 0.05; done",
        }
        for number in range(MANY)
    ]

    def running() -> list[str]:
        return starts.read_text().split()

    def waiting() -> int:
        return system.client.services.queues.waiting("subprocess")

    handles = system.client.submit_many(requests)
    wait_until(lambda: len(running()) == LIMIT, 30, lambda: f"{LIMIT} to run, not {running()}")
    wait_until(lambda: waiting() == MANY - LIMIT, 20, lambda: f"{MANY - LIMIT} messages to wait, not {waiting()}")
    # What came along with the last that there was room for went back to its place, and does not count as delivered.
    queued = [
        message for key in system.redis.scan_iter("leoflow:subprocess*") for message in system.redis.lrange(key, 0, -1)
    ]
    assert len(queued) == MANY - LIMIT
    assert [message for message in queued if b'"put_back"' in message] == []
    # In the order in which they came.
    assert sorted(running()) == ["0", "1", "2"]

    # Its successor finds the host as full as it was.
    system.process("workers.subprocess").kill()
    wait_for_worker(system.restart("workers.subprocess"))
    other_host(system, tmp_path / "other-state")
    wait_until(lambda: len(running()) == 2 * LIMIT, 30, lambda: f"{2 * LIMIT} to run, not {running()}")
    wait_until(lambda: waiting() == MANY - 2 * LIMIT, 20, lambda: f"{MANY - 2 * LIMIT} to wait, not {waiting()}")
    assert len(list((tmp_path / "attempts" / "attempts").iterdir())) == LIMIT

    go.touch()
    for handle in handles:
        handle.get(timeout=60)
    views = [handle.task_instance() for handle in handles]
    assert {(view.state, view.attempt.launch) for view in views} == {(TaskState.SUCCESS, 1)}
    assert sorted(running(), key=int) == [str(number) for number in range(MANY)]
    assert "Task rejected" not in system.process("other").output()
