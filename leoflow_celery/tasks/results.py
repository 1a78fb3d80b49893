"""Queue ``results``: what launch workers and agents reported becomes state, XComs and completed Celery ids.

Who speaks is known by the key: a message that docker workers may send states nothing about a pod. What it states is
believed only about attempts that SQL gave to this executor and back end.
"""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from celery import Celery, bootsteps
from celery.states import STARTED

from leoflow_celery import metrics
from leoflow_celery.background import Periodic
from leoflow_celery.client import Client
from leoflow_celery.domain.attempt import AttemptId, LaunchReport, celery_task_id
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.routing import RESULTS_QUEUE, ExecutorType, TaskName
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.xcom import XComKey, XComValue, check_value
from leoflow_celery.errors import DecryptionFailed, NotFound, Unavailable, XComRejected
from leoflow_celery.queueing.dead_letters import DeadLetters, keep_refused
from leoflow_celery.queueing.launch_notes import LaunchNote
from leoflow_celery.queueing.messages import (
    EXECUTOR_OF,
    AdvanceTry,
    AttemptEnded,
    Cancel,
    Present,
    StagingDeleted,
    open_request,
)
from leoflow_celery.security import Scope
from leoflow_celery.services import Services
from leoflow_celery.store.attempts import FinishCondition
from leoflow_celery.store.presence import Kind
from leoflow_celery.store.views import TaskInstanceView
from leoflow_celery.tasks.completion import advance_view, complete_try, keep_given_up, store_result
from leoflow_celery.tasks.context import LeoflowTask, leoflow_task, our_app, services_of

log = logging.getLogger(__name__)
#: STARTED is news for people, and a crash of a launch worker waits for nobody: this need not be faster.
_COLLECT_SECONDS = 0.2
#: When a cancellation looks again for a try that is not recorded: its request may still be in a queue.
_UNKNOWN_SECONDS = (1, 2, 4, 8, 16)
B = TypeVar("B", StagingDeleted, Present)


def collect_launches(app: Celery, services: Services, of: AttemptId | None = None) -> int:
    """Record which attempts were started, or only whether ``of`` was; how many notes there were.

    Their Celery ids are STARTED from now on.

    An attempt may end while STARTED is written, perhaps over its result, and a worker may die right after that: so
    every collection that finds a try over writes its result again.

    Raises:
        Unavailable: a server is away; the notes are collected again.
    """
    notes = services.launch_notes.group() if of is None else services.launch_notes.of(of)
    reports = [report for note in notes if (report := _report_of(services, note)) is not None]
    if reports:
        waiting = services.store.attempts.launched(reports)
        for report in reports:
            if report.attempt in waiting:
                _mark_started(app, report)
        for view in services.store.attempts.ended([report.attempt for report in reports]):
            store_result(app, services, view)
    services.launch_notes.remove(notes)
    return len(notes)


class LaunchCollector(bootsteps.StartStopStep):
    """The part of a control worker that collects the notes of launches, several times a second."""

    requires = ("celery.worker.components:Pool",)

    def create(self, worker: Any) -> Any:
        def collect() -> None:
            while collect_launches(worker.app, services_of(worker.app)):
                pass

        return Periodic(collect, _COLLECT_SECONDS, name="leoflow-launches", failed="launch_notes.not_collected")


def _report_of(services: Services, note: LaunchNote) -> LaunchReport | None:
    """What a note says; None for one that nobody may leave."""
    try:
        report = note.report(services.keys)
        is_own = BackEnd.parse(report.back_end).executor is EXECUTOR_OF[note.scope]
        why = "" if is_own else "a worker speaks for another executor"
    except (DecryptionFailed, ValueError) as error:
        why = str(error)
    if why:
        letters = DeadLetters(services.settings, services.queues.client)
        keep_refused(letters, RESULTS_QUEUE, why, task="launched", size_bytes=note.size_bytes)
        return None
    return report


def _mark_started(app: Celery, report: LaunchReport) -> None:
    celery_id = celery_task_id(report.attempt.task_instance_id, report.attempt.try_number)
    meta = {"hostname": report.hostname, "external_name": report.external_name}
    app.backend.store_result(celery_id, meta, STARTED)


