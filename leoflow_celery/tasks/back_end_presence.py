"""A worker of a back end says that it is there, and serves its host's own queue where there are several hosts.

Threads do it: the server behind a back end may be away when the worker starts, and tells its name only later.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from celery import bootsteps

from leoflow_celery.background import Periodic
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.routing import QUEUE_OF, RECONCILED, ExecutorType
from leoflow_celery.executors.base import ReconcilableExecutor
from leoflow_celery.queueing.messages import Present
from leoflow_celery.queueing.publisher import Publisher
from leoflow_celery.tasks.context import executor_of, services_of

_EVERY_SECONDS = 15.0
#: Two announcements: a slow control worker need not forget one that the next is only about to replace.
_GOOD_FOR_SECONDS = 2 * _EVERY_SECONDS


class BackEndPresence(bootsteps.StartStopStep):
    """The part of a worker's consumer that announces the back ends whose queues it consumes.

    It starts with each connection to the broker and stops with its loss.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._announcing: list[Periodic] = []

    def include_if(self, consumer: Any) -> bool:
        return bool(_served(consumer))

    def start(self, consumer: Any) -> None:
        self._announcing = [
            Periodic(
                partial(announce, consumer, executor_type),
                _EVERY_SECONDS,
                name=f"leoflow-presence-{executor_type}",
                failed="backend.not_announced",
                fields={"executor": executor_type},
            )
            for executor_type in _served(consumer)
        ]
        for one in self._announcing:
            one.start()

    def stop(self, _consumer: Any) -> None:
        """Without waiting: this is the worker's loop, and a turn may be waiting for a server."""
        for one in self._announcing:
            one.stop()


def _served(consumer: Any) -> list[ExecutorType]:
    consumed = consumer.app.amqp.queues.consume_from
    return [one for one in RECONCILED if QUEUE_OF[one] in consumed]


def announce(consumer: Any, executor_type: ExecutorType) -> None:
    """Say that this worker holds the back end. Its host's queue is consumed before anybody hears of it.

    Raises:
        LeoflowError: the back end is not known, or its server did not tell who it is.
        BrokerUnavailable: the broker did not take it.
    """
    back_end = BackEnd(executor_type, cast(ReconcilableExecutor, executor_of(consumer.app, executor_type)).host)
    # Looked at each time: a worker that lost its broker in between may have forgotten what it was about to do.
    if back_end.host and not _consumes(consumer, back_end.queue):
        consumer.call_soon(_consume, consumer, back_end.queue)
    Publisher(consumer.app, services_of(consumer.app)).present(Present(back_end), _GOOD_FOR_SECONDS)


def _consumes(consumer: Any, queue: str) -> bool:
    consuming = consumer.task_consumer
    return consuming is not None and bool(consuming.consuming_from(queue))


def _consume(consumer: Any, queue: str) -> None:
    """In the consumer's own thread. Without a connection nothing is done: the next word does it."""
    if consumer.task_consumer is not None and not _consumes(consumer, queue):
        consumer.add_task_queue(queue)
