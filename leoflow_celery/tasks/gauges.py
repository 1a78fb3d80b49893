"""What a control worker measures by looking: depth and age of the queues, staging volumes.

A thread of each worker with a metrics port looks, not a task of one of them: every endpoint shows what is true now.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from celery import bootsteps

from leoflow_celery import metrics
from leoflow_celery.app import LeoflowCelery
from leoflow_celery.background import Periodic
from leoflow_celery.domain.routing import ALL_QUEUES, LAUNCH_QUEUES, MAINTENANCE_QUEUE
from leoflow_celery.queueing.dead_letters import DeadLetters
from leoflow_celery.services import Services


class QueueHeads:
    """Since when each queue has had the same oldest message. Celery's messages carry no time of their own.

    What it tells is too young by the time between two looks at most.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, float]] = {}

    def age(self, queue: str, tag: str | None, now: float) -> float:
        """Seconds that the message ``tag`` has been seen at the head of a queue; 0 for an empty one (None)."""
        if tag is None:
            self._seen.pop(queue, None)
            return 0.0
        known, since = self._seen.get(queue, ("", now))
        if known != tag:
            since = now
        self._seen[queue] = (tag, since)
        return now - since


class Gauges(bootsteps.StartStopStep):
    """The part of a control worker with a metrics port that looks at once and then regularly."""

    requires = ("celery.worker.components:Pool",)

    def include_if(self, worker: Any) -> bool:
        return bool(worker.app.settings.metrics.port) and MAINTENANCE_QUEUE in worker.app.amqp.queues.consume_from

    def create(self, worker: Any) -> Any:
        return Periodic(
            Looks(worker.app),
            worker.app.settings.maintenance.interval_seconds,
            name="leoflow-gauges",
            failed="gauges.not_measured",
        )


class Looks:
    """Looks at the system: one look a call."""

    def __init__(self, app: LeoflowCelery) -> None:
        self._app = app
        #: Queues of single hosts; one that was seen is shown as empty afterwards, not as it last was.
        self._host_queues: set[str] = set()
        self._heads = QueueHeads()

    def __call__(self) -> None:
        """Set the gauges.

        Raises:
            DatabaseUnavailable, BrokerUnavailable: nobody knows; they stay as they were.
        """
        services = self._app.services
        self._measure_queues(services)
        measure_staging(services)
        metrics.set_dead_letters(DeadLetters(services.settings, services.queues.client).count())

    def _measure_queues(self, services: Services) -> None:
        oldest = services.store.reaper_queries.oldest_waiting()
        present = services.store.presence.back_ends()
        self._host_queues |= ({one.queue for one in present} | oldest.keys()) - set(ALL_QUEUES)
        launch_queues = {*LAUNCH_QUEUES, *self._host_queues}
        for queue in launch_queues:
            metrics.set_queue_oldest_age(queue, oldest.get(queue, 0))
        for queue in set(ALL_QUEUES) - launch_queues:
            metrics.set_queue_oldest_age(
                queue, self._heads.age(queue, services.queues.oldest_tag(queue), time.monotonic())
            )
        metrics.set_queue_depths(depths_of(services, {*ALL_QUEUES, *launch_queues}), launch_queues)


def depths_of(services: Services, queues: Collection[str]) -> dict[str, int]:
    """The messages that wait in each queue; one that the broker does not tell is left out."""
    depths = {queue: services.queues.waiting(queue) for queue in sorted(queues)}
    return {queue: depth for queue, depth in depths.items() if depth is not None}


def measure_staging(services: Services) -> None:
    """``in_use``: a live try mounts it. ``idle``: kept for the rest of its run, or for people to look at."""
    volumes = services.store.staging.list_active()
    in_use = sum(volume.in_use for volume in volumes)
    metrics.set_staging_volumes({"in_use": in_use, "idle": len(volumes) - in_use})
