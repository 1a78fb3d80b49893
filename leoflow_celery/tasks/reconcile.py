"""What the workers of a back end do beside launching: reconcile, stop one attempt, delete staging volumes.

The control plane sends these with what SQL knows; the back end compares it with what really exists and answers on the
queue ``results``. Without SQL here and without a back end's credentials there, no process holds both.
"""

from __future__ import annotations

import logging
import time
from typing import cast

from leoflow_celery import metrics
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.routing import RECONCILED, ExecutorType, TaskName, executor_of_task
from leoflow_celery.errors import BrokerUnavailable, TransientLaunchError
from leoflow_celery.executors.base import ReconcilableExecutor
from leoflow_celery.queueing.messages import SCOPE_OF, CollectStaging, Reconcile, StagingDeleted, Stop
from leoflow_celery.tasks.context import LeoflowTask, executor_of, leoflow_task

log = logging.getLogger(__name__)
#: A worker that died in a reconcile is replaced by the next message. A live one renews its lock.
_LOCK_SECONDS = 10
#: A cancellation is tried again for so long; after that the reconcile stops what is no longer expected.
_STOP_RETRIES = 3


def _back_end_of(task: LeoflowTask) -> ReconcilableExecutor:
    """The back end that a task's name speaks of."""
    return cast(ReconcilableExecutor, executor_of(task.app, _type_of(task)))


def _type_of(task: LeoflowTask) -> ExecutorType:
    return executor_of_task(task.name)


def reconcile(self: LeoflowTask, sealed: str) -> None:
    """Compare what exists with what SQL expects; a server that is away is looked at again by the next message."""
    expectation, executor_type = self.opened(Reconcile, sealed, SCOPE_OF[_type_of(self)]).expectation, _type_of(self)
    started = time.monotonic()
    try:
        executor = _back_end_of(self)
        name = f"reconcile.{BackEnd(executor_type, executor.host)}"
        with self.services.locks.single_flight(name, _LOCK_SECONDS) as held:
            if held:
                done = executor.reconcile(expectation)
                metrics.record_reconcile(executor_type, time.monotonic() - started)
                log.info(
                    "reconcile.done", extra={"executor": executor_type, "seen": done.seen, "reported": done.reported}
                )
    except (TransientLaunchError, BrokerUnavailable) as error:
        log.warning("reconcile.skipped", extra={"executor": executor_type, "error": str(error)})


def stop(self: LeoflowTask, sealed: str) -> None:
    """Stop one attempt by its external name."""
    order = self.opened(Stop, sealed, SCOPE_OF[_type_of(self)])
    try:
        _back_end_of(self).cancel(order.name, order.grace_seconds)
    except TransientLaunchError as error:
        if self.request.retries >= _STOP_RETRIES:
            log.warning("stop.left_to_reconcile", extra={"attempt_name": order.name, "error": error.message})
            return
        raise self.retry(countdown=2**self.request.retries, exc=error) from error


def staging(self: LeoflowTask, sealed: str) -> None:
    """Delete staging volumes and tell which are gone."""
    plan = self.opened(CollectStaging, sealed, SCOPE_OF[_type_of(self)]).plan
    try:
        executor = _back_end_of(self)
        back_end = BackEnd(_type_of(self), executor.host)
        name = f"staging.{back_end}"
        with self.services.locks.single_flight(name, _LOCK_SECONDS) as held:
            gone = executor.collect_staging(plan) if held else {}
    except (TransientLaunchError, BrokerUnavailable) as error:
        log.warning("staging.skipped", extra={"executor": _type_of(self), "error": str(error)})
        return
    if gone:
        self.publisher.staging_deleted(StagingDeleted(back_end, gone))


for _executor in RECONCILED:
    leoflow_task(TaskName.of("reconcile", _executor))(reconcile)
    leoflow_task(TaskName.of("stop", _executor))(stop)
    leoflow_task(TaskName.of("staging", _executor))(staging)
