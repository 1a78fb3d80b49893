"""Tasks that beat sends: one worker at a time does each, whoever sent it how often."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from leoflow_celery.domain.routing import TaskName
from leoflow_celery.tasks.context import LeoflowTask, leoflow_task

log = logging.getLogger(__name__)
#: Longer than any of these tasks takes; a worker that died in one is replaced after it.
_LEASE_SECONDS = 120

Body = Callable[[LeoflowTask], int]


def maintenance_task(task: TaskName) -> Callable[[Body], Any]:
    """Register a body as a task of beat's, run by one worker at a time; it returns what it did."""
    name = task.rpartition(".")[2]

    def register(body: Body) -> Any:
        @wraps(body)
        def single_flight(self: LeoflowTask) -> None:
            with self.services.store.leases.single_flight(f"maintenance.{name}", _LEASE_SECONDS) as held:
                if not held:
                    return
                if count := body(self):
                    log.info("maintenance.acted", extra={"task": name, "count": count})

        return leoflow_task(task)(single_flight)

    return register
