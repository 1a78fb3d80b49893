"""However often a message arrives, the call is made once and every id gets its result once."""

from __future__ import annotations

import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from celery.result import AsyncResult

from leoflow_celery.client import Client
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.request import parse_request
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import TaskFailed
from leoflow_celery.queueing.messages import seal_request
from leoflow_celery.queueing.publisher import LaunchOrder
from leoflow_celery.store.attempts import FinishCondition
from leoflow_celery.store.submissions import NewTry
from leoflow_celery.tasks.completion import complete_try
from tests.integration.tasks.conftest import UserCalls
from tests.support.http_target import HttpTarget
from tests.support.redis_server import RedisServer
from tests.support.system import System, http_task
from tests.support.waiting import wait_until


def test_submitting_twice_starts_once_and_gives_the_same_id(client: Client, target: HttpTarget) -> None:
    request = http_task(target.url("a"))
    first, second = client.submit(request), client.submit(request)
    assert (first.created, second.created) == (True, False)
    assert first.id == second.id
    assert first.get(timeout=20) == second.get(timeout=20)
    assert target.calls["a"] == 1


def test_one_attempt_dispatched_by_two_messages_runs_once_and_completes_both(
    client: Client, target: HttpTarget
) -> None:
    request = http_task(target.hold("a"))
    first = client.app.send_task("leoflow.dispatch", (request,), queue="dispatch")
    second = client.app.send_task("leoflow.dispatch", (request,), queue="dispatch")
    wait_until(lambda: (first.state, second.state) == ("STARTED", "STARTED"), 20, "both messages to wait")
    target.release("a")
    assert first.get(timeout=20) == second.get(timeout=20) == {"path": "/200/a", "call": 1}
    late = client.app.send_task("leoflow.dispatch", (request,), queue="dispatch")
    assert late.get(timeout=20)["call"] == 1
    assert target.calls["a"] == 1


def test_a_launch_message_delivered_again_and_again_makes_one_call(
    system: System, client: Client, target: HttpTarget
) -> None:
    request = parse_request(http_task(target.hold("a")))
    handle = client.submit(request)

    def deliver() -> None:
        client.publisher.launch(LaunchOrder(request, ExecutorType.INLINE, handle.attempt, handle.id))

    wait_until(lambda: target.calls["a"], 20, "the call")
    deliver()
    deliver()
    wait_until(lambda: client.services.queues.depth("inline") == 1, 20, "the repeated messages to be refused")
    assert handle.state() is TaskState.RUNNING
    target.release("a")
    assert handle.get(timeout=20)["call"] == 1
    deliver()
    wait_until(lambda: client.services.queues.depth("inline") == 0, 20, "the late message to be refused")
    assert handle.get(timeout=20)["call"] == 1
    assert (target.calls["a"], handle.result.state) == (1, "SUCCESS")
    assert [event.event for event in client.events(request.task_instance_id)] == ["submitted", "claimed", "finished"]


def ended_but_not_completed(client: Client, request: dict[str, Any]) -> str:
    """A try that a worker ended in SQL and then died; its Celery id."""
    parsed, store = parse_request(request), client.services.store
    [submitted] = store.submissions.record(
        [NewTry(parsed, ExecutorType.INLINE, seal_request(client.services.keys, parsed))]
    )
    store.attempts.claim(parsed.attempt, "dead", "host", 60, start=True)
    store.attempts.finish(parsed.attempt, Outcome.success(), FinishCondition(holder="dead"))
    return submitted.celery_task_id


def test_an_end_that_nobody_completed_is_completed_by_the_sweep(
    system: System, client: Client, target: HttpTarget, user_calls: UserCalls
) -> None:
    callback = {"task": "user.note", "queue": "user"}
    celery_id = ended_but_not_completed(client, http_task(target.url("a"), result_callback=callback))
    result = client.app.AsyncResult(celery_id)
    assert result.state == "PENDING"
    system.maintain("complete_due")
    assert result.get(timeout=20) is None
    system.maintain("complete_due")
    [[event]] = user_calls.wait_for("user.note")
    assert (event["state"], event["celery_task_id"]) == ("success", celery_id)
    assert target.calls["a"] == 0


def test_of_two_completions_at_once_one_does_it(client: Client, target: HttpTarget, user_calls: UserCalls) -> None:
    callback = {"task": "user.note", "queue": "user"}
    identity = secrets.token_hex(8)
    ended_but_not_completed(client, http_task(target.url("a"), identity, result_callback=callback))
    view, together = client.task_instance(identity), threading.Barrier(8)

    def complete(_: int) -> int:
        together.wait(10)
        return complete_try(client.app, client.services, view)

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(complete, range(8))) == [0] * 7 + [1]
    assert len(user_calls.wait_for("user.note")) == 1


def test_a_dispatch_message_that_comes_after_the_end_writes_its_result_again(
    client: Client, target: HttpTarget
) -> None:
    """Two deliveries at once: one wrote STARTED over the result that the other's completion had left, and died."""
    request = http_task(target.url("a", status=404))
    sent = client.app.send_task("leoflow.dispatch", (request,), queue="dispatch")
    with pytest.raises(TaskFailed):
        sent.get(timeout=20)
    client.app.backend.store_result(sent.id, {}, "STARTED")
    client.app.send_task("leoflow.dispatch", (request,), queue="dispatch", task_id=sent.id)
    fresh = AsyncResult(sent.id, app=client.app)
    wait_until(lambda: fresh.state == "FAILURE", 20, lambda: f"FAILURE, not {fresh.state}")
    assert target.calls["a"] == 1


def test_a_log_disk_that_refuses_makes_no_call_twice(
    tmp_path: Path, shared_redis: RedisServer, target: HttpTarget
) -> None:
    (tmp_path / "full").touch()
    with System(tmp_path, shared_redis.url(), LOGS_ROOT=tmp_path / "full") as system:
        system.start_workers("workers.inline", "workers.control")
        good = system.client.submit(http_task(target.url("good"), method="POST"))
        bad = system.client.submit(http_task(target.url("bad", status=400), method="POST"))
        assert good.get(timeout=20)["call"] == 1
        with pytest.raises(TaskFailed) as caught:
            bad.get(timeout=20)
        assert (caught.value.reason, bad.task_instance().launch) == ("http_status", 1)
        assert "log.not_written" in system.output()
    assert (target.calls["good"], target.calls["bad"]) == (1, 1)


def test_a_dispatch_message_that_fails_leaves_nothing_behind(client: Client, target: HttpTarget) -> None:
    request = http_task(target.url("a"), try_number=0)
    result = client.app.send_task("leoflow.dispatch", (request,), queue="dispatch")
    with pytest.raises(Exception, match="try_number"):
        result.get(timeout=20)
    assert client.task_instances("d", "r") == [
        view for view in client.task_instances("d", "r") if view.task_instance_id != request["task_instance_id"]
    ]
