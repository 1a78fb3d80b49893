"""DAG runs and what is known of their tasks."""

from __future__ import annotations

import sqlalchemy as sa

from leoflow_celery.domain.request import new_run
from leoflow_celery.domain.states import TERMINAL_RUN, RunState
from leoflow_celery.errors import NotFound
from leoflow_celery.store import task_instance_sql
from leoflow_celery.store.database import Database
from leoflow_celery.store.models import DagRun, DatabaseTime, table_of
from leoflow_celery.store.views import RunView, TaskInstanceView

_RUN = table_of(DagRun)


class RunStore:
    """Creates, finishes and reads runs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, tenant_id: str, dag_id: str, run_id: str, dag_version: str = "") -> RunView:
        """The run, created as running unless it exists. One that ended is opened again (clear and re-run).

        Raises:
            InvalidRequest: an id or the version breaks a rule; names it.
        """
        row = {
            **new_run(tenant_id, dag_id, run_id, dag_version).model_dump(),
            "state": RunState.RUNNING.value,
            "started_at": DatabaseTime(),
        }
        insert = self._database.insert(_RUN).values(row)
        upsert = insert.on_conflict_do_update(
            index_elements=["tenant_id", "dag_id", "run_id"],
            set_={"state": RunState.RUNNING.value, "ended_at": None, "dag_version": dag_version},
        )
        with self._database.transaction() as connection:
            connection.execute(upsert)
        return self.get(tenant_id, dag_id, run_id)

    def get(self, tenant_id: str, dag_id: str, run_id: str) -> RunView:
        """One run.

        Raises:
            NotFound: it was never created.
        """
        query = sa.select(_RUN).where(_is_run(tenant_id, dag_id, run_id))
        with self._database.reading() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            raise NotFound(f"run {run_id!r} of dag {dag_id!r} (tenant {tenant_id!r}) does not exist")
        values = dict(row)
        values["state"] = RunState(values["state"])
        return RunView(**values)

    def finish(self, tenant_id: str, dag_id: str, run_id: str, state: RunState) -> bool:
        """End a run; False when it had ended before."""
        open_states = [state.value for state in RunState if state not in TERMINAL_RUN]
        update = (
            sa.update(_RUN)
            .where(_is_run(tenant_id, dag_id, run_id), _RUN.c.state.in_(open_states))
            .values(state=state.value, ended_at=DatabaseTime())
        )
        with self._database.transaction() as connection:
            return connection.execute(update).rowcount > 0

    def task_instances(self, tenant_id: str, dag_id: str, run_id: str) -> list[TaskInstanceView]:
        """The newest try of each task of a run, in the order they were queued."""
        with self._database.reading() as connection:
            rows = connection.execute(task_instance_sql.of_run(tenant_id, dag_id, run_id)).mappings().all()
        newest = {row["task_instance_id"]: TaskInstanceView.from_row(row) for row in rows}
        return sorted(newest.values(), key=lambda view: (view.queued_at, view.task_id))


def _is_run(tenant_id: str, dag_id: str, run_id: str) -> sa.ColumnElement[bool]:
    return sa.and_(_RUN.c.tenant_id == tenant_id, _RUN.c.dag_id == dag_id, _RUN.c.run_id == run_id)
