"""Removing what ended long ago: tries with their events and completions, runs, staging records."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa

from leoflow_celery.domain.states import TERMINAL
from leoflow_celery.store.database import Database
from leoflow_celery.store.models import DagRun, StagingVolume, TaskCompletion, TaskEvent, TaskInstance, table_of

_TI = table_of(TaskInstance)
_RUN = table_of(DagRun)
_VOLUME = table_of(StagingVolume)
_OF_TRY = (table_of(TaskEvent), table_of(TaskCompletion))


class HistoryStore:
    """Deletes in transactions of bounded size, so that nobody waits long for a lock."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def prune(self, older_than_seconds: float, limit: int = 500) -> int:
        """Remove up to ``limit`` tries that ended longer ago than that and whose results were delivered; how many.

        A task instance goes as a whole, when its newest try is old enough: what is left of a younger one still tells
        late messages that their try is superseded.
        """
        before = time.time() - older_than_seconds
        with self._database.transaction() as connection:
            tries = connection.execute(_old_tries(before, limit)).all()
            for table in (*_OF_TRY, _TI):
                is_try = sa.and_(
                    table.c.task_instance_id == sa.bindparam("p_ti"), table.c.try_number == sa.bindparam("p_try")
                )
                if tries:
                    connection.execute(
                        sa.delete(table).where(is_try), [{"p_ti": row[0], "p_try": row[1]} for row in tries]
                    )
        return len(tries)

    def prune_runs(self, older_than_seconds: float) -> int:
        """Remove runs that ended longer ago than that and have no task left, and records of deleted volumes."""
        before = time.time() - older_than_seconds
        same_run = sa.and_(*(_TI.c[name] == _RUN.c[name] for name in ("tenant_id", "dag_id", "run_id")))
        runs = sa.delete(_RUN).where(_RUN.c.ended_at < before, ~sa.exists().where(same_run))
        volumes = sa.delete(_VOLUME).where(_VOLUME.c.deleted_at < before)
        with self._database.transaction() as connection:
            return connection.execute(runs).rowcount + connection.execute(volumes).rowcount


def _old_tries(before: float, limit: int) -> sa.Select[Any]:
    completion, other = _OF_TRY[1], _TI.alias("other")
    undelivered = sa.exists().where(
        completion.c.task_instance_id == _TI.c.task_instance_id,
        completion.c.try_number == _TI.c.try_number,
        completion.c.done_at.is_(None),
    )
    younger = sa.exists().where(
        other.c.task_instance_id == _TI.c.task_instance_id,
        sa.or_(other.c.ended_at.is_(None), other.c.ended_at >= before),
    )
    ended = _TI.c.state.in_([state.value for state in TERMINAL])
    return (
        sa.select(_TI.c.task_instance_id, _TI.c.try_number)
        .where(ended, _TI.c.ended_at < before, ~undelivered, ~younger)
        .limit(limit)
    )
