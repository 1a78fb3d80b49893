"""A worker announces the back ends of the queues it consumes, for as long as it has its broker."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any

import pytest

from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.tasks import back_end_presence
from leoflow_celery.tasks.back_end_presence import BackEndPresence, announce

WAIT_SECONDS = 10.0


class Consumer:
    """As much of Celery's consumer as the step touches; ``said`` gets what is announced."""

    def __init__(self, *consumed: str) -> None:
        self.consuming = list(consumed)
        queues = SimpleNamespace(consume_from=dict.fromkeys(consumed))
        self.app = SimpleNamespace(amqp=SimpleNamespace(queues=queues))
        self.task_consumer: Any = SimpleNamespace(consuming_from=lambda name: name in self.consuming)
        self.said: queue.Queue[str] = queue.Queue()

    def call_soon(self, call: Any, *arguments: Any) -> None:
        call(*arguments)

    def add_task_queue(self, name: str) -> None:
        self.consuming.append(name)


@pytest.fixture(autouse=True)
def hosts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The host of each back end; one that is not in it does not answer."""
    known = {"docker": "h1", "kubernetes": ""}

    def executor_of(_: Any, executor_type: ExecutorType) -> Any:
        if executor_type not in known:
            raise ConfigurationError("does not answer")
        return SimpleNamespace(host=known[executor_type])

    def publisher(app: Any, _services: Any) -> Any:
        return SimpleNamespace(present=lambda message, _: app.said.put(str(message.back_end)))

    monkeypatch.setattr(back_end_presence, "executor_of", executor_of)
    monkeypatch.setattr(back_end_presence, "Publisher", publisher)
    monkeypatch.setattr(back_end_presence, "services_of", lambda app: app)
    return known


def made(*consumed: str) -> Any:
    consumer = Consumer(*consumed)
    consumer.app.said = consumer.said
    return consumer


def test_each_back_end_is_announced_at_once_and_with_the_next_connection_again() -> None:
    consumer = made("docker", "k8s", "results")
    step = BackEndPresence(consumer)
    for _ in range(2):
        step.start(consumer)
        assert {consumer.said.get(timeout=WAIT_SECONDS) for _ in range(2)} == {"docker:h1", "kubernetes"}
        step.stop(consumer)
        assert all(one.stop(WAIT_SECONDS) for one in step._announcing)
    assert consumer.said.empty()


def test_one_that_does_not_answer_holds_no_other_up(hosts: dict[str, str]) -> None:
    del hosts["docker"]
    consumer = made("docker", "k8s")
    step = BackEndPresence(consumer)
    step.start(consumer)
    assert consumer.said.get(timeout=WAIT_SECONDS) == "kubernetes"
    step.stop(consumer)
    assert all(one.stop(WAIT_SECONDS) for one in step._announcing)


@pytest.mark.parametrize(("consumed", "expected"), [("docker", True), ("k8s", True), ("inline", False)])
def test_other_workers_have_no_such_step(consumed: str, expected: bool) -> None:
    consumer = made(consumed)
    assert BackEndPresence(consumer).include_if(consumer) is expected


def test_the_hosts_own_queue_is_consumed_before_the_back_end_is_announced() -> None:
    consumer = made("docker")
    for _ in range(2):
        announce(consumer, ExecutorType.DOCKER)
        assert consumer.consuming == ["docker", "docker.h1"]
    consumer.consuming.remove("docker.h1")
    announce(consumer, ExecutorType.DOCKER)
    assert consumer.consuming == ["docker", "docker.h1"], "a worker that lost its broker forgot it"


def test_without_a_connection_the_next_word_does_it() -> None:
    consumer = made("docker")
    consumer.task_consumer = None
    announce(consumer, ExecutorType.DOCKER)
    assert consumer.consuming == ["docker"]
