"""DAG runs, what is known of their tasks, and what of them is to run again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.clear import ClearedTask
from leoflow_celery.domain.request import new_run
from leoflow_celery.domain.states import TERMINAL_RUN, RunState, TaskState
from leoflow_celery.errors import NotFound
from leoflow_celery.store import task_instance_sql
from leoflow_celery.store.database import Database
from leoflow_celery.store.events import append_events, event_row
from leoflow_celery.store.models import DagRun, DatabaseTime, TaskClear, table_of
from leoflow_celery.store.views import RunView, TaskInstanceView

_RUN, _CLEAR = table_of(DagRun), table_of(TaskClear)
#: Whole, but for the DAG, which may be large and is asked for by name.
_COLUMNS = tuple(column for column in _RUN.c if column.name != "sealed_dag")


class RunStore:
    """Creates, finishes, lists and clears runs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, tenant_id: str, dag_id: str, run_id: str, dag_version: str = "", sealed_dag: str = "") -> RunView:
        """The run, created as running unless it exists. One that ended is opened again (clear and re-run).

        ``sealed_dag`` is kept with it; without one, a DAG that is kept already stays.

        Raises:
            InvalidRequest: an id or the version breaks a rule; names it.
        """
        row = {
            **new_run(tenant_id, dag_id, run_id, dag_version).model_dump(),
            "state": RunState.RUNNING.value,
            "started_at": DatabaseTime(),
            "sealed_dag": sealed_dag,
        }
        insert = self._database.insert(_RUN).values(row)
        changes: dict[str, Any] = {"state": RunState.RUNNING.value, "ended_at": None, "dag_version": dag_version}
        if sealed_dag:
            changes["sealed_dag"] = sealed_dag
        upsert = insert.on_conflict_do_update(index_elements=["tenant_id", "dag_id", "run_id"], set_=changes)
        with self._database.transaction() as connection:
            connection.execute(upsert)
        return self.get(tenant_id, dag_id, run_id)

    def get(self, tenant_id: str, dag_id: str, run_id: str) -> RunView:
        """One run.

        Raises:
            NotFound: it was never created.
        """
        query = sa.select(*_COLUMNS).where(_is_run(tenant_id, dag_id, run_id))
        with self._database.reading() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            raise NotFound(_no_run(tenant_id, dag_id, run_id))
        return _view(row)

    def sealed_dag(self, tenant_id: str, dag_id: str, run_id: str) -> str:
        """The DAG kept with a run; empty when there is none.

        Raises:
            NotFound: the run was never created.
        """
        with self._database.reading() as connection:
            found = connection.execute(sa.select(_RUN.c.sealed_dag).where(_is_run(tenant_id, dag_id, run_id))).first()
        if found is None:
            raise NotFound(_no_run(tenant_id, dag_id, run_id))
        return str(found[0])

    def find(
        self,
        tenant_id: str,
        dag_id: str | None = None,
        states: Collection[RunState] = (),
        since: float | None = None,
        limit: int = 20,
    ) -> list[RunView]:
        """The runs started last, the newest first; of one DAG, in these states, started at ``since`` or later.

        ``since`` is in seconds since the epoch, or seconds before now when it is negative.
        """
        query = sa.select(*_COLUMNS).where(_RUN.c.tenant_id == tenant_id)
        if dag_id is not None:
            query = query.where(_RUN.c.dag_id == dag_id)
        if states:
            query = query.where(_RUN.c.state.in_([state.value for state in states]))
        if since is not None:
            query = query.where(_RUN.c.started_at >= (DatabaseTime(since) if since < 0 else since))
        query = query.order_by(_RUN.c.started_at.desc(), _RUN.c.run_id.desc()).limit(limit)
        with self._database.reading() as connection:
            return [_view(row) for row in connection.execute(query).mappings()]

    def before(self, tenant_id: str, dag_id: str, started_at: float, limit: int) -> list[RunView]:
        """The runs of a DAG that were started before that moment and have ended, the newest first."""
        query = (
            sa.select(*_COLUMNS)
            .where(_RUN.c.tenant_id == tenant_id, _RUN.c.dag_id == dag_id, _RUN.c.started_at < started_at)
            .where(_RUN.c.ended_at.is_not(None))
            .order_by(_RUN.c.started_at.desc())
            .limit(limit)
        )
        with self._database.reading() as connection:
            return [_view(row) for row in connection.execute(query).mappings()]

    def latest(self, tenant_id: str, dag_id: str) -> str:
        """The id of the run that was started last, or of the one that the newest task instance names.

        Raises:
            NotFound: the DAG has no run.
        """
        found = self.find(tenant_id, dag_id, limit=1)
        if found:
            return found[0].run_id
        with self._database.reading() as connection:
            row = connection.execute(task_instance_sql.latest_run(tenant_id, dag_id)).first()
        if row is None:
            raise NotFound(f"dag {dag_id!r} (tenant {tenant_id!r}) has no run; 'leoflow runs' lists all")
        return str(row[0])

    def names(self, tenant_id: str, dag_id: str | None, prefix: str, limit: int = 50) -> list[str]:
        """DAG ids that begin with the prefix, or the newest run ids of a DAG: what a shell completes."""
        column = _RUN.c.dag_id if dag_id is None else _RUN.c.run_id
        query = sa.select(column).where(_RUN.c.tenant_id == tenant_id, column.startswith(prefix, autoescape=True))
        if dag_id is None:
            query = query.distinct().order_by(column)
        else:
            query = query.where(_RUN.c.dag_id == dag_id).order_by(_RUN.c.started_at.desc())
        with self._database.reading() as connection:
            return [str(name) for (name,) in connection.execute(query.limit(limit))]

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
        newest = {view.task_instance_id: view for view in self.tries(tenant_id, dag_id, run_id)}
        return sorted(newest.values(), key=lambda view: (view.queued_at, view.task_id))

    def tries(self, tenant_id: str, dag_id: str, run_id: str) -> list[TaskInstanceView]:
        """Every try of a run, a younger one of a task after an older one."""
        with self._database.reading() as connection:
            return _tries(connection, tenant_id, dag_id, run_id)

    def task_seconds(self, tenant_id: str, dag_id: str, run_ids: Sequence[str]) -> dict[str, dict[str, float]]:
        """How long the tasks that succeeded in these runs of a DAG ran, in seconds: run → task → its last success."""
        found: dict[str, dict[str, float]] = {}
        with self._database.reading() as connection:
            rows = connection.execute(task_instance_sql.times_of_runs(tenant_id, dag_id, run_ids))
            for run_id, task_id, started_at, ended_at in rows:
                found.setdefault(run_id, {})[task_id] = ended_at - started_at
        return found

    # -- clearing -----------------------------------------------------------------------------------------------

    def clear(
        self,
        tenant_id: str,
        dag_id: str,
        run_id: str,
        choose: Callable[[Mapping[str, TaskState]], Sequence[str]],
        *,
        dry_run: bool = False,
    ) -> list[ClearedTask]:
        """Let the tasks that ``choose`` names, out of the newest tries' states, run again, and open the run again.

        Their tries stay as they ended. A task that was cleared and has not started since is seen as ``none``.
        ``dry_run`` changes nothing.

        Raises:
            NotFound: the run was never created.
            What ``choose`` raises; then nothing has changed.
        """
        is_run = _is_run(tenant_id, dag_id, run_id)
        with self._database.transaction() as connection:
            # The run's row is the lock: of two clears at once the second sees what the first did.
            if connection.execute(sa.select(_RUN.c.run_id).where(is_run).with_for_update()).first() is None:
                raise NotFound(_no_run(tenant_id, dag_id, run_id))
            newest = {view.task_id: view for view in _tries(connection, tenant_id, dag_id, run_id)}
            done = _cleared(connection, tenant_id, dag_id, run_id)
            states = {
                name: TaskState.NONE if view.try_number <= done.get(name, 0) else view.state
                for name, view in newest.items()
            }
            chosen = [newest[name] for name in choose(states)]
            if chosen and not dry_run:
                self._record_clear(connection, chosen)
                connection.execute(sa.update(_RUN).where(is_run).values(state=RunState.RUNNING.value, ended_at=None))
        return [ClearedTask(view.task_id, view.task_instance_id, view.try_number, view.state) for view in chosen]

    def _record_clear(self, connection: sa.Connection, chosen: Sequence[TaskInstanceView]) -> None:
        insert = self._database.insert(_CLEAR).values(cleared_at=DatabaseTime())
        upsert = insert.on_conflict_do_update(
            index_elements=["tenant_id", "dag_id", "run_id", "task_id"],
            set_={"last_try": insert.excluded.last_try, "cleared_at": insert.excluded.cleared_at},
        )
        names = ("tenant_id", "dag_id", "run_id", "task_id")
        rows = [{**{name: getattr(view, name) for name in names}, "last_try": view.try_number} for view in chosen]
        connection.execute(upsert, rows)
        attempts = [AttemptId(view.task_instance_id, view.try_number, view.launch) for view in chosen]
        append_events(connection, [event_row(attempt, "cleared", {}) for attempt in attempts])

    def cleared(self, tenant_id: str, dag_id: str, run_id: str) -> dict[str, int]:
        """Of each task of a run that was cleared, the last try that no longer counts."""
        with self._database.reading() as connection:
            return _cleared(connection, tenant_id, dag_id, run_id)


