"""Which Celery ids wait for which try, and which of them are due.

Completion is driven from here: a row is due when its try is terminal and nobody has completed it. A lease keeps two
workers from completing the same id at once; a worker that dies loses it and another goes on.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa

from leoflow_celery.domain.attempt import celery_task_id as id_of_try
from leoflow_celery.domain.attempt import is_try_id
from leoflow_celery.domain.fields import is_storable
from leoflow_celery.domain.request import check_celery_id
from leoflow_celery.errors import InvalidRequest
from leoflow_celery.store.database import CHUNK_ROWS, Database, batched
from leoflow_celery.store.models import DatabaseTime, TaskCompletion, table_of
from leoflow_celery.store.task_instance_sql import ended_try, ids_of_run, value_is_replaced

_TABLE = table_of(TaskCompletion)
#: As many are taken at once: what a worker does in a small part of a lease.
GROUP = 20
_FIRST_DELAY_SECONDS = 30.0
_LAST_DELAY_SECONDS = 3_600.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """A Celery id whose try has ended; ``context`` holds its task name and request parts."""

    celery_task_id: str
    task_instance_id: str
    try_number: int
    context: dict[str, Any]
    result_callback: dict[str, Any] | None
    failures: int = 0
    #: The lease under which it was taken; whoever took it later, or opened it again, has changed that.
    lease_until: float | None = None


class CompletionStore:
    """The outbox of results."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def register(self, celery_task_id: str, task_instance_id: str, try_number: int, context: dict[str, Any]) -> bool:
        """Let another Celery id wait for a try (a dispatch message, say); False when it waits, or did, already.

        Raises:
            InvalidRequest: the id is none that a database keeps, or belongs to another try.
        """
        check_celery_id(celery_task_id)
        _check_owner(celery_task_id, (task_instance_id, try_number), None)
        row = {
            "celery_task_id": celery_task_id,
            "task_instance_id": task_instance_id,
            "try_number": try_number,
            "context": context,
            "created_at": DatabaseTime(),
        }
        with self._database.transaction() as connection:
            insert = self._database.insert(_TABLE).values(row).on_conflict_do_nothing()
            is_new = connection.execute(insert.returning(_TABLE.c.celery_task_id)).first() is not None
        if not is_new:
            self.waits(celery_task_id, task_instance_id, try_number)
        return is_new

    def waits(self, celery_task_id: str, task_instance_id: str, try_number: int) -> bool:
        """Whether an id waits for a try, or did. It belongs to the try that registered it first.

        Raises:
            InvalidRequest: the id belongs to another try, which need not be recorded yet.
        """
        owner = self.owners([celery_task_id]).get(celery_task_id)
        _check_owner(celery_task_id, (task_instance_id, try_number), owner)
        return owner is not None

    def owners(self, celery_task_ids: Collection[str]) -> dict[str, tuple[str, int]]:
        """The tries, as (task_instance_id, try_number), to which those of these ids belong that are registered."""
        found: dict[str, tuple[str, int]] = {}
        with self._database.reading() as connection:
            for chunk in batched([one for one in celery_task_ids if is_storable(one)], CHUNK_ROWS):
                query = sa.select(_TABLE.c.celery_task_id, _TABLE.c.task_instance_id, _TABLE.c.try_number)
                rows = connection.execute(query.where(_TABLE.c.celery_task_id.in_(chunk)))
                found |= {name: (task_instance_id, number) for name, task_instance_id, number in rows}
        return found

    def done_of_run(self, tenant_id: str, dag_id: str, run_id: str) -> dict[tuple[str, int], float]:
        """When the result of each try of a run was handed to the last one who waited for it, once all have it."""
        ids = ids_of_run(tenant_id, dag_id, run_id)
        number, done_at = _TABLE.c.try_number, sa.func.max(_TABLE.c.done_at, type_=_TABLE.c.done_at.type)
        query = sa.select(_TABLE.c.task_instance_id, number, done_at).where(_TABLE.c.task_instance_id.in_(ids))
        all_have_it = sa.func.count() == sa.func.count(_TABLE.c.done_at)
        with self._database.reading() as connection:
            rows = connection.execute(query.group_by(_TABLE.c.task_instance_id, number).having(all_have_it))
            return {(task_instance_id, number): at for task_instance_id, number, at in rows}

    def is_registered(self, celery_task_id: str) -> bool:
        """Whether an id waits for a try, or did."""
        return bool(self.owners([celery_task_id]))

    def take(
        self, lease_seconds: float, task_instance_id: str = "", try_number: int = 0, limit: int = GROUP
    ) -> list[Waiting]:
        """Lease what is due: of one try, or of all tries when none is named."""
        if task_instance_id:
            with self._database.transaction() as connection:
                return take_of_try(connection, lease_seconds, task_instance_id, try_number, limit)
        parameters = {"p_lease": lease_seconds, "p_limit": limit}
        with self._database.transaction() as connection:
            statement = _take(one_try=False, locking=not self._database.is_sqlite)
            return [Waiting(*row) for row in connection.execute(statement, parameters)]

    def failed(self, waiting: Waiting) -> float:
        """Put off one that could not be completed for a reason of its own; for how many seconds.

        The wait doubles up to an hour: a callback may become importable, a chord's backend may be repaired.
        """
        delay = min(_FIRST_DELAY_SECONDS * 2.0 ** min(waiting.failures, 30), _LAST_DELAY_SECONDS)
        values = {"failures": _TABLE.c.failures + 1, "lease_until": DatabaseTime(delay)}
        with self._database.transaction() as connection:
            connection.execute(sa.update(_TABLE).where(_is_ours()).values(values), _parameters([waiting]))
        return delay

    def done(self, completed: Collection[Waiting]) -> None:
        """Record that these have their result. One whose lease another worker has by now is left to that one."""
        if not completed:
            return
        with self._database.transaction() as connection:
            connection.execute(_complete(), _parameters(completed))


