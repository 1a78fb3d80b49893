"""Completing several ids: one that cannot be completed holds nobody up, a broker that is away stops at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, signature
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, ResponseError

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.xcom import XComValue
from leoflow_celery.errors import DatabaseUnavailable
from leoflow_celery.store import Store
from leoflow_celery.store.completions import Waiting
from leoflow_celery.tasks import completion
from tests.support.waiting import wait_until


class Completions:
    def __init__(self, *names: str, context: dict[str, Any] | None = None) -> None:
        self.names, self.finished, self.put_off, self.groups = names, [], [], []
        self.context = context or {}

    def take(self, *_: object) -> list[Waiting]:
        return [Waiting(name, "ti", 1, self.context, None) for name in self.names]

    def failed(self, waiting: Waiting) -> float:
        self.put_off.append(waiting.celery_task_id)
        return 30

    def done(self, completed: list[Waiting]) -> None:
        self.finished += [item.celery_task_id for item in completed]
        self.groups.append(len(completed))


class Parts:
    """As many services as completing needs."""

    def __init__(self, **store: Any) -> None:
        self.store = SimpleNamespace(**store)
        self.parts: dict[type, Any] = {}

    def part(self, kind: type, build: Any) -> Any:
        return self.parts.setdefault(kind, build())

    def close(self) -> None:
        for part in self.parts.values():
            part.close()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Completions:
    return Completions("a", "b", "c")


def run(monkeypatch: pytest.MonkeyPatch, store: Completions, error: Exception) -> int:
    def complete(app: Any, item: Waiting, ended: Any) -> None:
        if item.celery_task_id == "b":
            raise error

    monkeypatch.setattr(completion, "complete", complete)
    monkeypatch.setattr(completion, "_with_value", lambda *_: None)
    attempts = SimpleNamespace(ended=lambda _: [SimpleNamespace(task_instance_id="ti", try_number=1)])
    services: Any = Parts(completions=store, attempts=attempts)
    try:
        return completion.complete_due(SimpleNamespace(), services)
    finally:
        services.close()


def called_by_kombu(cause: Exception) -> OperationalError:
    """As kombu raises it: it takes every error of Redis for one of the connection."""
    error = OperationalError(str(cause))
    error.__cause__ = cause
    return error


WRONG_TYPE = ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")


@pytest.mark.parametrize("error", [KeyError("task"), WRONG_TYPE, called_by_kombu(WRONG_TYPE)], ids=repr)
def test_one_that_cannot_be_completed_holds_nobody_up(monkeypatch, store, error):
    assert run(monkeypatch, store, error) == 2
    assert store.finished == ["a", "c"]
    assert store.put_off == ["b"]


@pytest.mark.parametrize(
    "error",
    [
        RedisConnectionError("away"),
        ReadOnlyError("a replica"),
        OperationalError("away"),
        called_by_kombu(RedisConnectionError("away")),
        DatabaseUnavailable("away"),
        ConnectionResetError(),
    ],
    ids=repr,
)
def test_a_backend_that_is_away_stops_the_round_and_keeps_what_is_done(monkeypatch, store, error):
    with pytest.raises(type(error)):
        run(monkeypatch, store, error)
    assert (store.finished, store.put_off) == (["a"], [])


def test_an_errback_is_sent_again_under_its_own_id(monkeypatch):
    """A worker that is killed before the completion is done sends it twice; who looks at ids runs it once."""
    monkeypatch.setattr(completion, "send_failed", lambda *_: None)
    errbacks = [signature("plain"), signature("named", task_id="mine")]
    item = Waiting("a", "ti", 1, {"task": "t", "errbacks": json.loads(json.dumps(errbacks))}, None)
    with Celery("t", broker="memory://", backend="cache+memory://") as app:
        for _ in range(2):
            completion.complete(app, item, completion.Ended(View(state=TaskState.FAILED, reason="timeout")))
        with app.connection_for_read() as connection, connection.SimpleQueue("celery") as queue:
            headers = [queue.get(block=False).headers for _ in range(4)]
    ids = [(one["task"], one["id"]) for one in headers]
    assert ids[:2] == ids[2:]
    assert [ids[0][0], ids[1]] == ["plain", ("named", "mine")]


class Backend:
    def __init__(self) -> None:
        self.results: dict[str, tuple[str, Any]] = {}

    def mark_as_done(self, task_id: str, value: Any, **_: Any) -> None:
        self.results[task_id] = ("SUCCESS", value)

    def mark_as_failure(self, task_id: str, error: Exception, **_: Any) -> None:
        self.results[task_id] = ("FAILURE", error)

    def store_result(self, task_id: str, value: Any, state: str) -> None:
        self.results[task_id] = (state, value)


ATTEMPT = AttemptId("ti")


@dataclass
class View:
    """As much of a try as completion reads."""

    celery_task_id: str = "a"
    task_instance_id: str = "ti"
    state: TaskState = TaskState.SUCCESS
    reason: str | None = None
    message: str = ""
    exit_code: int | None = 0
    attempt: AttemptId = ATTEMPT
    tenant_id: str = "default"
    dag_id: str = "d"
    run_id: str = "r"
    task_id: str = "t"
    operator: str = "bash"
    try_number: int = 1
    started_at: float | None = None
    ended_at: float | None = None


def world(value: XComValue) -> tuple[Any, Any]:
    """Services with one try that succeeded and left this value, and its app."""
    completions = Completions("a")
    attempts = SimpleNamespace(ended=lambda _: [View()])
    store = SimpleNamespace(completions=completions, attempts=attempts, xcom=SimpleNamespace(get=lambda _: value))
    store.return_value = lambda view: Store.return_value(store, view)
    return Parts(**vars(store)), SimpleNamespace(backend=Backend())


@pytest.mark.parametrize("value", [b"hello", b"[" * 985 + b"]" * 985, b"[" * 5_000, b"\xff", b"1e999"])
def test_a_value_that_nobody_can_read_ends_as_a_failure_and_is_not_tried_for_ever(monkeypatch, value):
    monkeypatch.setattr(completion, "send_failed", lambda *_: None)
    services, app = world(XComValue(value))
    assert completion.complete_due(app, services) == 1
    services.close()
    assert (services.store.completions.finished, services.store.completions.put_off) == (["a"], [])
    state, error = app.backend.results["a"]
    assert (state, error.reason) == ("FAILURE", "invalid_xcom")
    assert error.message.startswith("the task succeeded, but its return value cannot be read: ")

    app.backend.results.clear()
    completion.store_result(app, services, View())
    assert app.backend.results["a"][0] == "FAILURE"


def test_a_value_that_its_writer_called_text_is_the_result(monkeypatch):
    monkeypatch.setattr(completion, "send_succeeded", lambda *_: None)
    services, app = world(XComValue(b"hello", "text/plain"))
    assert completion.complete_due(app, services) == 1
    assert app.backend.results["a"] == ("SUCCESS", "hello")


def test_what_sends_callbacks_is_marked_at_once_in_small_groups(monkeypatch):
    store = Completions(*(f"n{number}" for number in range(13)), context={"callbacks": [{"task": "next"}]})
    assert run(monkeypatch, store, KeyError("nobody's")) == 13
    assert store.groups == [5, 5, 3]


def test_what_has_only_its_result_is_marked_together_a_moment_later(monkeypatch):
    store = Completions(*(f"n{number}" for number in range(13)))
    assert run(monkeypatch, store, KeyError("nobody's")) == 13
    assert sorted(store.finished) == sorted(store.names)
    assert len(store.groups) < 13


def test_marks_that_the_database_did_not_take_are_made_later_without_being_asked():
    refused: list[int] = []
    store = Completions("a", "b")

    def mark(told: Any) -> None:
        if not refused:
            refused.append(len(told))
            raise DatabaseUnavailable("away")
        store.done(told)

    marks = completion.DoneMarks(mark)
    for item in store.take():
        marks.put(item)
    wait_until(lambda: store.finished == ["a", "b"], timeout=10)
    marks.close()
    assert refused


def test_what_a_lease_no_longer_covers_is_left_to_the_next_worker(monkeypatch):
    store, clock = Completions("a", "c", "d"), iter([0.0, 1.0, 9.0, 11.0])
    monkeypatch.setattr(completion, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert run(monkeypatch, store, KeyError("nobody's")) == 2
    assert store.finished == ["a", "c"]
