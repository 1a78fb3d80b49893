"""What ``submit`` returns: the scheduler's grip on one try."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery import exceptions
from celery.result import AsyncResult
from celery.states import FAILURE, SUCCESS
from kombu.exceptions import OperationalError
from redis import exceptions as redis_errors

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.xcom import RETURN_VALUE
from leoflow_celery.errors import NotFound, Unavailable, XComRejected
from leoflow_celery.store.views import failure_of, unreadable

if TYPE_CHECKING:
    from leoflow_celery.client.client import Client
    from leoflow_celery.store.views import TaskInstanceView

log = logging.getLogger(__name__)
#: How long Redis is listened to before SQL is asked: Redis may have lost a result, or be away.
_FIRST_SLICE_SECONDS, _LAST_SLICE_SECONDS = 1.0, 5.0
#: How long ``wait`` pauses between two looks.
_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS = 0.1, 2.0
_AWAY = (
    *(OperationalError, OSError, redis_errors.ConnectionError, redis_errors.TimeoutError),
    *(redis_errors.ReadOnlyError, redis_errors.OutOfMemoryError),
)


@dataclass(frozen=True)
class Handle:
    """One submitted try. ``id`` is its Celery task id and stays the same over relaunches.

    ``created`` is False when the try had been submitted before: nothing was started a second time.
    """

    client: Client
    attempt: AttemptId
    id: str
    created: bool = True
    #: The try had been submitted before, with another request: that one counts. ``Client.submit`` finds it out.
    differs: bool = False

    @property
    def result(self) -> AsyncResult[Any]:
        """Celery's own view of the try."""
        return self.client.app.AsyncResult(self.id)

    def get(self, timeout: float | None = None) -> Any:
        """The task's return_value XCom (None without one), when it has ended.

        It waits for as long as the caller does, also while Redis is away. What SQL knows to be over, and Redis has no
        result of, is answered from SQL; a value whose XCom has expired is None then.

        Raises:
            TaskFailed: with the reason, when the try failed.
            NotFound: Redis has lost the result, and a later try of the task has replaced the value.
            celery.exceptions.TimeoutError: after ``timeout`` seconds. A Redis that accepts connections and does not
                answer may add its socket timeout (LEOFLOW_BROKER_SOCKET_TIMEOUT_SECONDS) to them.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        seconds, was_over = _FIRST_SLICE_SECONDS, False
        while True:
            answer = self._listen(max(0.0, min(seconds, deadline - time.monotonic())))
            if answer is not None:
                return answer.get()
            is_late = time.monotonic() >= deadline
            view = self._ended()
            if view is not None and (was_over or is_late):  # the result may have been on its way
                return self._from_sql(view)
            if is_late:
                raise exceptions.TimeoutError(f"the try has not ended after {timeout} seconds")
            was_over = view is not None
            seconds = _FIRST_SLICE_SECONDS if was_over else min(2 * seconds, _LAST_SLICE_SECONDS)

    def _listen(self, seconds: float) -> AsyncResult[Any] | None:
        """The result, if Redis has one within so many seconds; STARTED and REVOKED are no answer."""
        until, result = time.monotonic() + seconds, self.result
        try:
            result.get(timeout=seconds, propagate=False)
            if result.state in (SUCCESS, FAILURE):
                return result
        except exceptions.TimeoutError:
            pass
        except Exception as error:
            if not _is_away(error):
                raise
            log.info("result.broker_away", extra={"celery_task_id": self.id, "error": str(error)})
        _forget(result)
        time.sleep(max(0.0, until - time.monotonic()))
        return None

    def _ended(self) -> TaskInstanceView | None:
        """The try, when SQL knows that it is over. A client that cannot read SQL has Redis only."""
        try:
            view = self.task_instance()
        except (Unavailable, NotFound) as error:
            log.debug("result.not_in_sql", extra={"celery_task_id": self.id, "error": str(error)})
            return None
        return view if view.is_terminal else None

    def _from_sql(self, view: TaskInstanceView) -> Any:
        try:
            if view.state is TaskState.SUCCESS:
                return self._value(view)
            if view.state is TaskState.SKIPPED:
                return None
        except XComRejected as error:
            raise failure_of(unreadable(view, error)) from error
        raise failure_of(view)

    def _value(self, view: TaskInstanceView) -> Any:
        store = self.client.services.store
        value = store.return_value(view)
        if not store.attempts.is_newest(view):  # asked after the value was read
            raise NotFound(
                f"the result of {view.dag_id}.{view.task_id}, try {view.try_number}, is not in Redis any more, and a "
                "later try has replaced its value; read the later try"
            )
        return value

    def task_instance(self) -> TaskInstanceView:
        """All that is known of this try."""
        return self.client.task_instance(self.attempt.task_instance_id, self.attempt.try_number)

    def state(self) -> TaskState:
        """Where the try stands, from SQL."""
        return self.task_instance().state

    def logs(self, follow: bool = False) -> Iterator[dict[str, Any]]:
        """The log lines of this try, ``{ts, level, stream, msg}``; with ``follow`` until it has ended."""
        view = self.task_instance()
        return self.client.logs(view.dag_id, view.run_id, view.task_id, view.try_number, view.tenant_id, follow)

    def xcom(self, key: str = RETURN_VALUE) -> Any:
        """A value that the task left, its newest; unlike ``get`` it does not wait.

        Raises:
            NotFound: never pushed, or expired.
        """
        view = self.task_instance()
        return self.client.xcom(view.dag_id, view.run_id, view.task_id, key, view.tenant_id)

    def cancel(self) -> bool:
        """Ask the try to stop; False when it had ended already."""
        return self.client.cancel(self.attempt.task_instance_id, self.attempt.try_number)


def wait(handles: Iterable[Handle], timeout: float | None = None) -> tuple[list[Handle], list[Handle]]:
    """Wait until tries have ended, for ``timeout`` seconds at the most: those that have, and those that have not.

    SQL is asked, so it works without Redis. How a try ended, ``Handle.state`` says, and ``Handle.get`` its value.

    >>> wait([])
    ([], [])

    Raises:
        NotFound: a try is not recorded (any more).
        DatabaseUnavailable: SQL does not answer.
    """
    every = list(handles)
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    pause, waiting = _FIRST_LOOK_SECONDS, every
    while True:
        waiting = [handle for handle in waiting if not handle.task_instance().is_terminal]
        left = deadline - time.monotonic()
        if not waiting or left <= 0:
            return [handle for handle in every if handle not in waiting], waiting
        time.sleep(min(pause, left))
        pause = min(1.5 * pause, _LAST_LOOK_SECONDS)


def _forget(result: Any) -> None:
    """Listen no more for a result: it keeps what it has heard, and a subscription that may be lost with its server."""
    try:
        result.backend.remove_pending_result(result)
    except Exception as error:
        if not _is_away(error):
            raise
    result.backend = None  # or it tries the same once more when it is collected, and says so on stderr


def _is_away(error: BaseException) -> bool:
    """Whether Redis is away. Celery also says RuntimeError, after the error of the connection."""
    cause = error.__cause__ if isinstance(error, RuntimeError) else error
    return isinstance(cause, _AWAY)
