"""What a control worker measures by looking: depth and age of the queues, staging volumes.

A thread of each worker with a metrics port looks, not a task of one of them: every endpoint shows what is true now.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from typing import Any

from celery.signals import worker_ready, worker_shutting_down

from leoflow_celery import metrics
from leoflow_celery.app import LeoflowCelery
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.routing import ALL_QUEUES, LAUNCH_QUEUES, MAINTENANCE_QUEUE
from leoflow_celery.errors import LeoflowError
from leoflow_celery.queueing.dead_letters import DeadLetters
from leoflow_celery.runtime import Runtime
from leoflow_celery.store.leases import BACK_END_PRESENCE, PRESENCE_GAP_SECONDS
from leoflow_celery.tasks.context import runtime_of

log = logging.getLogger(__name__)


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


class Gauges(threading.Thread):
    """Looks at once and then regularly, until it is stopped."""

    def __init__(self, app: LeoflowCelery) -> None:
        super().__init__(name="leoflow-gauges", daemon=True)
        self._app = app
        self._stopping = threading.Event()
        #: Queues of single hosts; one that was seen is shown as empty afterwards, not as it last was.
        self._host_queues: set[str] = set()
        self._heads = QueueHeads()

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                runtime = runtime_of(self._app)
                self._measure_queues(runtime)
                measure_staging(runtime)
                metrics.set_dead_letters(DeadLetters(runtime.settings, runtime.queues.client).count())
            except LeoflowError as error:
                log.warning("gauges.not_measured", extra={"error": str(error)})
            except Exception as error:  # noqa: BLE001 - a look at the system must not end with one of its surprises
                log.warning("gauges.not_measured", extra={"error": repr(error)})
            self._stopping.wait(self._app.settings.maintenance.interval_seconds)

    def _measure_queues(self, runtime: Runtime) -> None:
        oldest = runtime.store.sweeps.oldest_waiting()
        present = runtime.store.leases.present(BACK_END_PRESENCE, PRESENCE_GAP_SECONDS)
        self._host_queues |= ({BackEnd.parse(name).queue for name in present} | oldest.keys()) - set(ALL_QUEUES)
        launch_queues = {*LAUNCH_QUEUES, *self._host_queues}
        for queue in launch_queues:
            metrics.set_queue_oldest_age(queue, time.time() - oldest[queue] if queue in oldest else 0)
        for queue in set(ALL_QUEUES) - launch_queues:
            metrics.set_queue_oldest_age(queue, self._heads.age(queue, runtime.queues.oldest_tag(queue), time.time()))
        metrics.set_queue_depths(depths_of(runtime, {*ALL_QUEUES, *launch_queues}), launch_queues)


def depths_of(runtime: Runtime, queues: Collection[str]) -> dict[str, int]:
    """The messages that wait in each queue; one that the broker does not tell is left out."""
    depths = {queue: runtime.queues.waiting(queue) for queue in sorted(queues)}
    return {queue: depth for queue, depth in depths.items() if depth is not None}


def measure_staging(runtime: Runtime) -> None:
    """``in_use``: a live try mounts it. ``idle``: kept for the rest of its run, or for people to look at."""
    volumes = runtime.store.staging.list_active()
    in_use = sum(volume.in_use for volume in volumes)
    metrics.set_staging_volumes({"in_use": in_use, "idle": len(volumes) - in_use})


_running: list[Gauges] = []


def start_gauges(sender: Any = None, **_: Any) -> None:
    """Start in a control worker whose metrics are served; connected to Celery's signal."""
    app = getattr(sender, "app", None)
    if not isinstance(app, LeoflowCelery) or not app.settings.metrics.port:
        return
    if MAINTENANCE_QUEUE in app.amqp.queues.consume_from:
        gauges = Gauges(app)
        _running.append(gauges)
        gauges.start()


def stop_gauges(**_: Any) -> None:
    while _running:
        _running.pop().stop()


worker_ready.connect(start_gauges)
worker_shutting_down.connect(stop_gauges)
