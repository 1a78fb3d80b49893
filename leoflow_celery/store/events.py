"""The append-only history of every attempt, and the end of what ended long ago."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.store import task_instance_sql
from leoflow_celery.store.database import Database
from leoflow_celery.store.models import (
    DagRun,
    DatabaseTime,
    StagingVolume,
    TaskClear,
    TaskCompletion,
    TaskEvent,
    table_of,
)

_TABLE = table_of(TaskEvent)
_INSERT = sa.insert(_TABLE).values(at=DatabaseTime())


@dataclass(frozen=True, slots=True)
class EventView:
    """One thing that happened: submitted, claimed, finished, relaunched, late_report, cancel_requested, superseded,
    cleared."""

    attempt: AttemptId
    at: float
    event: str
    details: dict[str, Any]


def append_event(connection: sa.Connection, attempt: AttemptId, event: str, details: dict[str, Any]) -> None:
    """Add one event inside the caller's transaction."""
    append_events(connection, [event_row(attempt, event, details)])


def append_events(connection: sa.Connection, rows: list[dict[str, Any]]) -> None:
    """Add events (see ``event_row``) inside the caller's transaction, at the time by the database's clock."""
    if rows:
        connection.execute(_INSERT, rows)


def event_row(attempt: AttemptId, event: str, details: dict[str, Any]) -> dict[str, Any]:
    """The row of one event, for bulk inserts."""
    return {
        "task_instance_id": attempt.task_instance_id,
        "try_number": attempt.try_number,
        "launch": attempt.launch,
        "event": event,
        "details": details,
    }


class EventStore:
    """Reads the history."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, task_instance_id: str) -> list[EventView]:
        """Everything that happened to a task instance, oldest first."""
        query = sa.select(_TABLE).where(_TABLE.c.task_instance_id == task_instance_id).order_by(_TABLE.c.id)
        with self._database.reading() as connection:
            return [_view(row) for row in connection.execute(query).mappings()]

    def of_run(self, tenant_id: str, dag_id: str, run_id: str) -> dict[str, list[EventView]]:
        """Everything that happened to the task instances of a run, by their ids, oldest first."""
        ids = task_instance_sql.ids_of_run(tenant_id, dag_id, run_id)
        query = sa.select(_TABLE).where(_TABLE.c.task_instance_id.in_(ids)).order_by(_TABLE.c.id)
        found: dict[str, list[EventView]] = {}
        with self._database.reading() as connection:
            for row in connection.execute(query).mappings():
                found.setdefault(row["task_instance_id"], []).append(_view(row))
        return found


def _view(row: sa.RowMapping) -> EventView:
    attempt = AttemptId(row["task_instance_id"], row["try_number"], row["launch"])
    return EventView(attempt, row["at"], row["event"], row["details"])


class HistoryStore:
    """Deletes in transactions of bounded size, so that nobody waits long for a lock."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def prune(self, older_than_seconds: float, limit: int = 500) -> int:
        """Remove up to ``limit`` tries that ended longer ago than that and whose results were delivered; how many.

        A task instance goes as a whole, when its newest try is old enough: what is left of a younger one still tells
        late messages that their try is superseded.
        """
        old = task_instance_sql.old_tries(older_than_seconds, limit)
        with self._database.transaction() as connection:
            tries = [{"p_ti": ti, "p_try": number} for ti, number in connection.execute(old)]
            for table in (_TABLE, table_of(TaskCompletion), task_instance_sql.TABLE) if tries else ():
                connection.execute(sa.delete(table).where(task_instance_sql.of_try(table)), tries)
        return len(tries)

    def prune_runs(self, older_than_seconds: float) -> int:
        """Remove runs that ended longer ago than that and have no task left, and records of deleted volumes."""
        before, run, volume = DatabaseTime(-older_than_seconds), table_of(DagRun), table_of(StagingVolume)
        runs = sa.delete(run).where(run.c.ended_at < before, ~task_instance_sql.any_of_run(run))
        volumes = sa.delete(volume).where(volume.c.deleted_at < before)
        clear = table_of(TaskClear)
        of_run = sa.and_(*(run.c[name] == clear.c[name] for name in ("tenant_id", "dag_id", "run_id")))
        clears = sa.delete(clear).where(~sa.exists().where(of_run))
        with self._database.transaction() as connection:
            removed = connection.execute(runs).rowcount
            if removed:
                connection.execute(clears)
            return removed + connection.execute(volumes).rowcount
