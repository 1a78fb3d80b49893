"""What Celery itself does. A test here that fails says which part of ``leoflow_celery.app.consumer`` can go.

``tests/integration/tasks/test_broker_restart.py`` says it of the forgiving close.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import celery
import pytest
from celery.backends.redis import RedisBackend
from celery.worker import consumer as celery_consumer
from celery.worker import control
from celery.worker.consumer import mingle
from celery.worker.request import Request
from kombu.transport.memory import Channel
from kombu.transport.virtual import Message

from leoflow_celery.app import create_app
from leoflow_celery.app.consumer import Consumer, ResultBackend
from leoflow_celery.app.transport import AMQP
from leoflow_celery.settings import Settings
from tests.support.poison import CANARY, encoded, envelope


def consumer_of(kind: type) -> Any:
    """A consumer without a worker."""
    made: Any = kind.__new__(kind)
    made.strategies, made.on_task_message, made.connection_errors = {}, set(), ()
    made.event_dispatcher = None
    return made


def message_of(body: Any, **changes: Any) -> Any:
    raw = {**envelope("no.such.task"), "body": encoded(body), **changes}
    app = celery.Celery(broker="memory://", set_as_current=False)
    message: Any = Message(raw, channel=Channel(app.connection_for_read().transport))
    message.reject_log_error = lambda *_, **__: setattr(message, "_state", "REJECTED")
    message.ack = lambda *_, **__: setattr(message, "_state", "ACK")
    return message


def test_the_version_is_the_one_that_was_read() -> None:
    assert celery.VERSION[:2] == (5, 7), "read Celery's consumer again, and app/consumer.py with it"


@pytest.mark.parametrize("method", ["on_unknown_message", "on_invalid_task"])
def test_celerys_own_words_print_the_body(method: str, caplog: pytest.LogCaptureFixture) -> None:
    arguments = (ValueError(),) if method == "on_invalid_task" else ()
    getattr(consumer_of(celery_consumer.Consumer), method)(None, message_of([CANARY]), *arguments)
    assert CANARY in caplog.text or "body" in caplog.text


def test_a_body_of_too_few_parts_is_raised_through_the_loop() -> None:
    app = celery.Celery(broker="memory://", set_as_current=False)

    @app.task(name="no.such.task")
    def nothing() -> None: ...

    task = app.tasks[nothing.name]
    with pytest.raises(ValueError, match="not enough values"):
        Request(message_of([]), app=app, task=task)


def test_mingle_believes_what_anybody_says() -> None:
    assert "on_node_reply" in inspect.getsource(mingle.Mingle.sync)
    assert "revoked" in inspect.signature(control.hello).parameters


def test_every_worker_obeys_every_command() -> None:
    assert {"shutdown", "pool_restart", "add_consumer"} <= control.Panel.data.keys()


def test_events_leave_at_every_turn_of_the_loop() -> None:
    assert "call_soon(self._flush_events_promise)" in inspect.getsource(celery_consumer.Consumer.on_send_event_buffered)


def test_an_event_is_sent_of_every_task() -> None:
    source = inspect.getsource(AMQP.__mro__[1].as_task_v2)  # type: ignore[attr-defined]
    assert "if create_sent_event else None" in source


# -- ours -----------------------------------------------------------------------------------------------------------


class Door:
    def __init__(self) -> None:
        self.refused: list[tuple[str, str]] = []

    def refuse_message(self, message: Any, error: Exception) -> None:
        self.refused.append((message.headers["id"], type(error).__name__))


@pytest.fixture
def consumer() -> Any:
    made = consumer_of(Consumer)
    made.door = Door()
    return made


@pytest.mark.parametrize("method", ["on_unknown_message", "on_unknown_task", "on_invalid_task"])
def test_ours_are_refused_at_the_door_and_print_nothing(
    consumer: Any, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    message = message_of([CANARY])
    getattr(consumer, method)(None, message, *(() if method == "on_unknown_message" else (ValueError(CANARY),)))
    assert [celery_id for celery_id, _ in consumer.door.refused] == [message.headers["id"]]
    assert message.acknowledged
    assert CANARY not in caplog.text


@pytest.mark.parametrize("error", [KeyError("id"), TypeError(), ValueError(), RecursionError(), OverflowError()])
def test_what_a_message_surprises_in_celery_ends_nothing(
    consumer: Any, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(*_: Any) -> None:
        raise error

    monkeypatch.setattr(celery_consumer.Consumer, "create_task_handler", lambda *_: raising)
    message = message_of([[], {}, {}])
    consumer.create_task_handler()(message)
    assert consumer.door.refused == [(message.headers["id"], type(error).__name__)]
    assert message.acknowledged


@pytest.mark.parametrize("error", [OSError(), RuntimeError("cannot schedule new futures"), MemoryError()])
def test_what_is_no_messages_fault_is_celerys_to_handle(
    consumer: Any, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(*_: Any) -> None:
        raise error

    monkeypatch.setattr(celery_consumer.Consumer, "create_task_handler", lambda *_: raising)
    with pytest.raises(type(error)):
        consumer.create_task_handler()(message_of([[], {}, {}]))
    assert consumer.door.refused == []


def test_a_consumer_starts_without_news_of_other_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def init(self: Any, *_: Any, **kwargs: Any) -> None:
        self.app = SimpleNamespace()
        seen.update(kwargs)

    monkeypatch.setattr(celery_consumer.Consumer, "__init__", init)
    monkeypatch.setattr("leoflow_celery.app.consumer.Door", lambda _: "door")
    assert Consumer(without_gossip=False).door == "door"
    assert (seen["without_mingle"], seen["without_gossip"]) == (True, True)


class Asked:
    """A Redis of one key that notes what it is asked."""

    def __init__(self, kind: type[RedisBackend]) -> None:
        self.backend: Any = kind(app=celery.Celery(set_as_current=False), url="redis://")
        self.calls: list[str] = []
        self.backend.get = lambda _: self.calls.append("get")
        self.backend._set_with_state = lambda *_: self.calls.append("set")


@pytest.mark.parametrize(
    ("kind", "state", "calls"),
    [
        (RedisBackend, "SUCCESS", ["get", "set"]),
        (ResultBackend, "SUCCESS", ["set"]),
        (ResultBackend, "FAILURE", ["get", "set"]),
        (ResultBackend, "STARTED", ["get", "set"]),
    ],
)
def test_celery_reads_before_it_writes_a_result_and_we_do_not_before_a_success(
    kind: type[RedisBackend], state: str, calls: list[str]
) -> None:
    asked = Asked(kind)
    asked.backend.store_result("an-id", {"some": "value"}, state)
    assert asked.calls == calls


def test_a_worker_has_our_results_and_a_publisher_celerys() -> None:
    with create_app("inline", settings=Settings()) as worker, create_app(settings=Settings()) as publisher:
        assert type(worker.backend) is ResultBackend
        assert type(publisher.backend) is RedisBackend