def take_of_try(
    connection: sa.Connection, lease_seconds: float, task_instance_id: str, try_number: int, limit: int = GROUP
) -> list[Waiting]:
    """Lease what is due of one try, in the transaction of ``connection``, which may be the one that ended it."""
    parameters: dict[str, object] = {"p_lease": lease_seconds, "p_limit": limit}
    parameters |= {"p_ti": task_instance_id, "p_try": try_number}
    statement = _take(one_try=True, locking=connection.dialect.name != "sqlite")
    return [Waiting(*row) for row in connection.execute(statement, parameters)]


def told_since(since: float, limit: int) -> sa.Executable:
    """Open again what was told since then, the newest first; not a success whose value a later try has replaced.

    It returns the ids: not every driver counts the rows of such a statement.
    """
    columns = _TABLE.c
    told = sa.select(columns.celery_task_id).where(
        columns.done_at >= since, ~value_is_replaced(columns.task_instance_id, columns.try_number)
    )
    told = told.order_by(columns.done_at.desc()).limit(limit)
    is_told = columns.celery_task_id.in_(sa.select(told.cte("told").c.celery_task_id))
    return (
        sa.update(_TABLE)
        .where(is_told)
        .values(done_at=None, lease_until=None, failures=0)
        .returning(columns.celery_task_id)
    )


def in_flight() -> sa.Update:
    """End the leases of what is being told: whoever tells it may have told a server that has forgotten it."""
    columns = _TABLE.c
    is_held = sa.and_(columns.done_at.is_(None), columns.lease_until.is_not(None), columns.failures == 0)
    return sa.update(_TABLE).where(is_held).values(lease_until=None)


def _check_owner(celery_task_id: str, named: tuple[str, int], owner: tuple[str, int] | None) -> None:
    is_anothers = is_try_id(celery_task_id) and celery_task_id != id_of_try(*named)
    if is_anothers or owner not in (None, named):
        raise InvalidRequest(
            f"id: {celery_task_id!r} is the Celery id of another try; send the message with an id of its own", "id"
        )


@cache
def _take(one_try: bool, locking: bool) -> sa.Executable:
    """Lease up to ``p_limit`` completions that are due, for ``p_lease`` seconds; of one try, or of all."""
    columns = _TABLE.c
    ended = ended_try(columns.task_instance_id, columns.try_number)
    # One that lies further ahead than any delay was written before the clock was set back.
    is_past = sa.or_(columns.lease_until < DatabaseTime(), columns.lease_until > DatabaseTime(2 * _LAST_DELAY_SECONDS))
    free = sa.or_(columns.lease_until.is_(None), is_past)
    due = sa.select(columns.celery_task_id).where(columns.done_at.is_(None), free, ended)
    if one_try:
        due = due.where(columns.task_instance_id == sa.bindparam("p_ti"), columns.try_number == sa.bindparam("p_try"))
    due = due.order_by(columns.created_at).limit(sa.bindparam("p_limit", type_=sa.Integer()))
    if locking:
        due = due.with_for_update(skip_locked=True)
    # A CTE runs once; a plain subquery with a limit may be run again for every row it is compared with.
    taken = due.cte("due")
    return (
        sa.update(_TABLE)
        .where(columns.celery_task_id.in_(sa.select(taken.c.celery_task_id)))
        .values(lease_until=DatabaseTime(sa.bindparam("p_lease", type_=sa.Double())))
        .returning(
            columns.celery_task_id,
            columns.task_instance_id,
            columns.try_number,
            columns.context,
            columns.result_callback,
            columns.failures,
            columns.lease_until,
        )
    )


def _parameters(taken: Collection[Waiting]) -> list[dict[str, object]]:
    ordered = sorted(taken, key=lambda item: item.celery_task_id)
    return [{"p_id": item.celery_task_id, "p_until": item.lease_until} for item in ordered]


def _is_ours() -> sa.ColumnElement[bool]:
    """The completion ``p_id`` is open, and held under the lease ``p_until``."""
    columns = _TABLE.c
    held = columns.lease_until == sa.bindparam("p_until", type_=columns.lease_until.type)
    return sa.and_(columns.celery_task_id == sa.bindparam("p_id"), columns.done_at.is_(None), held)


@cache
def _complete() -> sa.Executable:
    """The completion ``p_id`` is done; run with a list of parameters (an expanded IN is compiled anew)."""
    return sa.update(_TABLE).where(_is_ours()).values(done_at=DatabaseTime())
