"""A back end that is busy or away: for how long a launch is tried again, and how it is given up."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Reject
from cryptography.fernet import Fernet

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.errors import PermanentLaunchError, TransientLaunchError
from leoflow_celery.queueing.messages import Launch, open_message, seal_message
from leoflow_celery.security import KeyRing
from leoflow_celery.tasks import launch
from leoflow_celery.tasks.launch import OUTAGE_SECONDS, next_try_seconds
from tests.unit.executors.kubernetes.built import SETTINGS

ATTEMPT = AttemptId("ti-1", 2, 3)
REQUEST = TaskRequest.model_validate(
    {"task_instance_id": "ti-1", "dag_id": "d", "run_id": "r", "task_id": "t", "operator": "bash", "entrypoint": "true"}
)
KEYS = KeyRing(Fernet.generate_key().decode())
BUSY = TransientLaunchError(FailureReason.LAUNCH_FAILED, "the server is busy")
FULL = TransientLaunchError(FailureReason.QUEUED_TIMEOUT, "exceeded quota: few")


class Retried(Exception):
    """The message was sent again."""


def sealed_launch() -> dict[str, Any]:
    return {"sealed": seal_message(KEYS, "k8s", Launch(ATTEMPT, REQUEST))}


@dataclass
class Queue:
    """A task whose tries follow each other on a clock of its own, as Celery would have them."""

    queued_timeout_seconds: float = 3_600
    now: float = 1_000_000.0
    retries: int = 0
    kwargs: dict[str, Any] = field(
        default_factory=lambda: {"sealed": seal_message(KEYS, "k8s", Launch(ATTEMPT, REQUEST))}
    )
    delays: list[float] = field(default_factory=list)
    reported: list[tuple[Outcome, bool]] = field(default_factory=list)

    name = "leoflow.execute.kubernetes"
    app = Celery(set_as_current=False)

    @property
    def publisher(self) -> Any:
        return SimpleNamespace(attempt_ended=lambda _, ended: self.reported.append((ended.outcome, ended.unclaimed)))

    @property
    def request(self) -> Any:
        return SimpleNamespace(retries=self.retries, kwargs=self.kwargs)

    @property
    def services(self) -> Any:
        maintenance = SimpleNamespace(queued_timeout_seconds=self.queued_timeout_seconds)
        settings = SimpleNamespace(maintenance=maintenance, kubernetes=SETTINGS)
        return SimpleNamespace(settings=settings, keys=KEYS)

    def opened(self, kind: type[Launch], sealed: str, scope: str) -> Launch:
        return open_message(KEYS, scope, kind, sealed)

    def retry(self, countdown: float, exc: Exception, kwargs: dict[str, Any]) -> Exception:
        self.delays.append(countdown)
        self.now += countdown
        self.retries, self.kwargs = self.retries + 1, kwargs
        raise Retried from exc

    def deliver_until_over(self) -> None:
        task: Any = self
        while True:
            with contextlib.suppress(Retried):
                assert launch.launch(task, **self.kwargs) == "not launched"
                return


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    made = Queue()
    monkeypatch.setattr(launch.time, "time", lambda: made.now)
    return made


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    def fail_with(error: Exception) -> None:
        def start(*_: Any) -> None:
            raise error

        monkeypatch.setattr(launch, "_start", start)

    return fail_with


@pytest.mark.parametrize("jitter", [min, max, random.uniform])
def test_an_outage_of_five_minutes_is_survived_and_a_longer_one_is_reported(
    queue: Queue, failing: Callable[[Exception], None], monkeypatch: pytest.MonkeyPatch, jitter: Any
) -> None:
    monkeypatch.setattr(launch.random, "uniform", jitter)
    failing(BUSY)
    queue.deliver_until_over()
    assert OUTAGE_SECONDS <= sum(queue.delays) <= OUTAGE_SECONDS + 60
    assert len(queue.delays) <= 16, "a server that is busy is not asked all the time"
    ((outcome, unclaimed),) = queue.reported
    assert (outcome.reason, unclaimed) == (FailureReason.LAUNCH_FAILED, True)
    tries, seconds = len(queue.delays) + 1, sum(queue.delays)
    assert outcome.message == f"the server is busy (given up after {tries} attempts to start in {seconds:.0f} s)"


def test_a_used_up_quota_is_waited_for_as_long_as_in_a_queue(
    queue: Queue, failing: Callable[[Exception], None]
) -> None:
    failing(FULL)
    queue.deliver_until_over()
    assert 3_600 <= sum(queue.delays) <= 3_660
    assert queue.reported[0][0].reason is FailureReason.QUEUED_TIMEOUT


def test_without_a_queued_timeout_a_quota_is_waited_for_for_ever() -> None:
    assert next_try_seconds(retries=100_000, tried_seconds=10**7, patience_seconds=float("inf")) is not None


def test_what_the_server_asks_for_is_waited_at_least(queue: Queue, failing: Callable[[Exception], None]) -> None:
    failing(TransientLaunchError(FailureReason.LAUNCH_FAILED, "too many requests", retry_after_seconds=45))
    queue.deliver_until_over()
    assert min(queue.delays) == 45
    assert len(queue.delays) <= 7


def test_a_message_keeps_the_rest_of_what_it_carries(queue: Queue, failing: Callable[[Exception], None]) -> None:
    started_at = queue.now
    failing(BUSY)
    queue.deliver_until_over()
    assert open_message(KEYS, "k8s", Launch, queue.kwargs["sealed"]) == Launch(ATTEMPT, REQUEST, started_at)


@pytest.mark.parametrize("retries", range(12))
def test_delays_double_up_to_a_minute_and_half_of_one_is_chance(retries: int) -> None:
    delays = [next_try_seconds(retries, 0, 1) or 0 for _ in range(200)]
    backoff = min(2**retries, 60)
    assert backoff / 2 <= min(delays) < max(delays) <= backoff


def test_a_failure_that_cannot_be_reported_goes_back_to_the_broker(
    queue: Queue, failing: Callable[[Exception], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(*_: Any, **__: Any) -> None:
        raise OSError("no broker")

    monkeypatch.setattr(type(queue), "publisher", SimpleNamespace(attempt_ended=report))
    failing(PermanentLaunchError(FailureReason.INVALID_SPEC, "no such field"))
    with pytest.raises(Reject) as caught:
        queue.deliver_until_over()
    assert caught.value.requeue
