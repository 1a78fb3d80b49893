"""Telling the rest of the system that an attempt ended. A nudge only: a sweep finds what was not told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.services import Services

log = logging.getLogger(__name__)

#: (task_instance_id, try_number) → None; called in a thread.
OnFinished = Callable[[str, int], None]
#: More than this waiting means that the broker is away; the sweep does the rest.
_MAX_WAITING = 1_000


def nudge_results(services: Services) -> OnFinished:
    """The standard notification: a results worker completes the try, or sends its next launch."""
    from leoflow_celery.app import create_app  # Celery costs 200 ms, and embedders may bring their own
    from leoflow_celery.queueing.publisher import Publisher

    return Publisher(create_app(settings=services.settings), services).advance_try


class Notifier:
    """Calls ``on_finished`` in a pool of its own; its failures are logged and reach nobody."""

    def __init__(self, on_finished: OnFinished, pool: Executor) -> None:
        self._on_finished, self._pool = on_finished, pool
        self._waiting = 0

    def finished(self, attempt: AttemptId) -> None:
        """An end, or a relaunch, was recorded. Returns at once."""
        if self._waiting >= _MAX_WAITING:
            log.warning("attempt %s: nobody was told of its end, %d wait already", attempt, self._waiting)
            return
        self._waiting += 1
        self._pool.submit(self._call, attempt)

    def _call(self, attempt: AttemptId) -> None:
        try:
            self._on_finished(attempt.task_instance_id, attempt.try_number)
        except Exception as error:  # noqa: BLE001 - a foreign callable
            log.warning("attempt %s: nobody could be told of its end, the sweep will: %s", attempt, error)
        finally:
            self._waiting -= 1
