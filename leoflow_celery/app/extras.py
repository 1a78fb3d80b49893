"""What a worker does beside its tasks, each part as a Celery bootstep; and the same of beat, which has no bootsteps.

Bootsteps are Celery's documented way to extend a worker: those of the blueprint ``worker`` live as long as the process,
those of ``consumer`` as long as a connection to the broker. ``steps_of`` says which a worker has.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from celery import bootsteps
from celery.signals import after_task_publish, task_revoked, worker_shutdown
from redis.exceptions import RedisError

from leoflow_celery import metrics
from leoflow_celery.app.logging import show_fields
from leoflow_celery.domain.routing import MAINTENANCE_QUEUE, QUEUE_OF, RECONCILED, RESULTS_QUEUE, ExecutorType
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.queueing.permissions import refusal, refused_commands

log = logging.getLogger(__name__)
#: As often as a worker's heartbeats.
_TOUCH_SECONDS = 2.0
_MAX_QUEUE_CHARACTERS = 255
#: Of tasks' modules, by name: a worker loads only what its queues need. Workers of launch queues never import SQL.
_GAUGES = "leoflow_celery.tasks.gauges:Gauges"
_LAUNCH_COLLECTOR = "leoflow_celery.tasks.results:LaunchCollector"
_REDIS_MARKS = "leoflow_celery.tasks.redis_marks:RedisMarks"
_READ_CLOCKS = "leoflow_celery.app.clocks:ReadClocks"
_ROOM = "leoflow_celery.tasks.room:Room"
_BACK_END_PRESENCE = "leoflow_celery.tasks.back_end_presence:BackEndPresence"


class LogFields(bootsteps.Step):
    """Shows the fields of our log lines. Celery has set up its log when it makes its steps."""

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        show_fields()


class BackEndFiles(bootsteps.Step):
    """Reads the files that an executor's settings name: a worker whose launches would all fail does not start."""

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        # Not when a module is imported: only a worker of these queues has the files, and the clients of the servers.
        from leoflow_celery.executors.registry import BACK_ENDS, check_executor

        consumed = worker.app.amqp.queues.consume_from
        for executor_type in BACK_ENDS:
            if QUEUE_OF[executor_type] in consumed:
                try:
                    check_executor(executor_type, worker.app.settings)
                except ConfigurationError as error:
                    raise SystemExit(f"the worker does not start: {error}") from error


class BrokerRights(bootsteps.Step):
    """Asks whether the broker's user may do what a worker does: one that may not would end in the middle of it.

    A broker that is away is waited for, by Celery, and not asked.
    """

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        broker = worker.app.settings.broker
        try:
            refused = refused_commands(broker, sorted(worker.app.amqp.queues.consume_from))
        except (RedisError, OSError) as error:
            log.info("broker.rights_unknown", extra={"error": repr(error)})
            return
        if refused:
            raise SystemExit(f"the worker does not start: {refusal(broker, refused)}")


class MetricsEndpoint(bootsteps.StartStopStep):
    """Serves Prometheus when LEOFLOW_METRICS_PORT names a port, to the end of the process.

    It starts after the pool, whose processes would keep the port of a worker that is gone. The settings apply from the
    beginning, so that they are there in those processes.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        metrics.configure(worker.app.settings.metrics)

    def start(self, worker: Any) -> None:
        try:
            metrics.serve(worker.app.settings.metrics.port)
        except ConfigurationError as error:  # tasks are worth more than their metrics
            log.error("metrics.not_served", extra={"error": str(error)})  # noqa: TRY400 - the text says it all


class AliveFile(bootsteps.StartStopStep):
    """Touches LEOFLOW_HEALTH_FILE from the worker's own loop while it has its broker.

    The age of the file tells whether the worker is alive: asking costs a look at a clock, not a Celery command.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._timer: Any = None

    def include_if(self, consumer: Any) -> bool:
        return consumer.app.settings.health.file is not None

    def start(self, consumer: Any) -> None:
        touch = _touching(consumer.app.settings.health.file)
        touch()
        self._timer = consumer.timer.call_repeatedly(_TOUCH_SECONDS, touch)

    def stop(self, _consumer: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class SettledHeap(bootsteps.StartStopStep):
    """Lets the garbage collector pass over what was loaded: it lives as long as the process."""

    def start(self, _worker: Any) -> None:
        gc.collect()
        gc.freeze()


class CloseServices(bootsteps.Step):
    """Closes the app's services when the worker has ended its tasks and left the broker.

    No step is sure to stop after the pool, and what ends in the pool needs them. Celery's signal comes after it all,
    and not at a cold shutdown, which leaves tasks behind that still run.
    """

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._app = worker.app
        worker_shutdown.connect(self._close, sender=worker, weak=False)

    def _close(self, **_: Any) -> None:
        self._app.close_services()


@task_revoked.connect
def note_expired(request: Any = None, expired: bool = False, **_: Any) -> None:
    """A message that its publisher let expire is not run: counted and said, since the reason may be a clock."""
    if expired and request is not None:
        record_expired(str((request.delivery_info or {}).get("routing_key") or ""), request.task, request.id)


def record_expired(queue: str, task: str, celery_task_id: str) -> None:
    """Count and log a message that was not run because it had expired."""
    metrics.record_expired(queue[:_MAX_QUEUE_CHARACTERS])
    log.warning("message.expired", extra={"queue": queue, "task": task, "celery_task_id": celery_task_id})


def steps_of(queues: Sequence[str]) -> dict[str, set[Any]]:
    """The extra steps of a worker of these queues, by blueprint: classes, or where to find them."""
    worker: set[Any] = {LogFields, BackEndFiles, BrokerRights, MetricsEndpoint, SettledHeap, CloseServices}
    worker.add(_READ_CLOCKS)
    consumer: set[Any] = {AliveFile}
    if MAINTENANCE_QUEUE in queues:
        worker.add(_GAUGES)
    if RESULTS_QUEUE in queues:
        worker |= {_LAUNCH_COLLECTOR, _REDIS_MARKS}
    if any(QUEUE_OF[one] in queues for one in RECONCILED):
        consumer.add(_BACK_END_PRESENCE)
    if any(QUEUE_OF[one] in queues for one in (ExecutorType.SUBPROCESS, ExecutorType.DOCKER)):
        consumer.add(_ROOM)
    return {"worker": worker, "consumer": consumer}


def touch_with_messages(file: Path | None) -> None:
    """Touch ``file`` whenever this process, which is beat's, published a task."""
    if file is not None:
        touch = _touching(file)
        after_task_publish.connect(lambda **_: touch(), weak=False, dispatch_uid=f"leoflow-alive-{file}")


def _touching(file: Path) -> Callable[[], None]:
    def touch() -> None:
        try:
            file.touch()
        except OSError as error:
            log.warning("health.not_touched", extra={"file": str(file), "error": str(error)})

    return touch
