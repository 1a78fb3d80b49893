"""A message that never reached its worker: SQL remembers the try, and maintenance sends it (again)."""

from __future__ import annotations

import time

import pytest
import sqlalchemy as sa

from leoflow_celery.client import Client
from leoflow_celery.domain.attempt import LaunchReport
from leoflow_celery.domain.request import parse_request
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import BrokerUnavailable, TaskFailed
from leoflow_celery.queueing.messages import seal_request
from leoflow_celery.store.models import TaskInstance, table_of
from leoflow_celery.store.submissions import NewTry
from tests.support.http_target import HttpTarget
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task
from tests.support.waiting import wait_until

BASH = {
    "task_instance_id": "ti-1",
    "dag_id": "d",
    "run_id": "r",
    "task_id": "t",
    "operator": "bash",
    "entrypoint": "true",
}


def test_a_submit_without_a_broker_is_recorded_and_sent_later(
    own_system: System, redis_server: RedisServer, target: HttpTarget
) -> None:
    client = own_system.client
    redis_server.stop()
    request = http_task(target.url("a"))
    with pytest.raises(BrokerUnavailable, match=f"127.0.0.1:{redis_server.port}.*recorded as queued"):
        client.submit(request)
    view = client.task_instance(request["task_instance_id"])
    assert (view.state, view.sent_at) == (TaskState.QUEUED, None)

    redis_server.start()
    own_system.start_worker("workers.lite")

    def ended() -> bool:
        own_system.maintain("send_due")
        return client.task_instance(request["task_instance_id"]).is_terminal

    wait_until(ended, 30, "send_due", interval=0.5)
    assert client.app.AsyncResult(view.celery_task_id).get(timeout=20)["call"] == 1
    assert client.task_instance(request["task_instance_id"]).launch == 1


def test_a_backlog_of_any_size_is_sent_at_once(own_system: System) -> None:
    client, count, long_ago = own_system.client, 501, time.time() - 60
    requests = [parse_request({**BASH, "task_instance_id": f"ti-{n}", "task_id": f"t-{n}"}) for n in range(count)]
    tries = [NewTry(one, ExecutorType.SUBPROCESS, seal_request(client.services.keys, one)) for one in requests]
    client.services.store.submissions.record(tries)
    with client.services.store.database.transaction() as connection:
        connection.execute(sa.update(table_of(TaskInstance)).values(queued_at=long_ago))
    own_system.start_worker("workers.control")
    own_system.maintain("send_due")
    wait_until(lambda: client.services.queues.depth("subprocess") == count, 60, "all to be sent")
    wait_until(lambda: client.services.store.submissions.unsent(0) == [], 20, "all to be marked as sent")


def test_submitting_again_sends_what_was_recorded_without_a_broker(
    own_system: System, redis_server: RedisServer, target: HttpTarget
) -> None:
    redis_server.stop()
    request = http_task(target.url("a"))
    with pytest.raises(BrokerUnavailable):
        own_system.client.submit(request)
    redis_server.start()
    own_system.start_worker("workers.lite")
    handle = own_system.client.submit(request)
    assert not handle.created
    assert handle.get(timeout=20)["call"] == 1


def reap_until(system: System, client: Client, identity: str, launch: int) -> None:
    def relaunched() -> bool:
        system.maintain("reap")
        view = client.task_instance(identity)
        return view.launch >= launch or view.is_terminal

    wait_until(relaunched, 30, f"launch {launch}", interval=0.3)


def test_a_try_whose_message_was_lost_is_launched_again(own_system: System, target: HttpTarget) -> None:
    client = own_system.client
    handle = client.submit(http_task(target.url("a")))
    own_system.redis.flushdb()
    own_system.start_worker("workers.lite")
    reap_until(own_system, client, handle.attempt.task_instance_id, 2)
    assert handle.get(timeout=20)["call"] == 1
    view = handle.task_instance()
    assert (view.state, view.launch, view.try_number) == (TaskState.SUCCESS, 2, 1)
    relaunched = [event for event in client.events(view.task_instance_id) if event.event == "relaunched"]
    assert [event.details["reason"] for event in relaunched] == ["launch_lost"]


def test_the_relaunch_budget_ends_in_a_failure_with_the_reason(own_system: System, target: HttpTarget) -> None:
    client = own_system.client
    handle = client.submit(http_task(target.url("a")))
    own_system.start_worker("workers.control")
    for launch in (1, 2):
        wait_until(lambda: handle.task_instance().sent_at is not None, 20, f"launch {launch} to be sent")
        own_system.redis.delete("leoflow:inline", "leoflow:inline\x06\x163")
        reap_until(own_system, client, handle.attempt.task_instance_id, launch + 1)
    with pytest.raises(TaskFailed) as caught:
        handle.get(timeout=20)
    assert caught.value.reason == "launch_lost"
    assert "its message is lost" in caught.value.message
    assert (handle.task_instance().launch, target.calls["a"]) == (2, 0)


def test_a_launch_whose_report_waits_is_not_taken_for_lost(own_system: System) -> None:
    """The message is gone and nobody has recorded the start, but nobody has collected its note."""
    client, keys = own_system.client, ("leoflow:k8s", "leoflow:k8s\x06\x163")
    handle = client.submit({**BASH, "executor": "kubernetes"})
    own_system.redis.delete(*keys)
    client.services.launch_notes.leave("k8s", LaunchReport(handle.attempt, "pod", "node", "kubernetes"))
    lost_after = own_system.settings.maintenance.lost_message_seconds
    wait_until(lambda: list(client.services.store.reaper_queries.waiting(lost_after)), 20, "the reaper to look at it")
    reaper = own_system.start_worker("workers.control", "-Q", "maintenance")
    for _ in range(3):
        own_system.maintain("reap")
    wait_until(lambda: client.services.queues.depth("maintenance") == 0, 20, "the reaper")
    assert handle.task_instance().launch == 1
    reaper.stop(20)
    own_system.start_worker("workers.control", name="all")
    wait_until(lambda: handle.task_instance().launched_at, 20, "the report to be recorded")
    assert handle.task_instance().launch == 1


def test_a_message_that_waits_its_turn_is_not_taken_for_lost(own_system: System, target: HttpTarget) -> None:
    client = own_system.client
    handle = client.submit(http_task(target.url("a")))
    own_system.start_worker("workers.control")
    lost_after = own_system.settings.maintenance.lost_message_seconds
    wait_until(lambda: list(client.services.store.reaper_queries.waiting(lost_after)), 20, "the reaper to look at it")
    for _ in range(3):
        own_system.maintain("reap")
    wait_until(lambda: client.services.queues.depth("maintenance") == 0, 20, "the reaper")
    assert handle.task_instance().launch == 1
    own_system.start_worker("workers.inline")
    assert handle.get(timeout=20)["call"] == 1
