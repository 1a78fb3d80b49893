"""A worker of a back end says that it is there, and serves its host's own queue where there are several hosts.

A thread does it: the server behind the back end may be away when the worker starts, and tells its name only later.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, cast

from celery.signals import worker_ready, worker_shutting_down

from leoflow_celery.app import LeoflowCelery
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.routing import QUEUE_OF, RECONCILED, ExecutorType
from leoflow_celery.errors import LeoflowError
from leoflow_celery.executors.base import ReconcilableExecutor
from leoflow_celery.queueing.messages import Present
from leoflow_celery.queueing.publisher import Publisher
from leoflow_celery.tasks.context import runtime_of
from leoflow_celery.tasks.executors import executor_of

log = logging.getLogger(__name__)
_EVERY_SECONDS = 15.0


class Announcer(threading.Thread):
    """Announces the back ends of one worker until it stops. ``consumer`` is Celery's."""

    def __init__(self, app: LeoflowCelery, consumer: Any, executors: list[ExecutorType]) -> None:
        super().__init__(name="leoflow-announcer", daemon=True)
        self._app, self._consumer, self._executors = app, consumer, executors
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        """Announce at once and then regularly."""
        while not self._stopping.is_set():
            for executor in self._executors:
                self._announce(executor)
            self._stopping.wait(_EVERY_SECONDS)

    def _announce(self, executor_type: ExecutorType) -> None:
        try:
            executor = executor_of(self._app, executor_type)
            back_end = BackEnd(executor_type, cast(ReconcilableExecutor, executor).host)
            self._serve(back_end)
            Publisher(self._app, runtime_of(self._app)).present(Present(back_end), _EVERY_SECONDS)
        except LeoflowError as error:
            log.warning("backend.not_announced", extra={"executor": executor_type, "error": str(error)})
        except Exception as error:  # noqa: BLE001 - the broker may be away in many ways; the next word follows soon
            log.warning("backend.not_announced", extra={"executor": executor_type, "error": repr(error)})

    def _serve(self, back_end: BackEnd) -> None:
        """Consume the host's own queue, before anybody hears of it.

        Looked at each time: a worker that lost its broker in between may have forgotten what it was about to do.
        """
        if back_end.host and not self._consumes(back_end.queue):
            self._consumer.call_soon(self._add_queue, back_end.queue)

    def _consumes(self, queue: str) -> bool:
        consuming = self._consumer.task_consumer
        return consuming is not None and bool(consuming.consuming_from(queue))

    def _add_queue(self, queue: str) -> None:
        """In the consumer's own thread. Without a connection nothing is done: the next word does it."""
        if self._consumer.task_consumer is not None and not self._consumes(queue):
            self._consumer.add_task_queue(queue)


_announcers: list[Announcer] = []


def start_announcing(sender: Any = None, **_: Any) -> None:
    """Start when a worker of a reconciled back end is ready; connected to Celery's signal."""
    app = getattr(sender, "app", None)
    if not isinstance(app, LeoflowCelery):
        return
    consumed = set(app.amqp.queues.consume_from)
    executors = [one for one in RECONCILED if QUEUE_OF[one] in consumed]
    if executors:
        announcer = Announcer(app, sender, executors)
        _announcers.append(announcer)
        announcer.start()


def stop_announcing(**_: Any) -> None:
    while _announcers:
        _announcers.pop().stop()


worker_ready.connect(start_announcing)
worker_shutting_down.connect(stop_announcing)
