"""What the reapers look at: live attempts that are silent, unlaunched or cancelled. Reads only."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator

import sqlalchemy as sa

from leoflow_celery.domain.attempt import AttemptId, attempt_name
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.expectation import Expectation, ExpectedAttempt
from leoflow_celery.domain.routing import QUEUE_OF, ExecutorType
from leoflow_celery.store.database import Database
from leoflow_celery.store.models import TaskInstance, is_live, table_of
from leoflow_celery.store.views import TaskInstanceView

_TI = table_of(TaskInstance)


class SweepStore:
    """Queries over live rows only (a partial index serves them)."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def silent(self, heartbeat_timeout_seconds: float, page: int = 500) -> Iterator[TaskInstanceView]:
        """Claimed attempts whose last heartbeat is older than the timeout."""
        before = time.time() - heartbeat_timeout_seconds
        return self._live(_TI.c.holder.is_not(None), _TI.c.last_heartbeat_at < before, page=page)

    def waiting(self, at_least_seconds: float, page: int = 500) -> Iterator[TaskInstanceView]:
        """Sent but unclaimed attempts, queued at least that long."""
        before = time.time() - at_least_seconds
        return self._live(_TI.c.holder.is_(None), _TI.c.sent_at < before, page=page)

    def cancelled(self, grace_seconds: float, page: int = 500) -> Iterator[TaskInstanceView]:
        """Attempts asked to stop that have not stopped within the grace."""
        return self._live(_TI.c.cancel_requested_at < time.time() - grace_seconds, page=page)

    def expectations(self, executors: Collection[str]) -> dict[str, Expectation]:
        """What must exist outside, per executor: every live attempt of it, in one query for all of them."""
        names = ("executor", "task_instance_id", "try_number", "launch", "dag_id", "task_id")
        more = ("launched_at", "holder", "back_end")
        query = sa.select(*(_TI.c[name] for name in names + more)).where(is_live(), _TI.c.executor.in_(executors))
        found: dict[str, list[ExpectedAttempt]] = {executor: [] for executor in executors}
        now = time.time()
        with self._database.reading() as connection:
            for executor, ti, number, launch, dag_id, task_id, launched_at, holder, back_end in connection.execute(
                query
            ):
                attempt = AttemptId(ti, number, launch)
                name = attempt_name(attempt, dag_id, task_id)
                found[executor].append(ExpectedAttempt(attempt, name, launched_at, holder is not None, _host(back_end)))
        return {executor: Expectation.of(now, attempts) for executor, attempts in found.items()}

    def oldest_waiting(self) -> dict[str, float]:
        """Since when the oldest task instance of each launch queue has waited for a worker; none for an empty one."""
        since = sa.func.min(sa.func.coalesce(_TI.c.sent_at, _TI.c.queued_at), type_=_TI.c.queued_at.type)
        waiting = sa.and_(is_live(), _TI.c.holder.is_(None), _TI.c.launched_at.is_(None))
        query = sa.select(_TI.c.executor, _TI.c.queue_name, since).where(waiting)
        with self._database.reading() as connection:
            rows = connection.execute(query.group_by(_TI.c.executor, _TI.c.queue_name)).all()
        return {name or QUEUE_OF[ExecutorType(executor)]: float(at) for executor, name, at in rows}

    def _live(self, *conditions: sa.ColumnElement[bool], page: int) -> Iterator[TaskInstanceView]:
        """All that fit, the longest queued first, page by page: many that are in order must not hide one that is not.

        What changes between two pages was in order a moment ago, or is looked at by the next sweep.
        """
        order = (_TI.c.queued_at, _TI.c.task_instance_id, _TI.c.try_number)
        query = sa.select(_TI).where(is_live(), *conditions).order_by(*order).limit(page)
        following = query
        while True:
            with self._database.reading() as connection:
                views = [TaskInstanceView.from_row(row) for row in connection.execute(following).mappings()]
            yield from views
            if len(views) < page:
                return
            last = views[-1]
            following = query.where(_after(last.queued_at, last.task_instance_id, last.try_number))


def _after(queued_at: float, task_instance_id: str, try_number: int) -> sa.ColumnElement[bool]:
    """Later in the order of ``_live``."""
    same_time = _TI.c.queued_at == queued_at
    same_task = sa.and_(same_time, _TI.c.task_instance_id == task_instance_id)
    return sa.or_(
        _TI.c.queued_at > queued_at,
        sa.and_(same_time, _TI.c.task_instance_id > task_instance_id),
        sa.and_(same_task, _TI.c.try_number > try_number),
    )


def _host(back_end: str) -> str:
    return BackEnd.parse(back_end).host if back_end else ""
