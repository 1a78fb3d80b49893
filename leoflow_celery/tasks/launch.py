"""``leoflow.execute.kubernetes``, ``.docker`` and ``.subprocess``: start an attempt, report that, acknowledge.

These workers have no SQL. What they learn goes to the queue ``results``; the attempt's own Celery result is written
when the attempt ends, so nothing is stored here and the monitor is told nothing of a success.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import current_app
from celery.exceptions import Reject
from celery.worker.request import Request as CeleryRequest

from leoflow_celery import metrics
from leoflow_celery.domain.attempt import AttemptId, LaunchReport
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason, parse_reason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import ExecutorType, executor_of_task, task_name
from leoflow_celery.errors import LeoflowError, PermanentLaunchError, TransientLaunchError, Unsealable
from leoflow_celery.executors.base import Launched, LaunchSpec
from leoflow_celery.tasks.context import LeoflowTask, leoflow_task
from leoflow_celery.tasks.executors import executor_of
from leoflow_celery.tasks.reporting import launch_reports, report_outcome

log = logging.getLogger(__name__)
#: For so long a server may be away; then the launch counts as failed, and spends a relaunch.
OUTAGE_SECONDS = 300.0
_MAX_BACKOFF_SECONDS = 60.0


class OpenRequest(CeleryRequest):
    """A worker's view of a message whose task goes on when its function has returned.

    Its success is no news to a monitor, and it is acknowledged when the broker has the report of the launch. Leaving
    with ``Ignore`` would say the first as well, and cost a formatted traceback: as much as the call to the API server.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reports = launch_reports(self.app or current_app)
        self._reports.will_acknowledge()

    def acknowledge(self) -> None:
        self._reports.acknowledge(super().acknowledge)

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002 - Celery's name for it
        if type != "task-succeeded":
            super().send_event(type, **fields)


class LaunchTask(LeoflowTask):
    """The tasks that start attempts."""

    abstract = True
    Request = f"{__name__}:OpenRequest"


def launch(
    self: LeoflowTask, attempt: dict[str, Any], sealed: str, tried_since: float | None = None, **_summary: Any
) -> str:
    """Start one attempt; what the worker's log says of it.

    A second delivery finds it started; ``tried_since`` is when its first try failed.
    """
    identity, reports = AttemptId.from_json(attempt), launch_reports(self.app)
    reports.begin()
    try:
        launched = _start(self, identity, sealed)
    except TransientLaunchError as error:
        _retry_or_give_up(self, identity, error, time.time() if tried_since is None else tried_since)
    except PermanentLaunchError as error:
        _report_failure(
            self, identity, Outcome.failed(parse_reason(error.reason, FailureReason.INVALID_SPEC), error.message)
        )
    else:
        back_end = BackEnd(executor_of_task(self.name), launched.host)
        host = launched.host or self.runtime.hostname
        with _given_back_on_failure():
            reports.report(LaunchReport(identity, launched.external_name, host, str(back_end)))
        return f"launched {launched.external_name}"
    return "not launched"


@contextmanager
def _given_back_on_failure() -> Iterator[None]:
    """A report that the broker did not take for minutes: the message goes back to it, and is not acknowledged."""
    try:
        yield
    except Exception as error:
        raise Reject(error, requeue=True) from error


def _report_failure(task: LeoflowTask, attempt: AttemptId, outcome: Outcome) -> None:
    with _given_back_on_failure():
        report_outcome(task, attempt, outcome, unclaimed=True)


def _start(task: LeoflowTask, attempt: AttemptId, sealed: str) -> Launched:
    try:
        request = TaskRequest.model_validate(task.runtime.sealer.open(sealed)["request"])
        return _execute(task, LaunchSpec(request, attempt, task.runtime.sealer))
    except (TransientLaunchError, PermanentLaunchError):
        raise
    except Unsealable as error:
        raise PermanentLaunchError(FailureReason.INVALID_SPEC, str(error)) from error
    except LeoflowError as error:
        raise PermanentLaunchError(FailureReason.UNKNOWN_EXECUTOR, str(error)) from error
    except Exception as error:
        log.exception("launch.unexpected_error", extra={"attempt": str(attempt)})
        raise TransientLaunchError(FailureReason.LAUNCH_FAILED, f"{type(error).__name__}: {error}") from error


def _execute(task: LeoflowTask, launch_spec: LaunchSpec) -> Launched:
    executor_type = executor_of_task(task.name)
    executor, started, result = executor_of(task.app, executor_type), time.monotonic(), "transient"
    try:
        launched = executor.execute(launch_spec)
        result = "exists" if launched.already else "created"
    except PermanentLaunchError:
        result = "permanent"
        raise
    finally:
        if executor_type is ExecutorType.KUBERNETES:
            metrics.record_pod_created(launch_spec.request.dag_id, result, time.monotonic() - started)
    return launched


def _retry_or_give_up(task: LeoflowTask, attempt: AttemptId, error: TransientLaunchError, tried_since: float) -> None:
    tried = time.time() - tried_since
    delay = next_try_seconds(task.request.retries, tried, _patience_seconds(task, error), error.retry_after_seconds)
    if delay is None:
        reason = parse_reason(error.reason, FailureReason.LAUNCH_FAILED)
        message = f"{error.message} (given up after {task.request.retries + 1} attempts to start in {tried:.0f} s)"
        _report_failure(task, attempt, Outcome.failed(reason, message))
        return
    log.warning("launch.retry", extra={"attempt": str(attempt), "error": error.message, "delay_seconds": delay})
    raise task.retry(countdown=delay, exc=error, kwargs={**(task.request.kwargs or {}), "tried_since": tried_since})


def _patience_seconds(task: LeoflowTask, error: TransientLaunchError) -> float:
    """A back end that has no room (its reason is queued_timeout) is no outage: the attempt waits as in its queue."""
    if error.reason != FailureReason.QUEUED_TIMEOUT:
        return OUTAGE_SECONDS
    return task.runtime.settings.maintenance.queued_timeout_seconds or math.inf


def next_try_seconds(
    retries: int, tried_seconds: float, patience_seconds: float, asked_seconds: float | None = None
) -> float | None:
    """How long to wait after a try that failed, or None when patience is over.

    A doubling delay, of which a random half is left out so that what failed together does not come back together; at
    least what the server asked for.
    """
    if tried_seconds >= patience_seconds:
        return None
    backoff = _MAX_BACKOFF_SECONDS if retries > 10 else min(2.0**retries, _MAX_BACKOFF_SECONDS)
    return max(asked_seconds or 0.0, random.uniform(backoff / 2, backoff))  # noqa: S311 - no secret


kubernetes = leoflow_task(task_name(ExecutorType.KUBERNETES), LaunchTask)(launch)
docker = leoflow_task(task_name(ExecutorType.DOCKER), LaunchTask)(launch)
subprocess = leoflow_task(task_name(ExecutorType.SUBPROCESS), LaunchTask)(launch)
