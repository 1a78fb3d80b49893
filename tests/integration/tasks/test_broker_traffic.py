"""What our messages cost the broker, and what of it a monitor hears."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.support.http_target import HttpTarget
from tests.support.monitor import Monitor
from tests.support.system import System, http_task
from tests.support.waiting import wait_until


@pytest.fixture
def monitor(own_system: System) -> Iterator[Monitor]:
    with Monitor(own_system.client.app) as receiver:
        yield receiver


def test_many_requests_leave_in_few_packets(own_system: System, target: HttpTarget) -> None:
    def packets() -> int:
        return int(own_system.redis.info("stats")["total_reads_processed"])

    own_system.client.submit(http_task(target.url("a")))
    before = packets()
    handles = own_system.client.submit_many([http_task(target.url("a")) for _ in range(120)])
    assert packets() - before < 60, "a message and its event, each by itself, would be 240"
    assert all(handle.task_instance().sent_at for handle in handles)
    assert own_system.client.services.queues.depth("inline") == 121


def test_a_connection_that_broke_since_its_last_use_costs_no_request(own_system: System, target: HttpTarget) -> None:
    client = own_system.client
    client.submit_many([http_task(target.url("a")) for _ in range(3)])
    assert own_system.redis.client_kill_filter(_type="normal", skipme=True)
    handles = client.submit_many([http_task(target.url("a")) for _ in range(70)])
    assert all(handle.task_instance().sent_at for handle in handles)
    own_system.start_workers("workers.inline", "workers.control")
    for handle in handles:
        handle.get(timeout=30)
    assert target.calls["a"] == 73


def test_a_monitor_hears_of_users_tasks_only(own_system: System, monitor: Monitor, target: HttpTarget) -> None:
    own_system.start_workers("workers.inline", "workers.control")
    own_system.maintain("reap")
    control = own_system.process("workers.control")
    wait_until(lambda: "leoflow.maintenance.reap" in control.output() and "succeeded" in control.output(), 20, "reap")
    handle = own_system.client.submit(http_task(target.url("a"), "call"))
    handle.get(timeout=20)
    monitor.wait_for(handle.id, "task-succeeded")
    for kind in ("task-sent", "task-received", "task-started"):
        assert monitor.of(handle.id, kind), kind
    heard = {event["name"] for event in monitor.events if "name" in event}
    assert heard == {"d.t-call"}


def test_what_ends_while_its_worker_shuts_down_is_heard_of(
    own_system: System, monitor: Monitor, target: HttpTarget
) -> None:
    worker = own_system.start_worker("workers.inline")
    handle = own_system.client.submit(http_task(target.hold("a")))
    wait_until(lambda: target.calls["a"], 20, "the call")
    worker.send_signal(signal.SIGTERM)
    worker.wait_for_line("Warm shutdown", 20)
    target.release("a")
    assert worker.wait(20) == 0
    monitor.wait_for(handle.id, "task-succeeded")
    assert own_system.client.services.queues.depth("inline") == 0, "it was acknowledged: nobody gets it again"