@leoflow_task(TaskName.RECORD_END, autoretry_for=(Unavailable,))
def record_end(self: LeoflowTask, speaker: str, sealed: str) -> None:
    """Record the end of an attempt that no agent reported, with the value it left, in one transaction."""
    services, (executor, ended) = self.services, self.heard(AttemptEnded, sealed, speaker)
    identity, outcome = ended.attempt, ended.outcome
    if ended.unclaimed:
        # Another delivery may have started it, and said so already.
        collect_launches(self.app, services, identity)
    try:
        view = services.store.attempts.get(identity.task_instance_id, identity.try_number)
    except NotFound:
        log.warning("record.unknown", extra={"attempt": str(identity), "outcome": outcome.state.value})
        return
    back_end = BackEnd(executor, ended.host)
    if view.executor != executor or (view.back_end and BackEnd.parse(view.back_end) != back_end):
        raise self.refused(f"attempt {identity} was not given to {back_end}")
    outcome, xcoms = _with_value(self, view, outcome, ended.return_value)
    if outcome.state is TaskState.FAILED and not outcome.log_tail:
        outcome = outcome.evolve(log_tail=services.store.logs.last_lines(view.log_key))
    condition = FinishCondition(
        unclaimed=ended.unclaimed,
        unlaunched=ended.unclaimed,
        executor=executor,
        # A host whose server is away does not know its own name.
        back_end=str(back_end) if ended.host or executor is not ExecutorType.DOCKER else None,
    )
    finished = services.store.attempts.finish(identity, outcome, condition, xcoms, seen=view)
    if finished.relaunch and outcome.reason:
        metrics.record_relaunch(outcome.reason)
    elif finished.recorded:
        keep_given_up(self, view, outcome)
    advance_view(self, finished.view or view)


def _with_value(
    task: LeoflowTask, view: TaskInstanceView, outcome: Outcome, text: str | None
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


def _checked(task: LeoflowTask, view: TaskInstanceView, text: str) -> bytes:
    value = text.encode(errors="surrogatepass")
    check_value(value, schema=_schema_of(task, view), max_bytes=task.services.settings.xcom.max_bytes)
    return value


def _schema_of(task: LeoflowTask, view: TaskInstanceView) -> dict[str, Any] | None:
    try:
        return open_request(task.services.keys, view.sealed_request).xcom_schema
    except DecryptionFailed as error:
        # The task did its work: a key that was taken away since then must not turn that into a failure.
        log.warning("record.schema_unknown", extra={"attempt": str(view.attempt), "error": str(error)})
        return None


@leoflow_task(TaskName.ADVANCE_TRY, autoretry_for=(Unavailable,))
def advance(self: LeoflowTask, sealed: str, speaker: str) -> None:  # noqa: ARG001 - as in every fact
    """Look at a try now: complete it (again) when it has ended, send its next launch when that is due."""
    message = self.opened(AdvanceTry, sealed, Scope.CONTROL)
    view = self.services.store.attempts.get(message.task_instance_id, message.try_number)
    if not view.is_terminal:
        advance_view(self, view)
    elif not complete_try(self.app, self.services, view):
        _write_again(self, view)


def _write_again(task: LeoflowTask, view: TaskInstanceView) -> None:
    """Write the result of a try that was told before: Redis may have lost it, and somebody has asked."""
    if view.state is not TaskState.SUCCESS or task.services.store.attempts.is_newest(view):
        store_result(task.app, task.services, view)


@leoflow_task(TaskName.CANCEL_TRY, autoretry_for=(Unavailable,))
def cancel(self: LeoflowTask, sealed: str, speaker: str) -> None:  # noqa: ARG001 - as in every fact
    """Cancel the try of a Celery id, queued or running; one that has ended stays as it ended.

    The message of a dispatch, or the row of a try, may come a moment after the wish to cancel it.
    """
    celery_id = self.opened(Cancel, sealed, Scope.CANCEL).celery_id
    owner = self.services.store.completions.owners([celery_id]).get(celery_id)
    if owner is not None:
        Client(app=our_app(self.app)).cancel(*owner)
    elif self.request.retries < len(_UNKNOWN_SECONDS):
        raise self.retry(countdown=_UNKNOWN_SECONDS[self.request.retries])
    else:
        log.info("cancel.unknown", extra={"celery_task_id": celery_id})  # a user's own task, say


@leoflow_task(TaskName.RECORD_STAGING, autoretry_for=(Unavailable,))
def staging_deleted(self: LeoflowTask, speaker: str, sealed: str) -> None:
    """Record which staging volumes are gone, each with its reason."""
    message = _of_own_back_end(self, *self.heard(StagingDeleted, sealed, speaker))
    for name, reason in message.claims.items():
        self.services.store.staging.mark_staging_deleted(name, reason, str(message.back_end))


@leoflow_task(TaskName.RECORD_PRESENCE, autoretry_for=(Unavailable,))
def present(self: LeoflowTask, speaker: str, sealed: str) -> None:
    """A worker holds this back end: the control plane may send work to it."""
    message = _of_own_back_end(self, *self.heard(Present, sealed, speaker))
    self.services.store.presence.keep_present(Kind.BACK_END, str(message.back_end))


def _of_own_back_end(task: LeoflowTask, executor: ExecutorType, message: B) -> B:
    if message.back_end.executor is not executor:
        raise task.refused(f"a worker of {executor} speaks for back end {message.back_end}")
    return message
