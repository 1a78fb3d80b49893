"""Tasks that beat sends: one worker at a time does each, whoever sent it how often."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from leoflow_celery.background import RenewedLease
from leoflow_celery.domain.routing import TaskName
from leoflow_celery.errors import LeaseLost
from leoflow_celery.tasks.context import LeoflowTask, leoflow_task

log = logging.getLogger(__name__)
#: A worker that died in one of these tasks is replaced after it. A living one renews its lease.
_LEASE_SECONDS = 10

Body = Callable[[LeoflowTask, RenewedLease], int]


def maintenance_task(task: TaskName) -> Callable[[Body], Any]:
    """Register a body as a task of beat's, run by one worker at a time; it returns what it did.

    The body asks its lease again and again whether it may go on.
    """
    name = task.rpartition(".")[2]

    def register(body: Body) -> Any:
        @wraps(body)
        def single_flight(self: LeoflowTask) -> None:
            with self.services.store.leases.single_flight(f"maintenance.{name}", _LEASE_SECONDS) as lease:
                if not lease:
                    return
                try:
                    count = body(self, lease)
                except LeaseLost as error:
                    log.warning("maintenance.stopped", extra={"task": name, "error": str(error)})
                    return
                if count:
                    log.info("maintenance.acted", extra={"task": name, "count": count})

        return leoflow_task(task)(single_flight)

    return register
