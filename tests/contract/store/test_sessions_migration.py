"""The migration that removes agents' sessions: agents that run go on, and nothing of a session is left."""

from __future__ import annotations

import importlib

import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations

from leoflow_celery.security import holder_name
from leoflow_celery.store import Store
from leoflow_celery.store.events import append_event
from leoflow_celery.store.models import TaskInstance, table_of
from tests.contract.store.rows import submit

TABLE = table_of(TaskInstance)
SESSION = "5e5510n5e5510n5e5510n"


def _set(store: Store, task_instance_id: str, **values: object) -> None:
    with store.database.transaction() as connection:
        connection.execute(sa.update(TABLE).where(TABLE.c.task_instance_id == task_instance_id).values(values))


def test_sessions_become_holders_or_go(store: Store) -> None:
    given = {
        "live": {"holder": SESSION},
        "ended": {"holder": SESSION, "state": "success"},
        "inline": {"holder": "worker:host:1:x"},
        "foreign": {"holder": "foreign:abc"},
        "free": {"holder": None},
    }
    attempts = {name: submit(store, name) for name in given}
    for name, values in given.items():
        _set(store, name, **values)
    with store.database.transaction() as connection:
        append_event(connection, attempts["live"], "claimed", {"holder": SESSION, "hostname": "node-1"})
        append_event(connection, attempts["ended"], "claimed", {"holder": SESSION, "hostname": "node-2"})
    migration = importlib.import_module("leoflow_celery.store.migrations.versions.0004_keep_no_sessions")
    for _ in range(2):  # what it made is no session
        with store.database.transaction() as connection, Operations.context(MigrationContext.configure(connection)):
            migration.upgrade()
    found = {name: store.attempts.get(name).holder for name in given}
    assert found == {
        "live": holder_name(attempts["live"], SESSION),
        "ended": None,
        "inline": "worker:host:1:x",
        "foreign": "foreign:abc",
        "free": None,
    }
    details = [event.details for name in given for event in store.events.of(name) if event.event == "claimed"]
    assert details == [{"hostname": "node-1"}, {"hostname": "node-2"}]
