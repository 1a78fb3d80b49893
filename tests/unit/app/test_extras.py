"""The bootsteps of a worker, each against as much of a worker as it touches; integration tests run them for real."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery.signals import worker_shutdown
from celery.utils.imports import symbol_by_name
from kombu.asynchronous.timer import Timer

from leoflow_celery import metrics
from leoflow_celery.app import create_app
from leoflow_celery.app.extras import AliveFile, CloseServices, MetricsEndpoint, steps_of
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.settings import HealthSettings, MetricsSettings, Settings


def names(queue: str) -> dict[str, set[str]]:
    steps = steps_of([queue])
    return {blueprint: {symbol_by_name(one).__name__ for one in found} for blueprint, found in steps.items()}


@pytest.mark.parametrize(
    ("queue", "worker", "consumer"),
    [
        ("inline", set(), set()),
        ("subprocess", set(), {"Room"}),
        ("results", {"LaunchCollector", "RedisMarks"}, set()),
        ("maintenance", {"Gauges"}, set()),
        ("k8s", set(), {"BackEndPresence"}),
        ("docker", set(), {"BackEndPresence", "Room"}),
    ],
)
def test_a_worker_has_what_its_queues_need(queue: str, worker: set[str], consumer: set[str]) -> None:
    assert names(queue) == {
        "worker": {
            *("LogFields", "BackEndFiles", "BrokerRights", "MetricsEndpoint", "SettledHeap", "CloseServices"),
            "ReadClocks",
        }
        | worker,
        "consumer": {"AliveFile"} | consumer,
    }


def test_an_app_that_only_sends_has_no_steps() -> None:
    with create_app(settings=Settings()) as app:
        assert not any(app.steps.values())
    with create_app("k8s", settings=Settings()) as worker:
        assert {name: set(steps) for name, steps in worker.steps.items()} == steps_of(["k8s"])


@pytest.fixture
def consumer(tmp_path: Path) -> Any:
    settings = Settings(health=HealthSettings(file=tmp_path / "alive"))
    return SimpleNamespace(app=SimpleNamespace(settings=settings), timer=Timer())


def touches(file: Path, consumer: Any) -> bool:
    """Whether the next entry of the worker's timer touches the file."""
    file.unlink(missing_ok=True)
    entries = [one.entry for one in consumer.timer.queue if not one.entry.canceled]
    for entry in entries:
        entry()
    return file.exists()


def test_the_file_is_touched_from_one_connection_to_its_loss_and_again_with_the_next(consumer: Any) -> None:
    file, step = consumer.app.settings.health.file, AliveFile(consumer)
    for _ in range(2):
        step.start(consumer)
        assert file.exists()
        assert touches(file, consumer)
        step.stop(consumer)
        assert not touches(file, consumer)


def test_a_file_that_cannot_be_touched_costs_a_line_and_no_worker(
    consumer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    consumer.app.settings = Settings(health=HealthSettings(file=consumer.app.settings.health.file / "missing"))
    AliveFile(consumer).start(consumer)
    assert [one.message for one in caplog.records] == ["health.not_touched"]


def test_without_a_file_there_is_no_step(consumer: Any) -> None:
    assert AliveFile(consumer).include_if(consumer)
    consumer.app.settings = Settings(health=HealthSettings(file=None))
    assert not AliveFile(consumer).include_if(consumer)


def test_a_port_that_is_taken_costs_the_metrics_and_no_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def taken(port: int) -> None:
        raise ConfigurationError(f"metrics port {port} cannot be used")

    monkeypatch.setattr(metrics, "serve", taken)
    worker = SimpleNamespace(app=SimpleNamespace(settings=Settings(metrics=MetricsSettings(port=9))))
    MetricsEndpoint(worker).start(worker)
    [line] = caplog.records
    assert (line.message, getattr(line, "error", "")) == ("metrics.not_served", "metrics port 9 cannot be used")


class Worker:
    """As much of Celery's worker as closing its services touches: one that has an app."""

    def __init__(self) -> None:
        self.closed = 0
        self.app = SimpleNamespace(close_services=self.close)

    def close(self) -> None:
        self.closed += 1


def test_the_services_are_closed_at_the_end_of_their_own_worker() -> None:
    workers = [Worker(), Worker()]
    for worker in workers:
        CloseServices(worker)
    worker_shutdown.send(sender=workers[1])
    assert [worker.closed for worker in workers] == [0, 1]
