"""Celery's state STARTED for a call that takes its time, written beside it.

A short call is not worth a write to the result backend. A longer one is marked from a thread of its own, so that a
backend that is away cannot eat the call's deadline; ``settled`` waits for that thread, so that STARTED never comes
after the result.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from celery.states import STARTED

if TYPE_CHECKING:
    from leoflow_celery.tasks.context import LeoflowTask

log = logging.getLogger(__name__)
#: Nobody looks at the state of a call that is over sooner.
SHORT_CALL_SECONDS = 0.3


class StartedMark:
    """Asked again and again while a call waits; marks it STARTED once it is no short one."""

    def __init__(self, task: LeoflowTask, must_stop: Callable[[], bool]) -> None:
        self._task_id, self._backend = str(task.request.id), task.backend
        self._hostname = task.services.hostname
        self._must_stop = must_stop
        self._due = time.monotonic() + SHORT_CALL_SECONDS
        self._thread: threading.Thread | None = None

    def __call__(self) -> bool:
        """Whether the call must stop."""
        if self._thread is None and time.monotonic() >= self._due:
            self._thread = threading.Thread(target=self._mark, name="leoflow-started", daemon=True)
            self._thread.start()
        return self._must_stop()

    def _mark(self) -> None:
        try:
            self._backend.store_result(self._task_id, {"hostname": self._hostname}, STARTED)
        except Exception as error:  # noqa: BLE001 - a state for onlookers; the task goes on without it
            log.warning("started.not_marked", extra={"celery_task_id": self._task_id, "error": repr(error)})

    def settled(self) -> None:
        """Wait until nothing more is written."""
        if self._thread is not None:
            self._thread.join()
