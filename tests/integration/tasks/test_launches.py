"""From a launch to its record: a note stands before the message is acknowledged, and none is forgotten."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.tasks.back_ends import SETTINGS, BackEnds
from tests.support.redis_server import RedisServer
from tests.support.system import System
from tests.support.waiting import wait_until

MANY = 40


@pytest.fixture
def back_ends(tmp_path: Path, redis_server: RedisServer) -> Iterator[BackEnds]:
    """A system in which nothing runs yet."""
    with System(tmp_path, redis_server.url(), **SETTINGS) as system:
        yield BackEnds(system)


def unacknowledged(back_ends: BackEnds) -> int:
    return int(back_ends.redis.hlen("leoflow:unacked.k8s"))


def test_many_launches_are_recorded_without_a_message_each(back_ends: BackEnds) -> None:
    handles = [back_ends.submit("kubernetes", f"t{number}") for number in range(MANY)]
    back_ends.start("k8s")
    back_ends.wait_for_calls("execute", MANY)
    wait_until(lambda: unacknowledged(back_ends) == 0, 20, "all messages to be acknowledged")
    assert back_ends.client.services.launch_notes.waiting() == MANY
    back_ends.system.start_worker("workers.control")
    for handle in handles:
        back_ends.wait_until_launched(handle)
        assert handle.state() == "queued"
        wait_until(lambda handle=handle: handle.result.state == "STARTED", 20, "STARTED")


def test_a_worker_that_shuts_down_has_reported_and_acknowledged_what_it_launched(back_ends: BackEnds) -> None:
    handles = [back_ends.submit("kubernetes", f"t{number}") for number in range(MANY)]
    worker = back_ends.start("k8s")
    back_ends.wait_for_calls("execute", 1)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    launched = {details["task"] for _, details in back_ends.calls("execute")}
    back_ends.system.start_worker("workers.control")
    of_task = {handle.task_instance().task_id: handle for handle in handles}
    for task in launched:
        back_ends.wait_until_launched(of_task[task])
    wait_until(lambda: unacknowledged(back_ends) == 0, 20, "all messages to be acknowledged")
    assert back_ends.client.services.queues.depth("k8s") == MANY - len(launched)


def test_a_worker_that_is_killed_before_its_report_leaves_its_message_to_the_next(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    settings = {**SETTINGS, "BROKER_VISIBILITY_TIMEOUT_SECONDS": 2}
    with System(tmp_path, redis_server.url(), **settings) as system:
        back_ends = BackEnds(system)
        back_ends.redis.set("held_launch", 1)
        handle = back_ends.submit("kubernetes", "t")
        worker = back_ends.start("k8s")
        wait_until(lambda: back_ends.redis.exists("busy"), 60, "the launch to be held")
        back_ends.redis.config_set("maxmemory", 1)  # the broker takes no message, and would take an acknowledgement
        back_ends.redis.delete("held_launch")
        worker.wait_for_line("Retrying leoflow_celery.tasks.launch._leave_patiently", 20)
        worker.kill()
        back_ends.redis.config_set("maxmemory", 0)
        assert unacknowledged(back_ends) == 1
        back_ends.start("k8s", name="next")
        back_ends.wait_for_calls("execute", 2, launch=1)
        system.start_worker("workers.control")
        back_ends.wait_until_launched(handle)
        wait_until(lambda: unacknowledged(back_ends) == 0, 60, "the message to be acknowledged")
