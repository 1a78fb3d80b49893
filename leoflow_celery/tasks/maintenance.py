"""Queue ``maintenance``: what beat sends. Each task is single-flight across any number of beats and workers.

Nothing here is needed while all goes well. It finds what a crash left behind: messages never sent, ends never
completed, holders that fell silent, values and logs that nobody will read any more.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import cache, partial

from leoflow_celery import metrics
from leoflow_celery.background import RenewedLease
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reap import (
    ReapPolicy,
    Verdict,
    age_seconds,
    cancel_overdue,
    reap_queued,
    silent_verdict,
    unplaced_verdict,
)
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.routing import QUEUE_OF, RESULTS_QUEUE, ExecutorType, TaskName, host_queue
from leoflow_celery.errors import BrokerUnavailable, DecryptionFailed
from leoflow_celery.queueing.messages import open_request
from leoflow_celery.queueing.publisher import requested_grace
from leoflow_celery.store.attempts import FinishCondition
from leoflow_celery.store.presence import Kind
from leoflow_celery.store.views import TaskInstanceView
from leoflow_celery.tasks.completion import advance_view, complete_due, keep_given_up
from leoflow_celery.tasks.context import LeoflowTask, maintenance_task

log = logging.getLogger(__name__)
#: A submit that is under way sends its own message; only what is older was left behind.
_UNSENT_GRACE_SECONDS = 5


@maintenance_task(TaskName.SEND_DUE)
def send_due(self: LeoflowTask, lease: RenewedLease) -> int:
    """Send the messages that a crash or an unreachable broker kept back, and relaunches whose delay is over."""
    submissions, sent = self.services.store.submissions, 0
    while submissions.place():
        lease.check()
    while due := submissions.unsent(_UNSENT_GRACE_SECONDS):
        for view in due:
            lease.check()
            sent += _send(self, view)
    return sent


def _send(task: LeoflowTask, view: TaskInstanceView) -> bool:
    """Send what is due, or give up what can never be sent; either way it is due no more."""
    try:
        task.publisher.launch_again(view, task.services.store.relaunch_policy)
    except DecryptionFailed as error:
        metrics.record_undispatchable("unsealable")
        _give_up(task, view, Verdict(FailureReason.INVALID_SPEC, str(error)), FinishCondition(unclaimed=True))
        return False
    task.services.store.submissions.mark_sent([view.attempt])
    return True


@maintenance_task(TaskName.COMPLETE_DUE)
def complete_all(self: LeoflowTask, lease: RenewedLease) -> int:
    """Complete what ended without being completed, and give ends that nobody has read their place in the feed."""
    total = 0
    self.services.store.ends.number()
    while count := complete_due(self.app, self.services):
        total += count
        lease.check()
    return total


@maintenance_task(TaskName.REAP)
def reap(self: LeoflowTask, lease: RenewedLease) -> int:
    """Give up attempts that are silent, lost on the way, asked to stop or older than a try that was submitted."""
    policy = _policy(self)
    return (
        self.services.store.submissions.end_superseded()
        + _reap_cancelled(self, policy, lease)
        + _reap_silent(self, policy, lease)
        + _reap_queued(self, policy, lease)
        + _reap_unplaced(self, policy, lease)
    )


def _policy(task: LeoflowTask) -> ReapPolicy:
    settings = task.services.settings.maintenance
    return ReapPolicy(
        settings.heartbeat_timeout_seconds,
        settings.lost_message_seconds,
        settings.queued_timeout_seconds,
        settings.launch_timeout_seconds,
        settings.cancel_grace_seconds,
    )


def _reap_silent(task: LeoflowTask, policy: ReapPolicy, lease: RenewedLease) -> int:
    store, count = task.services.store, 0
    store.presence.keep_present(Kind.REAPER)
    may_judge = cache(lambda executor: store.presence.may_judge(executor, policy.heartbeat_timeout_seconds))
    for view in store.reaper_queries.silent(policy.heartbeat_timeout_seconds):
        lease.check()
        if may_judge(view.executor):
            last = view.last_heartbeat_at
            verdict = silent_verdict(None if last is None else view.read_at - last, policy)
            once = _made_once(task, view)
            if once:
                text = f"{verdict.message}; its {once} may have been made, and is sent once unless"
                verdict = replace(verdict, message=f"{text} http_request.attempts says more")
            # It may have woken up since it was read: only silence since then ends it.
            condition = FinishCondition(silent_since=view.last_seen_at)
            count += _give_up(task, view, verdict, condition, may_relaunch=not once)
    return count


def _made_once(task: LeoflowTask, view: TaskInstanceView) -> str:
    """The method of an inline call that may not be made a second time within the try; empty for any other task."""
    if view.executor != ExecutorType.INLINE:
        return ""
    try:
        call = open_request(task.services.keys, view.sealed_request).http_request
    except DecryptionFailed:
        return ""  # nobody can make it again
    return call.method if call is not None and not call.may_be_made_again else ""


def _reap_queued(task: LeoflowTask, policy: ReapPolicy, lease: RenewedLease) -> int:
    count, look, even = 0, cache(partial(_look, task)), task.services.store.presence.even_seconds()
    youngest = min(policy.lost_message_seconds, policy.launch_timeout_seconds)
    for view in task.services.store.reaper_queries.waiting(youngest):
        lease.check()
        depth, all_told = look(view.queue)
        launched = None if view.launched_at is None else age_seconds(view.launched_at, view.read_at, even)
        waited = age_seconds(view.sent_at or view.queued_at, view.read_at, even)
        patience, bound_to, started_as = _patience(task, view, policy), _bound_to(view), _started_as(view)
        verdict = reap_queued(waited, view.queue, depth, launched, patience, bound_to, started_as, all_told=all_told)
        if verdict is not None:
            # What was told since the row was read counts as well.
            count += _give_up(task, view, verdict, FinishCondition(unclaimed=True, unlaunched=launched is None))
    return count


def _look(task: LeoflowTask, queue: str) -> tuple[int | None, bool]:
    """How many messages a launch queue has, and whether all that its workers told was recorded then.

    In this order: a worker tells that it started an attempt before it acknowledges the message.
    """
    depth = _depth(task, queue)
    is_told = depth != 0 or queue == QUEUE_OF[ExecutorType.INLINE]
    return depth, is_told or (_depth(task, RESULTS_QUEUE) == 0 and _uncollected(task) == 0)


def _uncollected(task: LeoflowTask) -> int | None:
    try:
        return task.services.launch_notes.waiting()
    except BrokerUnavailable:
        return None


def _patience(task: LeoflowTask, view: TaskInstanceView, policy: ReapPolicy) -> ReapPolicy:
    """A pod may be pending first: how long, its reconcile decides and says why; the agent's time comes after that."""
    if view.executor != ExecutorType.KUBERNETES:
        return policy
    kubernetes = task.services.settings.kubernetes
    limits = [kubernetes.pending_timeout_seconds]
    if task.services.store.presence.back_ends(ExecutorType.KUBERNETES):
        # A reconcile watches it, and knows which of these it waits for. Without one nobody does.
        limits += [
            kubernetes.capacity_timeout_seconds,
            kubernetes.registry_timeout_seconds,
            kubernetes.init_timeout_seconds,
        ]
    pending = sum(one or math.inf for one in limits)
    return replace(policy, launch_timeout_seconds=pending + policy.launch_timeout_seconds)


