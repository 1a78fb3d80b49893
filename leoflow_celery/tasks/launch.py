"""``leoflow.execute.kubernetes``, ``.docker`` and ``.subprocess``: start an attempt, leave a note of that, acknowledge.

These workers have no SQL. What they learn goes to the control plane: the note of a launch, which it collects, and the
end of an attempt that could not be started, which is a message. The attempt's own Celery result is written when the
attempt ends, so nothing is stored here and the monitor is told nothing of a success.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery.exceptions import Reject
from celery.worker.request import Request as CeleryRequest

from leoflow_celery import metrics
from leoflow_celery.background import patiently
from leoflow_celery.clock import broker_clock
from leoflow_celery.domain.attempt import AttemptId, LaunchReport
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason, parse_reason
from leoflow_celery.domain.routing import QUEUE_OF, ExecutorType, TaskName, executor_of_task
from leoflow_celery.errors import HostFull, LeoflowError, PermanentLaunchError, TransientLaunchError
from leoflow_celery.executors.base import Launched, LaunchSpec
from leoflow_celery.queueing.holding import NO_ROOM, NOT_ITS_FAULT
from leoflow_celery.queueing.messages import SCOPE_OF, AttemptEnded, Launch, seal_message
from leoflow_celery.tasks.context import LeoflowTask, executor_of, host_of, leoflow_task

log = logging.getLogger(__name__)
#: For so long a server may be away; then the launch counts as failed, and spends a relaunch.
OUTAGE_SECONDS = 300.0
_MAX_BACKOFF_SECONDS = 60.0
#: How long a note waits for the broker: longer than a restart of it.
_NOTE_SECONDS = 300


class OpenEndedRequest(CeleryRequest):
    """A worker's view of a message whose task goes on when its function has returned: its success is no news.

    Leaving with ``Ignore`` would say the same, and cost a formatted traceback: as much as the call to the API server.
    """

    def send_event(self, type: str, **fields: Any) -> None:  # noqa: A002 - Celery's name for it
        if type != "task-succeeded":
            super().send_event(type, **fields)


class LaunchTask(LeoflowTask):
    """The tasks that start attempts."""

    abstract = True
    Request = f"{__name__}:OpenEndedRequest"


def launch(self: LeoflowTask, sealed: str) -> str:
    """Start one attempt; what the worker's log says of it. A second delivery finds it started."""
    executor = executor_of_task(self.name)
    order = self.opened(Launch, sealed, SCOPE_OF[executor])
    try:
        launched = _start(self, order)
    except HostFull as error:
        _give_back(self, order, error)
    except TransientLaunchError as error:
        _retry_or_give_up(self, order, error)
    except PermanentLaunchError as error:
        reason = parse_reason(error.reason, FailureReason.INVALID_SPEC)
        _report_failure(self, order.attempt, Outcome.failed(reason, error.message))
    else:
        back_end = BackEnd(executor, launched.host, launched.place)
        host = launched.host or self.services.hostname
        _leave_note(self, LaunchReport(order.attempt, launched.external_name, host, back_end.address))
        return f"launched {launched.external_name}"
    return "not launched"


def _give_back(task: LeoflowTask, order: Launch, error: HostFull) -> None:
    """To the queue, whose next message this worker takes when there is room (``tasks.room``), or another host before.

    A launch that only this host may do is tried again from here: its queue has other messages behind it.
    """
    if (task.request.delivery_info or {}).get("routing_key") != QUEUE_OF[executor_of_task(task.name)]:
        _retry_or_give_up(task, order, error)
    else:
        raise Reject(str(error), requeue=NO_ROOM) from error


@contextmanager
def _given_back_on_failure() -> Iterator[None]:
    """What the broker did not take for minutes: the message goes back to it, and is not acknowledged."""
    try:
        yield
    except Exception as error:
        raise Reject(error, requeue=NOT_ITS_FAULT) from error


def _leave_note(task: LeoflowTask, report: LaunchReport) -> None:
    with _given_back_on_failure():
        _leave_patiently(task, report)


@patiently(log, _NOTE_SECONDS)
def _leave_patiently(task: LeoflowTask, report: LaunchReport) -> None:
    task.services.launch_notes.leave(SCOPE_OF[executor_of_task(task.name)], report)


def _report_failure(task: LeoflowTask, attempt: AttemptId, outcome: Outcome) -> None:
    executor = executor_of_task(task.name)
    with _given_back_on_failure():
        ended = AttemptEnded(attempt, outcome, unclaimed=True, host=host_of(task.app, executor))
        task.publisher.attempt_ended(executor, ended)


def _start(task: LeoflowTask, order: Launch) -> Launched:
    try:
        sealing = task.services.keys.sealer(SCOPE_OF[executor_of_task(task.name)])
        return _execute(task, LaunchSpec(order.request, order.attempt, sealing))
    except (TransientLaunchError, PermanentLaunchError):
        raise
    except LeoflowError as error:
        raise PermanentLaunchError(FailureReason.UNKNOWN_EXECUTOR, str(error)) from error
    except Exception as error:
        log.exception("launch.unexpected_error", extra={"attempt": str(order.attempt)})
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


def _retry_or_give_up(task: LeoflowTask, order: Launch, error: TransientLaunchError) -> None:
    tried_since = broker_clock.time() if order.tried_since is None else order.tried_since
    tried = broker_clock.time() - tried_since
    delay = next_try_seconds(task.request.retries, tried, _patience_seconds(task, error), error.retry_after_seconds)
    if delay is None:
        reason = parse_reason(error.reason, FailureReason.LAUNCH_FAILED)
        message = f"{error.message} (given up after {task.request.retries + 1} attempts to start in {tried:.0f} s)"
        _report_failure(task, order.attempt, Outcome.failed(reason, message))
        return
    log.warning("launch.retry", extra={"attempt": str(order.attempt), "error": error.message, "delay_seconds": delay})
    again = Launch(order.attempt, order.request, tried_since)
    scope = SCOPE_OF[executor_of_task(task.name)]
    raise task.retry(countdown=delay, exc=error, kwargs={"sealed": seal_message(task.services.keys, scope, again)})


def _patience_seconds(task: LeoflowTask, error: TransientLaunchError) -> float:
    """A back end that has no room (its reason is queued_timeout) is no outage: the attempt waits as in its queue."""
    if error.reason != FailureReason.QUEUED_TIMEOUT:
        return OUTAGE_SECONDS
    return task.services.settings.maintenance.queued_timeout_seconds or math.inf


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


for _name in (TaskName.EXECUTE_KUBERNETES, TaskName.EXECUTE_DOCKER, TaskName.EXECUTE_SUBPROCESS):
    leoflow_task(_name, LaunchTask)(launch)
