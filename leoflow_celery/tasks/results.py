"""Queue ``results``: what workers and agents reported becomes state, XComs and completed Celery ids."""

from __future__ import annotations

import logging
from typing import Any

from celery.states import STARTED
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from leoflow_celery import metrics
from leoflow_celery.client.messages import open_request
from leoflow_celery.domain.attempt import AttemptId, LaunchReport, celery_task_id
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.xcom import XComKey, XComValue, check_value
from leoflow_celery.errors import NotFound, Unavailable, Unsealable, XComRejected
from leoflow_celery.store.attempts import Guard
from leoflow_celery.store.leases import BACK_END_PRESENCE, PRESENCE_GAP_SECONDS
from leoflow_celery.store.views import TaskInstanceView
from leoflow_celery.tasks.completion import store_result
from leoflow_celery.tasks.context import LeoflowTask, leoflow_task
from leoflow_celery.tasks.settling import keep_given_up, settle_try

log = logging.getLogger(__name__)


@leoflow_task("leoflow.results.launched", autoretry_for=(Unavailable, RedisError, OperationalError))
def launched(self: LeoflowTask, launches: list[dict[str, Any]]) -> None:
    """Record that an executor started attempts (``LaunchReport``); their Celery ids are STARTED from now on.

    An attempt may end while STARTED is written, perhaps over its result, and a worker may die right after that: so
    every delivery that finds a try over writes its result again.
    """
    attempts = self.runtime.store.attempts
    reports = [LaunchReport.from_json(one) for one in launches]
    waiting = attempts.launched(reports)
    for report in reports:
        if report.attempt in waiting:
            _mark_started(self, report)
        else:
            _warn_of_unknown(self, report)
    for view in attempts.ended([report.attempt for report in reports]):
        store_result(self.app, self.runtime, view)


def _mark_started(task: LeoflowTask, report: LaunchReport) -> None:
    celery_id = celery_task_id(report.attempt.task_instance_id, report.attempt.try_number)
    meta = {"hostname": report.hostname, "external_name": report.external_name}
    task.backend.store_result(celery_id, meta, STARTED)


def _warn_of_unknown(task: LeoflowTask, report: LaunchReport) -> None:
    try:
        task.runtime.store.attempts.get(report.attempt.task_instance_id, report.attempt.try_number)
    except NotFound:
        log.warning("launched.unknown", extra={"attempt": str(report.attempt), "external_name": report.external_name})


@leoflow_task("leoflow.results.record", autoretry_for=(Unavailable,))
def record(self: LeoflowTask, attempt: dict[str, Any], sealed: str) -> None:
    """Record the end of an attempt that no agent reported, with the value it left, in one transaction."""
    identity = AttemptId.from_json(attempt)
    content = self.runtime.sealer.open(sealed)
    outcome = Outcome.from_json(content["outcome"])
    guard = Guard(unclaimed=bool(content.get("unclaimed")))
    try:
        view = self.runtime.store.attempts.get(identity.task_instance_id, identity.try_number)
    except NotFound:
        log.warning("record.unknown", extra={"attempt": str(identity), "outcome": outcome.state.value})
        return
    outcome, xcoms = _with_value(self, view, outcome, content.get("return_value"))
    if outcome.state is TaskState.FAILED and not outcome.log_tail:
        outcome = outcome.evolve(log_tail=self.runtime.store.logs.last_lines(view.log_key))
    finished = self.runtime.store.attempts.finish(identity, outcome, guard, xcoms)
    if finished.relaunch and outcome.reason:
        metrics.record_relaunch(outcome.reason)
    elif finished.recorded:
        keep_given_up(self, view, outcome)
    settle_try(self, identity.task_instance_id, identity.try_number)


def _with_value(
    task: LeoflowTask, view: TaskInstanceView, outcome: Outcome, text: Any
) -> tuple[Outcome, list[tuple[XComKey, XComValue]]]:
    """The outcome with the value that the attempt left behind, which passes the same checks as a pushed one."""
    if text is None or outcome.state is not TaskState.SUCCESS:
        return outcome, []
    try:
        value = _checked(task, view, text)
    except XComRejected as error:
        metrics.record_xcom_rejected(error.reason)
        message = f"the return value was refused: {error.message}"
        return Outcome.failed(FailureReason(error.reason), message, outcome.exit_code), []
    key = XComKey(view.tenant_id, view.dag_id, view.run_id, view.task_id)
    return outcome, [(key, XComValue(value))]


def _checked(task: LeoflowTask, view: TaskInstanceView, text: Any) -> bytes:
    if not isinstance(text, str):
        raise XComRejected("invalid_xcom", f"it is no JSON text but {type(text).__name__}")
    value = text.encode(errors="surrogatepass")
    check_value(value, schema=_schema_of(task, view), max_bytes=task.runtime.settings.xcom.max_bytes)
    return value


def _schema_of(task: LeoflowTask, view: TaskInstanceView) -> dict[str, Any] | None:
    try:
        return open_request(task.runtime, view.sealed_request).xcom_schema
    except Unsealable as error:
        # The task did its work: a key that was taken away since then must not turn that into a failure.
        log.warning("record.schema_unknown", extra={"attempt": str(view.attempt), "error": str(error)})
        return None


@leoflow_task("leoflow.results.settle", autoretry_for=(Unavailable,))
def settle(self: LeoflowTask, task_instance_id: str, try_number: int) -> None:
    """Look at a try now: complete it when it has ended, send its next launch when that is due."""
    settle_try(self, task_instance_id, try_number)


@leoflow_task("leoflow.results.staging_deleted", autoretry_for=(Unavailable,))
def staging_deleted(self: LeoflowTask, claims: dict[str, str]) -> None:
    """Record which staging volumes are gone, each with its reason."""
    for name, reason in claims.items():
        self.runtime.store.staging.mark_staging_deleted(name, reason)


@leoflow_task("leoflow.results.present", autoretry_for=(Unavailable,))
def present(self: LeoflowTask, back_end: str) -> None:
    """A worker holds this back end: the control plane may send work to it."""
    self.runtime.store.leases.keep_present(f"{BACK_END_PRESENCE}{BackEnd.parse(back_end)}", PRESENCE_GAP_SECONDS)
