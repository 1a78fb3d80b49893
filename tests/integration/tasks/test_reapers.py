"""What maintenance gives up, expires and prunes; one worker at a time does it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from leoflow_celery.client import Client
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.request import parse_request
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.xcom import XComKey, XComValue
from leoflow_celery.errors import NotFound, TaskFailed
from leoflow_celery.queueing.messages import seal_request
from leoflow_celery.store.logs import LogKey, LogRecord
from leoflow_celery.store.models import XCom, table_of
from leoflow_celery.store.submissions import NewTry
from tests.support.http_target import HttpTarget
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task
from tests.support.waiting import wait_until

#: Of the reaper under test. Long enough that a live holder on a busy machine is never taken for a silent one.
HEARTBEAT_TIMEOUT_SECONDS = 2
_XCOM = table_of(XCom)


@pytest.fixture
def reaping(tmp_path: Path, shared_redis: RedisServer):
    """A system whose reaper loses patience soon."""
    overrides = {
        "GATEWAY_LEASE_SECONDS": 1.5,
        "MAINTENANCE_HEARTBEAT_TIMEOUT_SECONDS": HEARTBEAT_TIMEOUT_SECONDS,
        "MAINTENANCE_CANCEL_GRACE_SECONDS": 1,
        "MAINTENANCE_RELAUNCH_BACKOFF_SECONDS": 0.1,
        "MAINTENANCE_INTERVAL_SECONDS": 0.5,
    }
    with System(tmp_path, shared_redis.url(), **overrides) as system:
        yield system


def claimed_by_a_dead_worker(client: Client, url: str) -> AttemptId:
    """An attempt that was claimed, and its holder is never heard of again."""
    parsed = parse_request(http_task(url))
    store = client.services.store
    store.submissions.record([NewTry(parsed, ExecutorType.INLINE, seal_request(client.services.keys, parsed))])
    store.submissions.mark_sent([parsed.attempt])
    store.attempts.claim(parsed.attempt, "dead", "host", 1, start=True)
    return parsed.attempt


def test_a_silent_holder_is_agent_lost_and_the_try_runs_again(reaping: System, target: HttpTarget) -> None:
    client = reaping.client
    attempt = claimed_by_a_dead_worker(client, target.url("a"))
    with client.services.store.logs.writer(client.task_instance(attempt.task_instance_id).log_key) as writer:
        writer.append([LogRecord(time.time(), "info", "stdout", "last words")])
    alive = client.submit(http_task(target.hold("alive")))
    reaping.start_worker("workers.lite")
    reaping.start_beat()
    handle_id = client.task_instance(attempt.task_instance_id).celery_task_id
    assert client.app.AsyncResult(handle_id).get(timeout=30)["call"] == 1
    view = client.task_instance(attempt.task_instance_id)
    assert (view.state, view.try_number, view.launch) == (TaskState.SUCCESS, 1, 2)
    events = client.events(attempt.task_instance_id)
    [relaunched] = [event for event in events if event.event == "relaunched"]
    assert (relaunched.details["reason"], relaunched.details["log_tail"]) == ("agent_lost", ["last words"])
    # A call that takes long is kept by its worker's heartbeats, however impatient the reaper.
    assert time.time() - alive.task_instance().queued_at > HEARTBEAT_TIMEOUT_SECONDS
    assert alive.task_instance().launch == 1
    target.release("alive")
    assert alive.get(timeout=20)["call"] == 1


def test_a_cancelled_holder_that_never_stops_ends_cancelled_after_the_grace(
    reaping: System, target: HttpTarget
) -> None:
    client = reaping.client
    attempt = claimed_by_a_dead_worker(client, target.url("a"))
    assert client.cancel(attempt.task_instance_id)
    reaping.start_worker("workers.lite")
    wait_until(
        lambda: reaping.maintain("reap") or client.task_instance(attempt.task_instance_id).is_terminal,
        20, "the reaper", interval=0.3,
    )  # fmt: skip
    view = client.task_instance(attempt.task_instance_id)
    assert (view.state, view.reason, view.launch) == (TaskState.FAILED, "cancelled", 1)
    with pytest.raises(TaskFailed, match="cancelled"):
        client.app.AsyncResult(view.celery_task_id).get(timeout=20)
    assert target.calls["a"] == 0


def test_a_running_call_stops_when_it_is_cancelled(client: Client, target: HttpTarget) -> None:
    handle = client.submit(http_task(target.hold("a")))
    wait_until(lambda: target.calls["a"], 20, "the call")
    assert handle.cancel()
    with pytest.raises(TaskFailed) as caught:
        handle.get(timeout=20)
    assert caught.value.reason == "cancelled"
    assert not handle.cancel()


def test_a_queued_task_that_is_cancelled_never_runs(own_system: System, target: HttpTarget) -> None:
    client = own_system.client
    handle = client.submit(http_task(target.url("a")))
    assert handle.cancel()
    assert (handle.state(), handle.task_instance().reason) == (TaskState.FAILED, "cancelled")
    own_system.start_worker("workers.lite")
    with pytest.raises(TaskFailed, match="cancelled before it ran"):
        handle.get(timeout=20)
    wait_until(lambda: client.services.queues.depth("inline") == 0, 20, "the message to be refused")
    assert target.calls["a"] == 0


def test_maintenance_is_done_by_one_worker_at_a_time(own_system: System) -> None:
    client = own_system.client
    leases = client.services.store.leases
    own_system.start_workers("workers.control")
    own_system.start_worker("workers.control", name="second")
    with leases.single_flight("maintenance.expire_xcoms", 60) as held:
        assert held
        expired = expired_value(client)
        for _ in range(6):
            own_system.maintain("expire_xcoms")
        wait_until(lambda: client.services.queues.depth("maintenance") == 0, 20, "all six to be taken")
        assert is_stored(client, expired), "a worker ignored the lease"
    own_system.maintain("expire_xcoms")
    wait_until(lambda: not is_stored(client, expired), 20, "expiry")


def expired_value(client: Client) -> XComKey:
    """A value pushed longer ago than values live."""
    key = XComKey("default", "d", "r", "old")
    with client.services.store.database.transaction() as connection:
        client.services.store.xcom.put([(key, XComValue(b"1"))], connection)
        connection.execute(sa.update(_XCOM).where(_XCOM.c.task_id == key.task_id).values(expires_at=time.time() - 1))
    return key


def is_stored(client: Client, key: XComKey) -> bool:
    """Whether the row is there, expired or not."""
    with client.services.store.database.reading() as connection:
        return connection.execute(sa.select(_XCOM).where(_XCOM.c.task_id == key.task_id)).first() is not None


def test_an_expired_value_is_not_found_before_it_is_removed(client: Client) -> None:
    key = expired_value(client)
    with pytest.raises(NotFound, match="expired"):
        client.xcom(key.dag_id, key.run_id, key.task_id)


def test_old_logs_are_pruned_and_new_ones_kept(system: System, client: Client) -> None:
    logs, old, new = client.services.store.logs, log_key("old"), log_key("new")
    for key in (old, new):
        with logs.writer(key) as writer:
            writer.append([LogRecord(time.time(), "info", "stdout", "hello")])
    long_ago = time.time() - system.settings.logs.retention_seconds - 60
    os.utime(logs.path(old), (long_ago, long_ago))
    system.maintain("prune_logs")
    wait_until(lambda: not logs.path(old).exists(), 20, "pruning")
    assert [line["msg"] for line in logs.read(new)] == ["hello"]


def log_key(task_id: str) -> LogKey:
    return LogKey("default", "d", "pruned", task_id, 1)
