"""What the reapers look at: live attempts that are silent, unlaunched or cancelled. Reads only."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from leoflow_celery.domain.attempt import AttemptId, attempt_name
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.desired_state import Expectation, ExpectedAttempt
from leoflow_celery.domain.routing import QUEUE_OF, ExecutorType
from leoflow_celery.store import task_instance_sql
from leoflow_celery.store.database import Database
from leoflow_celery.store.models import database_now
from leoflow_celery.store.views import TaskInstanceView


class ReaperQueries:
    """Queries over live rows only (a partial index serves them)."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def silent(self, heartbeat_timeout_seconds: float, page: int = 500) -> Iterator[TaskInstanceView]:
        """Claimed attempts whose last sign of life is older than the timeout."""
        return self._live(task_instance_sql.is_silent(heartbeat_timeout_seconds), page)

    def waiting(self, at_least_seconds: float, page: int = 500) -> Iterator[TaskInstanceView]:
        """Sent but unclaimed attempts, queued at least that long."""
        return self._live(task_instance_sql.is_waiting(at_least_seconds), page)

    def cancelled(self, grace_seconds: float, page: int = 500) -> Iterator[TaskInstanceView]:
        """Attempts asked to stop that have not stopped within the grace."""
        return self._live(task_instance_sql.is_cancelled(grace_seconds), page)

    def expectations(self, executors: Collection[str]) -> dict[str, Expectation]:
        """What must exist outside, per executor: every live attempt of it, in one query for all of them."""
        found: dict[str, list[ExpectedAttempt]] = {executor: [] for executor in executors}
        with self._database.reading() as connection:
            now = database_now(connection)
            for row in connection.execute(task_instance_sql.expected(executors)):
                attempt = AttemptId(row.task_instance_id, row.try_number, row.launch)
                name = attempt_name(attempt, row.dag_id, row.task_id)
                where = _where(row.back_end)
                expected = ExpectedAttempt(attempt, name, row.launched_at, row.holder is not None, *where)
                found[row.executor].append(expected)
        return {executor: Expectation.of(now, attempts) for executor, attempts in found.items()}

    def oldest_waiting(self) -> dict[str, float]:
        """For how many seconds the oldest task instance of each launch queue has waited; none for an empty one."""
        with self._database.reading() as connection:
            rows = connection.execute(task_instance_sql.oldest_waiting()).all()
        return {name or QUEUE_OF[ExecutorType(executor)]: max(now - at, 0.0) for executor, name, at, now in rows}

    def _live(self, condition: task_instance_sql.Condition, page: int) -> Iterator[TaskInstanceView]:
        """All that fit, the longest queued first, page by page: many that are in order must not hide one that is not.

        What changes between two pages was in order a moment ago, or is looked at by the next sweep.
        """
        after: tuple[float, str, int] | None = None
        while True:
            with self._database.reading() as connection:
                rows = connection.execute(task_instance_sql.live(condition, page, after)).mappings()
                views = [TaskInstanceView.from_row(row) for row in rows]
            yield from views
            if len(views) < page:
                return
            after = (views[-1].queued_at, views[-1].task_instance_id, views[-1].try_number)


def _where(address: str) -> tuple[str, str]:
    """Host and place."""
    back_end = BackEnd.parse(address) if address else None
    return (back_end.host, back_end.place) if back_end else ("", "")
