"""The append-only history of every attempt."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.store.database import Database
from leoflow_celery.store.models import TaskEvent, table_of

_INSERT = sa.insert(table_of(TaskEvent))


@dataclass(frozen=True, slots=True)
class EventView:
    """One thing that happened: submitted, claimed, finished, relaunched, late_report, cancel_requested, superseded."""

    attempt: AttemptId
    at: float
    event: str
    details: dict[str, Any]


def append_event(
    connection: sa.Connection, attempt: AttemptId, event: str, details: dict[str, Any], at: float | None = None
) -> None:
    """Add one event inside the caller's transaction."""
    append_events(connection, [event_row(attempt, event, details, at)])


def append_events(connection: sa.Connection, rows: list[dict[str, Any]]) -> None:
    """Add events (see ``event_row``) inside the caller's transaction."""
    if rows:
        connection.execute(_INSERT, rows)


def event_row(attempt: AttemptId, event: str, details: dict[str, Any], at: float | None = None) -> dict[str, Any]:
    """The row of one event, for bulk inserts."""
    return {
        "task_instance_id": attempt.task_instance_id,
        "try_number": attempt.try_number,
        "launch": attempt.launch,
        "at": at or time.time(),
        "event": event,
        "details": details,
    }


class EventStore:
    """Reads the history."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, task_instance_id: str) -> list[EventView]:
        """Everything that happened to a task instance, oldest first."""
        table = table_of(TaskEvent)
        query = sa.select(table).where(table.c.task_instance_id == task_instance_id).order_by(table.c.id)
        with self._database.reading() as connection:
            rows = connection.execute(query).mappings().all()
        return [
            EventView(
                AttemptId(row["task_instance_id"], row["try_number"], row["launch"]),
                row["at"],
                row["event"],
                row["details"],
            )
            for row in rows
        ]