def _tries(connection: sa.Connection, tenant_id: str, dag_id: str, run_id: str) -> list[TaskInstanceView]:
    rows = connection.execute(task_instance_sql.of_run(tenant_id, dag_id, run_id)).mappings()
    return [TaskInstanceView.from_row(row) for row in rows]


def _cleared(connection: sa.Connection, tenant_id: str, dag_id: str, run_id: str) -> dict[str, int]:
    of_run = sa.and_(_CLEAR.c.tenant_id == tenant_id, _CLEAR.c.dag_id == dag_id, _CLEAR.c.run_id == run_id)
    found = connection.execute(sa.select(_CLEAR.c.task_id, _CLEAR.c.last_try).where(of_run))
    return {str(task_id): int(last_try) for task_id, last_try in found}


def _view(row: sa.RowMapping) -> RunView:
    return RunView(**{**row, "state": RunState(row["state"])})


def _no_run(tenant_id: str, dag_id: str, run_id: str) -> str:
    return f"run {run_id!r} of dag {dag_id!r} (tenant {tenant_id!r}) does not exist"


def _is_run(tenant_id: str, dag_id: str, run_id: str) -> sa.ColumnElement[bool]:
    return sa.and_(_RUN.c.tenant_id == tenant_id, _RUN.c.dag_id == dag_id, _RUN.c.run_id == run_id)
