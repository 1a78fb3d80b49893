"""What a scheduler sees of an inline task through Celery: value, failure, state, callbacks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, signature
from celery.result import AsyncResult

from leoflow_celery.client import Client, Handle
from leoflow_celery.domain.attempt import AttemptId, LaunchReport
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import parse_request
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import TaskFailed
from leoflow_celery.store.logs import LogRecord
from leoflow_celery.store.submissions import NewTry
from tests.integration.tasks.conftest import UserCalls
from tests.support.http_target import HttpTarget
from tests.support.system import System, http_task
from tests.support.waiting import wait_until


def plain_app(system: System) -> Celery:
    """A Celery app that knows the broker and nothing of ours."""
    app = Celery("plain", broker=system.broker_url, backend=system.broker_url)
    app.conf.result_backend_transport_options = {"global_keyprefix": "leoflow:"}
    return app


def test_get_returns_the_value(client: Client, target: HttpTarget) -> None:
    handle = client.submit(http_task(target.url("a")))
    assert handle.get(timeout=20) == {"path": "/200/a", "call": 1}
    assert handle.result.state == "SUCCESS"
    view = handle.task_instance()
    assert (view.state, view.launch, view.reason) == (TaskState.SUCCESS, 1, None)
    assert [event.event for event in client.events(view.task_instance_id)] == ["submitted", "claimed", "finished"]


def test_get_raises_task_failed_with_the_reason(client: Client, target: HttpTarget) -> None:
    handle = client.submit(http_task(target.url("a", status=404)))
    with pytest.raises(TaskFailed) as caught:
        handle.get(timeout=20)
    assert caught.value.reason == "http_status"
    assert "404" in caught.value.message
    assert caught.value.task.startswith("d.t-")
    assert handle.state() is TaskState.FAILED
    assert handle.task_instance().log_tail[-1].startswith("http_status: ")


def test_a_plain_celery_app_rebuilds_value_and_failure(system: System, target: HttpTarget) -> None:
    good = system.client.submit(http_task(target.url("a")))
    bad = system.client.submit(http_task(target.url("b", status=410)))
    app = plain_app(system)
    assert AsyncResult(good.id, app=app).get(timeout=20)["path"] == "/200/a"
    with pytest.raises(TaskFailed) as caught:
        AsyncResult(bad.id, app=app).get(timeout=20)
    assert (caught.value.reason, caught.value.exit_code) == ("http_status", None)
    app.close()


def test_state_is_started_while_the_call_runs(client: Client, target: HttpTarget) -> None:
    handle = client.submit(http_task(target.hold("a")))
    wait_until(lambda: target.calls["a"], 20, "the call")
    wait_until(lambda: handle.result.state == "STARTED", 10, lambda: f"STARTED, not {handle.result.state}")
    assert handle.state() is TaskState.RUNNING
    target.release("a")
    assert handle.get(timeout=20)["call"] == 1
    assert handle.result.state == "SUCCESS"


def test_links_of_submit_are_called(client: Client, target: HttpTarget, user_calls: UserCalls) -> None:
    link = signature("user.call_of", queue="user")
    link_error = signature("user.note", queue="user")
    good = client.submit(http_task(target.url("a")), link=link, link_error=link_error)
    assert good.get(timeout=20)["call"] == 1
    assert user_calls.wait_for("user.call_of") == [[{"path": "/200/a", "call": 1}]]
    assert user_calls.of("user.note") == []


def test_an_errback_of_submit_is_called_with_the_id(client: Client, target: HttpTarget, user_calls: UserCalls) -> None:
    link_error = signature("user.note", queue="user")
    bad = client.submit(http_task(target.url("a", status=400)), link=signature("user.call_of"), link_error=[link_error])
    [arguments] = user_calls.wait_for("user.note")
    assert bad.id in arguments
    assert user_calls.of("user.call_of") == []


def test_the_result_callback_hears_the_end_once(
    system: System, client: Client, target: HttpTarget, user_calls: UserCalls
) -> None:
    identity = secrets.token_hex(8)
    callback = {"task": "user.note", "queue": "user"}
    handle = client.submit(http_task(target.url("a", status=400), identity, result_callback=callback))
    with pytest.raises(TaskFailed):
        handle.get(timeout=20)
    [[event]] = user_calls.wait_for("user.note")
    expected = {
        "task_instance_id": identity,
        "try_number": 1,
        "launch": 1,
        "dag_id": "d",
        "state": "failed",
        "reason": "http_status",
        "failure_class": "user",
        "celery_task_id": handle.id,
        "exit_code": None,
    }
    assert {key: event[key] for key in expected} == expected
    assert event["started_at"] <= event["ended_at"]

    client.publisher.advance_try(identity, 1)
    system.maintain("complete_due")
    after = client.submit(http_task(target.url("b"), result_callback=callback))
    assert after.get(timeout=20)
    events = user_calls.wait_for("user.note", 2)
    assert [event["task_instance_id"] for [event] in events] == [identity, after.attempt.task_instance_id]


@pytest.fixture
def nothing_waits(system: System) -> Iterator[None]:
    """Messages that no worker of this system takes are not left to the next one on its broker."""
    yield
    for key in system.redis.scan_iter("*k8s*"):
        if system.redis.type(key) == b"list":
            system.redis.delete(key)


def waiting_pod(client: Client, **fields: Any) -> Handle:
    """A try that nobody runs: there is no worker of its queue."""
    identity = secrets.token_hex(8)
    ids = {"task_instance_id": identity, "dag_id": "d", "run_id": identity, "task_id": "t"}
    return client.submit({**ids, "operator": "bash", "entrypoint": "true", "executor": "kubernetes", **fields})


def record(client: Client, handle: Handle, return_value: object, exit_code: object = 0) -> None:
    """Report a success that was found in a termination log."""
    tell_end(client, handle, {**Outcome.success().to_json(), "exit_code": exit_code}, return_value)


def tell_end(client: Client, handle: Handle, outcome: dict[str, Any], return_value: object = None) -> None:
    """Say as a Kubernetes worker how an attempt ended, in whatever form."""
    said = {"attempt": handle.attempt.to_json(), "outcome": outcome, "unclaimed": False, "host": ""}
    content = {"purpose": "ended", "at": time.time(), "message": {**said, "return_value": return_value}}
    payload = {"speaker": "k8s", "sealed": client.services.keys.sealer("k8s").seal(content)}
    client.app.send_task("leoflow.results.record", kwargs=payload, queue="results")


@pytest.mark.usefixtures("nothing_waits")
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[1, 2]", "schema_mismatch"),
        *(("{", "invalid_xcom"), ('"\ud800"', "invalid_xcom")),
        ('{"a": "' + "x" * 300_000 + '"}', "payload_too_large"),
    ],
    ids=lambda value: str(value)[:12].encode(errors="replace").decode(),
)
def test_a_value_that_was_found_passes_the_same_checks_as_a_pushed_one(
    client: Client, value: object, reason: str
) -> None:
    handle = waiting_pod(client, xcom_schema={"type": "object"})
    record(client, handle, value)
    with pytest.raises(TaskFailed) as caught:
        handle.get(timeout=20)
    assert caught.value.reason == reason


@pytest.mark.usefixtures("nothing_waits")
def test_a_value_that_was_found_is_the_result(client: Client) -> None:
    handle = waiting_pod(client, xcom_schema={"type": "object"})
    record(client, handle, '{"a": 1}', exit_code=2**40)
    assert handle.get(timeout=20) == {"a": 1}
    assert handle.task_instance().exit_code is None


@pytest.mark.usefixtures("nothing_waits")
def test_the_end_of_a_try_whose_request_cannot_be_opened_is_recorded_all_the_same(client: Client) -> None:
    """A sealing key may be taken away while a task runs; the task did its work."""
    identity = secrets.token_hex(8)
    ids = {"task_instance_id": identity, "dag_id": "d", "run_id": identity, "task_id": "t"}
    request = parse_request({**ids, "operator": "bash", "entrypoint": "true"})
    [submitted] = client.services.store.submissions.record([NewTry(request, ExecutorType.KUBERNETES, "unsealable")])
    record(client, Handle(client, submitted.attempt, submitted.celery_task_id, True), "1")
    assert client.app.AsyncResult(submitted.celery_task_id).get(timeout=20) == 1


@pytest.mark.usefixtures("nothing_waits")
@pytest.mark.parametrize(("found", "kept"), [((), ("shipped",)), (("found",), ("found",))])
def test_a_failure_that_was_found_without_lines_keeps_the_last_that_were_shipped(
    client: Client, found: tuple[str, ...], kept: tuple[str, ...]
) -> None:
    handle = waiting_pod(client)
    with client.services.store.logs.writer(handle.task_instance().log_key) as writer:
        writer.append([LogRecord(time.time(), "info", "stdout", "shipped")])
    outcome = Outcome.failed(FailureReason.NON_ZERO_EXIT, "exit 3", 3, log_tail=found)
    tell_end(client, handle, outcome.to_json())
    with pytest.raises(TaskFailed, match="exit 3"):
        handle.get(timeout=20)
    assert handle.task_instance().log_tail == kept


def test_the_end_of_an_attempt_that_nobody_knows_is_left_alone(system: System, client: Client) -> None:
    before = len(system.output())
    stranger = Handle(client, AttemptId(secrets.token_hex(8)), "no-id", False)
    record(client, stranger, "1")
    known = f"record.unknown attempt={stranger.attempt}"
    wait_until(lambda: known in system.output(), 20, "a line about it")
    assert "Traceback" not in system.output()[before:]


@pytest.mark.usefixtures("nothing_waits")
def test_a_launch_reported_after_the_end_writes_the_result_again(client: Client) -> None:
    """A worker that is killed after it wrote STARTED over a failure leaves the message to the next one."""
    handle = waiting_pod(client)
    assert handle.cancel()
    with pytest.raises(TaskFailed, match="cancelled"):
        handle.get(timeout=20)
    client.app.backend.store_result(handle.id, {}, "STARTED")
    client.services.launch_notes.leave("k8s", LaunchReport(handle.attempt, "pod", "node", "kubernetes"))
    fresh = AsyncResult(handle.id, app=client.app)
    wait_until(lambda: fresh.state == "FAILURE", 20, lambda: f"FAILURE, not {fresh.state}")


def test_a_call_that_takes_too_long_is_a_timeout(client: Client, target: HttpTarget) -> None:
    handle = client.submit(http_task(target.hold("a"), timeout_seconds=1))
    with pytest.raises(TaskFailed) as caught:
        handle.get(timeout=20)
    assert caught.value.reason == "timeout"
    assert handle.task_instance().launch == 1
