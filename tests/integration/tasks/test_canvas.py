"""Chains, groups and chords over ``leoflow.dispatch``: a task instance is a Celery task like any other."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, chord, group, signature
from celery.canvas import Signature
from celery.exceptions import ChordError

from leoflow_celery.client import Client
from leoflow_celery.errors import InvalidRequest, TaskFailed
from tests.integration.tasks.conftest import UserCalls
from tests.support.http_target import HttpTarget
from tests.support.system import http_task
from tests.support.waiting import wait_until

Request = dict[str, Any]


def dispatched(client: Client, request: Request) -> Signature[Any]:
    """A task instance as a Celery signature that takes nothing from the one before."""
    return signature("leoflow.dispatch", args=(request,), immutable=True, app=client.app, queue="dispatch")


def user(client: Client, name: str, *args: Any) -> Signature[Any]:
    return signature(name, args=args, app=client.app, queue="user")


def test_a_chain_runs_in_order_and_continues_on_a_users_worker(
    client: Client, target: HttpTarget, user_calls: UserCalls
) -> None:
    held = target.hold("first")
    result = chain(
        dispatched(client, http_task(held)),
        dispatched(client, http_task(target.url("second"))),
        user(client, "user.call_of"),
        user(client, "user.add", 41),
    ).apply_async()
    wait_until(lambda: target.calls["first"], 20, "the first call")
    assert target.calls["second"] == 0
    target.release("first")
    assert result.get(timeout=20) == 42
    assert target.calls == {"first": 1, "second": 1}
    assert user_calls.of("user.call_of") == [[{"path": "/200/second", "call": 1}]]


def test_a_chain_stops_where_a_task_fails(client: Client, target: HttpTarget, user_calls: UserCalls) -> None:
    first = dispatched(client, http_task(target.url("a", status=404)))
    result = chain(first, user(client, "user.call_of")).apply_async(link_error=user(client, "user.note"))
    assert result.parent is not None
    with pytest.raises(TaskFailed, match="http_status"):
        result.parent.get(timeout=20)
    user_calls.wait_for("user.note")
    assert user_calls.of("user.call_of") == []


def test_a_group_gives_every_value(client: Client, target: HttpTarget) -> None:
    result = group(dispatched(client, http_task(target.url(name))) for name in "abc").apply_async()
    assert [value["path"] for value in result.get(timeout=20)] == ["/200/a", "/200/b", "/200/c"]


def test_the_body_of_a_chord_runs_once_after_all_three(
    client: Client, target: HttpTarget, user_calls: UserCalls
) -> None:
    held = target.hold("c")
    header = [dispatched(client, http_task(url)) for url in (target.url("a"), target.url("b"), held)]
    result = chord(header)(user(client, "user.collect"))
    wait_until(lambda: target.calls["c"], 20, "the third call")
    wait_until(lambda: result.parent.completed_count() == 2, 20, "two of three")
    assert user_calls.of("user.collect") == []
    target.release("c")
    assert result.get(timeout=20) == ["/200/a", "/200/b", "/200/c"]
    assert len(user_calls.of("user.collect")) == 1


def test_a_failed_member_fails_the_chord_and_calls_its_errback(
    client: Client, target: HttpTarget, user_calls: UserCalls
) -> None:
    urls = (target.url("a"), target.url("b", status=410), target.url("c"))
    body = user(client, "user.collect").on_error(user(client, "user.note"))
    result = chord([dispatched(client, http_task(url)) for url in urls])(body)
    with pytest.raises(ChordError, match="http_status"):
        client.app.AsyncResult(result.id).get(timeout=20)
    [arguments] = user_calls.wait_for("user.note")
    assert result.id in arguments
    assert user_calls.of("user.collect") == []


def test_a_chord_in_a_chain(client: Client, target: HttpTarget) -> None:
    members = group(dispatched(client, http_task(target.url(name))) for name in "bc")
    result = chain(dispatched(client, http_task(target.url("a"))), members, user(client, "user.collect")).apply_async()
    assert result.get(timeout=30) == ["/200/b", "/200/c"]


def test_the_state_of_a_dispatched_task_is_started_until_its_try_ends(client: Client, target: HttpTarget) -> None:
    result = dispatched(client, http_task(target.hold("a"))).apply_async()
    wait_until(lambda: target.calls["a"], 20, "the call")
    assert result.state == "STARTED"
    target.release("a")
    assert result.get(timeout=20)["call"] == 1


def test_an_invalid_member_fails_its_chain_with_the_fields_name(
    client: Client, target: HttpTarget, user_calls: UserCalls
) -> None:
    request = {**http_task(target.url("a")), "timeout_seconds": -1}
    result = chain(dispatched(client, request), user(client, "user.call_of")).apply_async()
    assert result.parent is not None
    with pytest.raises(InvalidRequest, match="timeout_seconds") as caught:
        result.parent.get(timeout=20)
    assert caught.value.field == "timeout_seconds"
    assert (target.calls, user_calls.of("user.call_of")) == ({}, [])