def _started_as(view: TaskInstanceView) -> str:
    return f"{view.external_name} on {view.back_end or view.hostname}" if view.external_name else ""


def _bound_to(view: TaskInstanceView) -> str:
    """Why only one host may take it, when that is so."""
    if not view.queue_name:
        return ""
    host = view.queue_name.removeprefix(host_queue(ExecutorType(view.executor), ""))
    return f"host {host!r}, where staging volume {view.staging_claim!r} is"


def _reap_unplaced(task: LeoflowTask, policy: ReapPolicy, lease: RenewedLease) -> int:
    if not policy.queued_timeout_seconds:
        return 0
    views = task.services.store.submissions.unplaced(policy.queued_timeout_seconds)
    even, count = task.services.store.presence.even_seconds(), 0
    for view in views:
        lease.check()
        seconds = age_seconds(view.queued_at, view.read_at, even)
        if seconds >= policy.queued_timeout_seconds:
            verdict = unplaced_verdict(seconds, view.staging_claim)
            # Nothing was started, so there is nothing to start again.
            count += _give_up(task, view, verdict, FinishCondition(unclaimed=True), may_relaunch=False)
    return count


def _reap_cancelled(task: LeoflowTask, policy: ReapPolicy, lease: RenewedLease) -> int:
    count, verdict = 0, Verdict(FailureReason.CANCELLED, "did not stop within the grace")
    views = task.services.store.reaper_queries.cancelled(policy.cancel_grace_seconds)
    even = task.services.store.presence.even_seconds()
    for view in views:
        lease.check()
        if _had_its_grace(task, view, policy, even):
            count += _give_up(task, view, verdict, FinishCondition())
    return count


def _had_its_grace(task: LeoflowTask, view: TaskInstanceView, policy: ReapPolicy, even_seconds: float) -> bool:
    asked = age_seconds(view.cancel_requested_at or 0.0, view.read_at, even_seconds)
    return cancel_overdue(asked, requested_grace(task.services.keys, view), policy)


def _depth(task: LeoflowTask, queue: str) -> int | None:
    try:
        return task.services.queues.depth(queue)
    except BrokerUnavailable as error:
        log.warning("queue.depth_unknown", extra={"queue": queue, "error": str(error)})
        return None


def _give_up(
    task: LeoflowTask,
    view: TaskInstanceView,
    verdict: Verdict,
    condition: FinishCondition,
    *,
    may_relaunch: bool = True,
) -> bool:
    store = task.services.store
    outcome = Outcome.failed(verdict.reason, verdict.message, log_tail=store.logs.last_lines(view.log_key))
    finished = store.attempts.finish(view.attempt, outcome, condition, may_relaunch=may_relaunch, seen=view)
    if not finished.recorded or finished.view is None:
        return False
    log.warning("attempt.given_up", extra={"attempt": str(view.attempt), "reason": verdict.reason.value})
    if finished.relaunch:
        metrics.record_relaunch(verdict.reason)
    else:
        keep_given_up(task, view, outcome)
    advance_view(task, finished.view)
    return True


@maintenance_task(TaskName.EXPIRE_XCOMS)
def expire_xcoms(self: LeoflowTask, lease: RenewedLease) -> int:  # noqa: ARG001 - one step
    """Remove XCom values past their time to live."""
    return self.services.store.xcom.delete_expired()


@maintenance_task(TaskName.PRUNE_LOGS)
def prune_logs(self: LeoflowTask, lease: RenewedLease) -> int:  # noqa: ARG001 - one step
    """Remove task logs past their retention."""
    retention = self.services.settings.logs.retention_seconds
    return self.services.store.logs.prune(retention) if retention else 0


@maintenance_task(TaskName.PRUNE_HISTORY)
def prune_history(self: LeoflowTask, lease: RenewedLease) -> int:
    """Remove tries, runs and records of volumes past their retention."""
    retention = self.services.settings.maintenance.history_retention_seconds
    if not retention:
        return 0
    total, history = 0, self.services.store.history
    while count := history.prune(retention):
        total += count
        lease.check()
    return total + history.prune_runs(retention)
