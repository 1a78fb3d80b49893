"""What ``submit`` returns: the scheduler's grip on one try."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.states import TaskState

if TYPE_CHECKING:
    from celery.result import AsyncResult

    from leoflow_celery.client.client import Client
    from leoflow_celery.store.views import TaskInstanceView


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

        Raises:
            TaskFailed: with the reason, when the try failed.
            celery.exceptions.TimeoutError: after ``timeout`` seconds.
        """
        return self.result.get(timeout=timeout)

    def task_instance(self) -> TaskInstanceView:
        """All that is known of this try."""
        return self.client.task_instance(self.attempt.task_instance_id, self.attempt.try_number)

    def state(self) -> TaskState:
        """Where the try stands, from SQL."""
        return self.task_instance().state

    def cancel(self) -> bool:
        """Ask the try to stop; False when it had ended already."""
        return self.client.cancel(self.attempt.task_instance_id, self.attempt.try_number)
