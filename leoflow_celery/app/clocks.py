"""Every process reads the clocks of the servers it uses, shows how far its own is off, and tells doctor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from celery import bootsteps

from leoflow_celery import metrics
from leoflow_celery.background import Periodic
from leoflow_celery.clock import ServerClock, broker_clock
from leoflow_celery.domain.routing import DISPATCH_QUEUE, MAINTENANCE_QUEUE, QUEUE_OF, RESULTS_QUEUE, ExecutorType
from leoflow_celery.queueing.depths import broker_errors_mapped
from leoflow_celery.services import Services

_EVERY_SECONDS = 15.0
#: Who has not said anything for so long is gone.
_KEPT_SECONDS = 60.0
_MAX_NAME_CHARACTERS = 255
_KEY = "clocks"
#: Workers of these queues have SQL.
_WITH_SQL = frozenset((QUEUE_OF[ExecutorType.INLINE], DISPATCH_QUEUE, RESULTS_QUEUE, MAINTENANCE_QUEUE))


@dataclass(frozen=True, slots=True)
class Offset:
    """How many seconds a process's clock was ahead of the broker's, and of the database's where it uses that."""

    process: str
    broker: float
    database: float | None = None


def broker_now(services: Services) -> float | None:
    """The time by the broker's clock; None of a broker that is not Redis.

    Raises:
        BrokerUnavailable: it did not answer.
    """
    client = services.queues.client
    if client is None:
        return None
    with broker_errors_mapped(services.settings.broker):
        seconds, microseconds = client.time()
    return float(seconds) + float(microseconds) / 1e6


class ClockReader:
    """Reads the clocks: one look a call."""

    def __init__(self, services: Callable[[], Services], kind: str, *, with_sql: bool) -> None:
        """``kind`` is what the process is called: gateway, beat, worker."""
        self._services, self._kind = services, kind
        self._database = ServerClock() if with_sql else None

    def __call__(self) -> None:
        """Read, set the metric and tell the others.

        Raises:
            BrokerUnavailable, DatabaseUnavailable: a clock stays as it was last read.
        """
        services = self._services()
        client = services.queues.client
        if client is not None:
            broker_clock.read(lambda: broker_now(services) or 0.0)
            metrics.set_clock_offset("broker", broker_clock.offset_seconds or 0.0)
        if self._database is not None:
            self._database.read(services.store.now)
            metrics.set_clock_offset("database", self._database.offset_seconds or 0.0)
        if client is not None:
            self._tell(services, client)

    def _tell(self, services: Services, client: Any) -> None:
        broker = services.settings.broker
        database = None if self._database is None else self._database.offset_seconds
        said = {"broker": broker_clock.offset_seconds, "database": database, "at": broker_clock.time()}
        process = f"{self._kind}@{services.hostname}:{os.getpid()}"
        key = broker.key_prefix + _KEY
        with broker_errors_mapped(broker), client.pipeline(transaction=False) as pipe:
            pipe.hset(key, process, json.dumps(said))
            pipe.expire(key, int(_KEPT_SECONDS * 60))
            pipe.execute()


def reading(services: Callable[[], Services], kind: str, *, with_sql: bool) -> Periodic:
    """The clocks are read at once and then regularly, once it is started."""
    reader = ClockReader(services, kind, with_sql=with_sql)
    return Periodic(reader, _EVERY_SECONDS, name="leoflow-clocks", failed="clock.not_read")


class ReadClocks(bootsteps.StartStopStep):
    """The part of a worker that reads the clocks."""

    requires = ("celery.worker.components:Pool",)

    def create(self, worker: Any) -> Any:
        queues = set(worker.app.amqp.queues.consume_from)
        kind = f"worker:{','.join(sorted(queues))}"[:_MAX_NAME_CHARACTERS]
        return reading(lambda: worker.app.services, kind, with_sql=bool(queues & _WITH_SQL))


def offsets(services: Services) -> list[Offset]:
    """What the processes of the system said within the last minute. Their words are a hint and are checked for form.

    Raises:
        BrokerUnavailable: the broker did not answer.
    """
    broker, client = services.settings.broker, services.queues.client
    now = broker_now(services)
    if client is None or now is None:
        return []
    with broker_errors_mapped(broker):
        said = client.hgetall(broker.key_prefix + _KEY)
    found = (_offset(process, text, now) for process, text in said.items())
    return sorted((one for one in found if one is not None), key=lambda one: one.process)


def _offset(process: bytes, text: bytes, now: float) -> Offset | None:
    try:
        said = json.loads(text)
        database = said["database"]
        one = Offset(
            process.decode()[: 2 * _MAX_NAME_CHARACTERS],
            float(said["broker"]),
            None if database is None else float(database),
        )
        return one if abs(now - float(said["at"])) <= _KEPT_SECONDS else None
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
