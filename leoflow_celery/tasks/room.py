"""A launch worker takes no more from its executor's queue than its host has room for; the rest waits there for others.

An executor with ``room()`` (``executors.base.LimitedExecutor``) says how many more it would start. The consumer counts
what it takes. When nothing is free it stops consuming the queue, exactly there; what came along goes back uncounted.
Then it asks the executor every so often, and consumes again. Nothing is remembered, so nothing is lost by a kill -9:
every connection to the broker begins with a question. Queues of one host, results and whatever else the worker
consumes go on.

Two workers on one host may both count on the last slot. The executor decides (``HostFull``), and the message goes back.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from celery import bootsteps
from celery.worker import state

from leoflow_celery.domain.routing import QUEUE_OF, ExecutorType, TaskName
from leoflow_celery.errors import LeoflowError
from leoflow_celery.tasks.context import executor_of

log = logging.getLogger(__name__)
#: Between two questions while the host is full: to the directory of this host, and to a server.
_ASK_SECONDS = {ExecutorType.SUBPROCESS: 0.1, ExecutorType.DOCKER: 1.0}
LIMITED = tuple(_ASK_SECONDS)


class Room(bootsteps.StartStopStep):
    """The gates of a worker's consumer. They are used in the consumer's own thread."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._gates: list[Gate] = []

    def start(self, consumer: Any) -> None:
        consumed = consumer.app.amqp.queues.consume_from
        self._gates = [Gate(consumer, one) for one in LIMITED if QUEUE_OF[one] in consumed]
        consumer.gates = {gate.task: gate for gate in self._gates}
        for gate in self._gates:
            gate.shut()

    def stop(self, consumer: Any) -> None:
        consumer.gates = {}
        for gate in self._gates:
            gate.forget()


class Gate:
    """Whether the consumer takes launches of an executor."""

    def __init__(self, consumer: Any, executor_type: ExecutorType) -> None:
        self.task = TaskName.of("execute", executor_type)
        self._consumer, self._executor_type, self._queue = consumer, executor_type, QUEUE_OF[executor_type]
        self._free: int | None = 0
        self._is_gone = self._is_shut = False
        self._asking = ThreadPoolExecutor(1, f"leoflow-room-{executor_type}")

    def taken(self) -> None:
        """A launch was taken from the queue."""
        if self._free is not None:
            self._free -= 1
            if self._free <= 0 and not self._is_shut:
                log.info("launch.host_full", extra={"queue": self._queue})
                self.shut()

    def shut(self) -> None:
        """Consume no launch until the executor has room."""
        self._is_shut = True
        self._consumer.task_consumer.cancel_by_queue(self._queue)
        self._ask()

    def forget(self) -> None:
        """The connection is gone, and the consumer of the next one has gates of its own."""
        self._is_gone = True
        self._asking.shutdown(wait=False, cancel_futures=True)

    def _ask(self) -> None:
        # A launch under way may be among those that the executor counts, or not yet: it is counted here as well.
        if not self._is_gone:
            self._asking.submit(self._answer, self._under_way())

    def _under_way(self) -> int:
        waits = state.reserved_requests - state.active_requests
        return sum(one.name == self.task and not (one.eta and one in waits) for one in tuple(state.reserved_requests))

    def _answer(self, under_way: int) -> None:
        try:
            room = getattr(executor_of(self._consumer.app, self._executor_type), "room", None)
            free = None if room is None else room()
        except LeoflowError as error:
            # The launch says it better, and is tried again by the rules for that.
            log.warning("launch.room_unknown", extra={"queue": self._queue, "error": str(error)})
            free = under_way + 1
        self._consumer.call_soon(self._open, free, under_way)

    def _open(self, free: int | None, under_way: int) -> None:
        if self._is_gone or self._consumer.task_consumer is None:
            return
        self._free = None if free is None else free - under_way
        if self._free is not None and self._free <= 0:
            self._consumer.timer.call_after(_ASK_SECONDS[self._executor_type], self._ask)
            return
        self._is_shut = False
        self._consumer.task_consumer.add_queue(self._consumer.app.amqp.queues[self._queue])
        self._consumer.task_consumer.consume()
