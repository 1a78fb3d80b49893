"""``leoflow.execute.inline``: claim the attempt, make the HTTP call, record everything, complete it.

The worker sits in the control plane, so one process does what agent, gateway and results worker do for other tasks.
How many run at once is this worker's concurrency.

A call that takes its time gets Celery's state STARTED, written beside it; a short one is not worth a write. It is
marked from a thread of its own, so that a backend that is away cannot eat the call's deadline; ``settled`` waits for
that thread, so that STARTED never comes after the result.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery.exceptions import Ignore
from celery.states import STARTED

from leoflow_celery import metrics
from leoflow_celery.background import patiently
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason, parse_reason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import ExecutorType, TaskName
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.xcom import XComKey, XComValue, check_value, parse_value
from leoflow_celery.errors import ClaimRefused, DecryptionFailed, Unavailable, XComRejected
from leoflow_celery.executors.inline_http import HttpResult, HttpTaskError
from leoflow_celery.queueing.messages import SCOPE_OF, LaunchInline, open_request
from leoflow_celery.services import Services
from leoflow_celery.store.attempts import FinishCondition
from leoflow_celery.store.logs import LogRecord
from leoflow_celery.store.views import Finished, TaskInstanceView
from leoflow_celery.tasks.completion import LEASE_SECONDS, Ended, advance_view
from leoflow_celery.tasks.context import LeoflowTask, leoflow_task
from leoflow_celery.tasks.monitoring import summary

if TYPE_CHECKING:
    from leoflow_celery.tasks.context import LeoflowTask

log = logging.getLogger(__name__)
#: Nobody looks at the state of a call that is over sooner.
SHORT_CALL_SECONDS = 0.3


class StartedMark:
    """Asked again and again while a call waits; marks it STARTED once it is no short one."""

    def __init__(self, task: LeoflowTask, must_stop: Callable[[], bool]) -> None:
        self._task_id, self._backend = str(task.request.id), task.backend
        self._hostname = task.services.hostname
        self._must_stop = must_stop
        self._due = time.monotonic() + SHORT_CALL_SECONDS
        self._thread: threading.Thread | None = None

    def __call__(self) -> bool:
        """Whether the call must stop."""
        if self._thread is None and time.monotonic() >= self._due:
            self._thread = threading.Thread(target=self._mark, name="leoflow-started", daemon=True)
            self._thread.start()
        return self._must_stop()

    def _mark(self) -> None:
        try:
            self._backend.store_result(self._task_id, {"hostname": self._hostname}, STARTED)
        except Exception as error:  # noqa: BLE001 - a state for onlookers; the task goes on without it
            log.warning("started.not_marked", extra={"celery_task_id": self._task_id, "error": repr(error)})

    def settled(self) -> None:
        """Wait until nothing more is written."""
        if self._thread is not None:
            self._thread.join()


#: How long a finished call waits for the database, as an agent's report waits for the gateway.
_RECORD_SECONDS = 600


@leoflow_task(TaskName.EXECUTE_INLINE, autoretry_for=(Unavailable,))
def execute_inline(self: LeoflowTask, sealed: str) -> str:
    """Run one http_api task; a second delivery is refused by the claim.

    A success returns a summary of its value, which becomes the monitor's event; the result itself was written by then.
    Any other end leaves with ``Ignore``, which costs a formatted traceback: too much for the usual case.
    """
    services, holder = self.services, self.services.new_holder()
    identity = self.opened(LaunchInline, sealed, SCOPE_OF[ExecutorType.INLINE]).attempt
    view = _claim(services, identity, holder)
    services.leases.hold(holder, identity)
    try:
        mark = StartedMark(self, lambda: services.leases.must_stop(holder))
        outcome, value = _call(services, view, mark)
        mark.settled()
        finished = _record(services, view, holder, outcome, value)
    finally:
        services.leases.release(holder)
    if finished.view is None:
        raise Ignore
    if finished.recorded and finished.state is TaskState.SUCCESS:
        parsed = json.loads(value) if value else None
        advance_view(self, finished.view, Ended(finished.view, parsed, monitored=True, waiting=finished.waiting))
        return summary(parsed)
    is_failed = finished.recorded and finished.state is TaskState.FAILED
    advance_view(self, finished.view, Ended(finished.view, waiting=finished.waiting) if is_failed else None)
    raise Ignore


def _claim(services: Services, attempt: AttemptId, holder: str) -> TaskInstanceView:
    lease = services.settings.gateway.lease_seconds
    try:
        view = services.store.attempts.claim(attempt, holder, services.hostname, lease, start=True)
    except ClaimRefused as refusal:
        metrics.record_claim(refusal.why)
        log.info("claim.refused", extra={"attempt": str(attempt), "why": refusal.why})
        raise Ignore from refusal
    metrics.record_claim("granted")
    metrics.record_cold_start(view.dag_id, view.read_at - view.queued_at)
    metrics.record_transition(TaskState.QUEUED, TaskState.RUNNING, view.dag_id)
    return view


def _call(services: Services, view: TaskInstanceView, must_stop: Callable[[], bool]) -> tuple[Outcome, bytes | None]:
    """The outcome of the call and the JSON it returned. Never raises for what the task did wrong."""
    try:
        request = open_request(services.keys, view.sealed_request)
        inputs = _inputs(services, view, request)
        _check_held(must_stop)
        result = services.inline.run(request, view.attempt, must_stop, inputs)
        _log(services, view, "info", result.summary)
        return Outcome.success(), _checked_value(services, request, result)
    except HttpTaskError as error:
        outcome = Outcome.failed(error.reason, error.message)
    except XComRejected as error:
        metrics.record_xcom_rejected(error.reason)
        outcome = Outcome.failed(parse_reason(error.reason), error.message)
    except DecryptionFailed as error:
        outcome = Outcome.failed(FailureReason.INVALID_SPEC, str(error))
    except Unavailable:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the call may have been made
        # Where it happened, and not its text: a library's words may repeat the whole URL.
        where = "".join(traceback.format_tb(error.__traceback__))
        fields = {"attempt": str(view.attempt), "error": type(error).__name__, "where": where}
        log.error("inline.unexpected_error", extra=fields)  # noqa: TRY400
        # The call may have been made: whether it is made again is the scheduler's decision, and no relaunch.
        message = f"the inline worker failed: {type(error).__name__} (see its log); the call may have been made"
        outcome = Outcome.failed(FailureReason.HTTP_ERROR, message)
    _log(services, view, "error", f"{outcome.reason}: {outcome.message}")
    return outcome.evolve(log_tail=services.store.logs.last_lines(view.log_key)), None


def _inputs(services: Services, view: TaskInstanceView, request: TaskRequest) -> dict[str, Any]:
    """Parameter → value of the task's inputs; one whose task left none is not in it, and null in a list of several.

    Raises:
        XComRejected: a stored value that is not what its writer said.
    """
    found = {}
    for parameter, source in request.xcom_input.items():
        if not isinstance(source, str):
            found[parameter] = [_value(services, view, task_id) for task_id in source]
        elif (value := _value(services, view, source, _MISSING)) is not _MISSING:
            found[parameter] = value
    return found


_MISSING = object()


def _value(services: Services, view: TaskInstanceView, task_id: str, default: Any = None) -> Any:
    stored = _stored(services, XComKey(view.tenant_id, view.dag_id, view.run_id, task_id))
    return default if stored is None else parse_value(stored)


@patiently(log, _RECORD_SECONDS)
def _stored(services: Services, key: XComKey) -> XComValue | None:
    return services.store.xcom.get(key)


def _check_held(must_stop: Callable[[], bool]) -> None:
    """Before what cannot be undone: this process may have been stopped since it claimed."""
    if must_stop():
        raise HttpTaskError(
            FailureReason.CANCELLED, "the claim was lost, or the task cancelled, before the call was made"
        )


def _checked_value(services: Services, request: TaskRequest, result: HttpResult) -> bytes | None:
    value = result.return_value()
    if value is not None:
        check_value(value, schema=request.xcom_schema, max_bytes=services.settings.xcom.max_bytes)
        metrics.record_xcom_push(request.dag_id, len(value))
    return value


def _record(services: Services, view: TaskInstanceView, holder: str, outcome: Outcome, value: bytes | None) -> Finished:
    key = XComKey(view.tenant_id, view.dag_id, view.run_id, view.task_id)
    xcoms = [(key, XComValue(value))] if value is not None else []
    try:
        finished = _finish_once(services, view, holder, outcome, xcoms)
    except Unavailable:  # the usual case is spared what trying again costs
        finished = _finish(services, view, holder, outcome, xcoms)
    if not finished.recorded:
        metrics.record_fenced("state")
        log.warning("report.fenced", extra={"attempt": str(view.attempt), "outcome": outcome.state.value})
    elif finished.relaunch and outcome.reason:
        metrics.record_relaunch(outcome.reason)
    return finished


# The call is made and its answer is here only: giving up would make the same call again while its holder lives.
@patiently(log, _RECORD_SECONDS)
def _finish(
    services: Services, view: TaskInstanceView, holder: str, outcome: Outcome, xcoms: list[tuple[XComKey, XComValue]]
) -> Finished:
    return _finish_once(services, view, holder, outcome, xcoms)


def _finish_once(
    services: Services, view: TaskInstanceView, holder: str, outcome: Outcome, xcoms: list[tuple[XComKey, XComValue]]
) -> Finished:
    condition, attempts = FinishCondition(holder=holder), services.store.attempts
    return attempts.finish(view.attempt, outcome, condition, xcoms, seen=view, lease_completions=LEASE_SECONDS)


def _log(services: Services, view: TaskInstanceView, level: str, message: str) -> None:
    """Append a line to the try's log. A disk that does not take it changes nothing about how the call ended."""
    try:
        with services.store.logs.writer(view.log_key) as writer:
            writer.append([LogRecord(time.time(), level, "agent", message)])
    except OSError as error:
        log.warning("log.not_written", extra={"attempt": str(view.attempt), "line": message, "error": str(error)})
