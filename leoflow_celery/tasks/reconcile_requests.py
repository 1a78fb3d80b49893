"""What SQL knows, sent to those who can compare it with what exists: reconcile and staging GC.

Only to back ends that announced themselves: nobody would consume the queue of another.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from leoflow_celery.background import RenewedLease
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.desired_state import Expectation
from leoflow_celery.domain.routing import RECONCILED, ExecutorType, TaskName
from leoflow_celery.domain.staging import StagingPlan, staging_decision
from leoflow_celery.queueing.messages import CollectStaging, Reconcile
from leoflow_celery.store.staging import StagingVolumeState
from leoflow_celery.tasks.context import LeoflowTask, maintenance_task


@maintenance_task(TaskName.REQUEST_RECONCILE)
def reconcile(self: LeoflowTask, lease: RenewedLease) -> int:
    """Send every present back end what must exist there."""
    back_ends = present_back_ends(self)
    if not back_ends:
        return 0
    expected = self.services.store.reaper_queries.expectations({one.executor.value for one in back_ends})
    for one in back_ends:
        lease.check()
        interval = self.services.settings.maintenance.interval_seconds
        self.publisher.reconcile(one, Reconcile(_of_host(expected[one.executor], one)), interval)
    return 0


def _of_host(expectation: Expectation, back_end: BackEnd) -> Expectation:
    """The same for one host: it may hold any attempt (a second delivery), but misses only what was started there."""
    if not back_end.host:
        return expectation
    attempts = expectation.attempts.values()
    return Expectation.of(
        expectation.read_at,
        (one if one.host == back_end.host else replace(one, launched_at=None) for one in attempts),
    )


@maintenance_task(TaskName.REQUEST_STAGING)
def collect_staging(self: LeoflowTask, lease: RenewedLease) -> int:
    """Send every present back end the staging volumes to delete, and those to keep."""
    begun, ttl = time.monotonic(), self.services.settings.staging.ttl_seconds
    now = self.services.store.now()
    volumes = self.services.store.staging.list_active()
    # Never bound to a host, so it never came into being.
    _mark_deleted(self, plan_staging((one for one in volumes if one.backend == ExecutorType.DOCKER), now, ttl))
    for one in present_back_ends(self):
        lease.check()
        plan = plan_staging((volume for volume in volumes if volume.backend == str(one)), now, ttl)
        plan = replace(plan, age_seconds=time.monotonic() - begun)
        interval = self.services.settings.maintenance.staging_interval_seconds
        self.publisher.collect_staging(one, CollectStaging(plan), interval)
    return 0


def _mark_deleted(task: LeoflowTask, plan: StagingPlan) -> None:
    for claim_name, reason in plan.delete.items():
        task.services.store.staging.mark_staging_deleted(claim_name, reason)


def plan_staging(volumes: Iterable[StagingVolumeState], now: float, ttl_seconds: float) -> StagingPlan:
    """Sort the active volumes of one back end into those to delete and those to keep."""
    delete, keep = {}, set()
    for volume in volumes:
        ended = None if volume.run_ended_at is None else now - volume.run_ended_at
        reason = staging_decision(volume.run_state, ended, now - volume.created_at, ttl_seconds)
        if reason is None or volume.in_use:
            keep.add(volume.claim_name)
        else:
            delete[volume.claim_name] = reason.value
    return StagingPlan(now, delete, frozenset(keep), ttl_seconds)


def present_back_ends(task: LeoflowTask) -> list[BackEnd]:
    """Who announced itself within the last minute."""
    return [one for one in task.services.store.presence.back_ends() if one.executor in RECONCILED]
