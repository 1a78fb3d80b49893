"""``leoflow.execute.inline``: claim the attempt, make the HTTP call, record everything, complete it.

The worker sits in the control plane, so one process does what agent, gateway and results worker do for other tasks.
How many run at once is this worker's concurrency.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

from celery.exceptions import Ignore
from tenacity import before_sleep_log, retry, retry_if_exception_type, stop_after_delay, wait_random_exponential

from leoflow_celery import metrics
from leoflow_celery.client.messages import open_request
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason, parse_reason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.xcom import XComKey, XComValue, check_value
from leoflow_celery.errors import ClaimRefused, Unavailable, Unsealable, XComRejected
from leoflow_celery.executors.inline_http import HttpResult, HttpTaskError
from leoflow_celery.runtime import Runtime
from leoflow_celery.store.attempts import FinishCondition
from leoflow_celery.store.logs import LogRecord
from leoflow_celery.store.views import Finished, TaskInstanceView
from leoflow_celery.tasks.completion import Ended
from leoflow_celery.tasks.context import LeoflowTask, leoflow_task
from leoflow_celery.tasks.monitoring import summary
from leoflow_celery.tasks.settling import settle_view
from leoflow_celery.tasks.started import StartedMark

log = logging.getLogger(__name__)
#: How long a finished call waits for the database, as an agent's report waits for the gateway.
_RECORD_SECONDS = 600


@leoflow_task("leoflow.execute.inline", autoretry_for=(Unavailable,))
def execute_inline(self: LeoflowTask, attempt: dict[str, Any], **_summary: Any) -> str:
    """Run one http_api task; a second delivery is refused by the claim.

    A success returns a summary of its value, which becomes the monitor's event; the result itself was written by then.
    Any other end leaves with ``Ignore``, which costs a formatted traceback: too much for the usual case.
    """
    runtime, identity, holder = self.runtime, AttemptId.from_json(attempt), self.runtime.new_holder()
    view = _claim(runtime, identity, holder)
    runtime.leases.hold(holder, identity)
    try:
        mark = StartedMark(self, lambda: runtime.leases.must_stop(holder))
        outcome, value = _call(runtime, view, mark)
        mark.settled()
        finished = _record(runtime, view, holder, outcome, value)
    finally:
        runtime.leases.release(holder)
    if finished.view is None:
        raise Ignore
    if finished.recorded and finished.state is TaskState.SUCCESS:
        parsed = json.loads(value) if value else None
        settle_view(self, finished.view, Ended(finished.view, parsed, monitored=True))
        return summary(parsed)
    settle_view(self, finished.view)
    raise Ignore


def _claim(runtime: Runtime, attempt: AttemptId, holder: str) -> TaskInstanceView:
    lease = runtime.settings.gateway.lease_seconds
    try:
        view = runtime.store.attempts.claim(attempt, holder, runtime.hostname, lease, start=True)
    except ClaimRefused as refusal:
        metrics.record_claim(refusal.why)
        log.info("claim.refused", extra={"attempt": str(attempt), "why": refusal.why})
        raise Ignore from refusal
    metrics.record_claim("granted")
    metrics.record_cold_start(view.dag_id, time.time() - view.queued_at)
    metrics.record_transition(TaskState.QUEUED, TaskState.RUNNING, view.dag_id)
    return view


def _call(runtime: Runtime, view: TaskInstanceView, must_stop: Callable[[], bool]) -> tuple[Outcome, bytes | None]:
    """The outcome of the call and the JSON it returned. Never raises for what the task did wrong."""
    try:
        request = open_request(runtime, view.sealed_request)
        result = runtime.inline.run(request, view.attempt, must_stop)
        _log(runtime, view, "info", result.summary)
        return Outcome.success(), _checked_value(runtime, request, result)
    except HttpTaskError as error:
        outcome = Outcome.failed(error.reason, error.message)
    except XComRejected as error:
        metrics.record_xcom_rejected(error.reason)
        outcome = Outcome.failed(parse_reason(error.reason), error.message)
    except Unsealable as error:
        outcome = Outcome.failed(FailureReason.INVALID_SPEC, str(error))
    except Unavailable:
        raise
    except Exception as error:
        log.exception("inline.unexpected_error", extra={"attempt": str(view.attempt)})
        # The call may have been made: whether it is made again is the scheduler's decision, and no relaunch.
        message = f"the inline worker failed: {type(error).__name__} (see its log); the call may have been made"
        outcome = Outcome.failed(FailureReason.HTTP_ERROR, message)
    _log(runtime, view, "error", f"{outcome.reason}: {outcome.message}")
    return outcome.evolve(log_tail=runtime.store.logs.last_lines(view.log_key)), None


def _checked_value(runtime: Runtime, request: TaskRequest, result: HttpResult) -> bytes | None:
    value = result.return_value()
    if value is not None:
        check_value(value, schema=request.xcom_schema, max_bytes=runtime.settings.xcom.max_bytes)
        metrics.record_xcom_push(request.dag_id, len(value))
    return value


def _record(runtime: Runtime, view: TaskInstanceView, holder: str, outcome: Outcome, value: bytes | None) -> Finished:
    key = XComKey(view.tenant_id, view.dag_id, view.run_id, view.task_id)
    xcoms = [(key, XComValue(value))] if value is not None else []
    finished = _finish(runtime, view, holder, outcome, xcoms)
    if not finished.recorded:
        metrics.record_fenced("state")
        log.warning("report.fenced", extra={"attempt": str(view.attempt), "outcome": outcome.state.value})
    elif finished.relaunch and outcome.reason:
        metrics.record_relaunch(outcome.reason)
    return finished


# The call is made and its answer is here only: giving up would make the same call again while its holder lives.
@retry(
    retry=retry_if_exception_type(Unavailable),
    wait=wait_random_exponential(max=5),
    stop=stop_after_delay(_RECORD_SECONDS),
    before_sleep=before_sleep_log(log, logging.WARNING),
    reraise=True,
)
def _finish(
    runtime: Runtime, view: TaskInstanceView, holder: str, outcome: Outcome, xcoms: list[tuple[XComKey, XComValue]]
) -> Finished:
    return runtime.store.attempts.finish(view.attempt, outcome, FinishCondition(holder=holder), xcoms, seen=view)


def _log(runtime: Runtime, view: TaskInstanceView, level: str, message: str) -> None:
    """Append a line to the try's log. A disk that does not take it changes nothing about how the call ended."""
    try:
        with runtime.store.logs.writer(view.log_key) as writer:
            writer.append([LogRecord(time.time(), level, "agent", message)])
    except OSError as error:
        log.warning("log.not_written", extra={"attempt": str(view.attempt), "line": message, "error": str(error)})
