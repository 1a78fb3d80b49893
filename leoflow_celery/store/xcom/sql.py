"""XCom values in the ``xcom`` table, in the same transaction as the state that makes them visible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import sqlalchemy as sa

from leoflow_celery.domain.xcom import XComKey, XComValue
from leoflow_celery.store.database import CHUNK_ROWS, Database
from leoflow_celery.store.models import DatabaseTime, Timestamp, XCom, table_of

_TABLE = table_of(XCom)
_KEY = ("tenant_id", "dag_id", "run_id", "task_id", "key")


class SqlXComStore:
    """The default back end."""

    def __init__(self, database: Database, ttl_seconds: int) -> None:
        self._database = database
        created_at = sa.func.coalesce(sa.bindparam("p_created_at", type_=Timestamp()), DatabaseTime())
        values = {"created_at": created_at, "expires_at": DatabaseTime(ttl_seconds)}
        insert = database.insert(_TABLE).values(values)
        changes = {name: insert.excluded[name] for name in ("value", "content_type", "created_at", "expires_at")}
        self._upsert = insert.on_conflict_do_update(index_elements=_KEY, set_=changes)

    @contextmanager
    def _joined(self, connection: sa.Connection | None) -> Iterator[sa.Connection]:
        if connection is not None:
            yield connection
            return
        with self._database.transaction() as own:
            yield own

    def put(self, items: Sequence[tuple[XComKey, XComValue]], connection: sa.Connection | None = None) -> None:
        if not items:
            return
        rows = [
            {
                **{name: getattr(key, name) for name in _KEY},
                "value": value.value,
                "content_type": value.content_type,
                "p_created_at": value.created_at or None,
            }
            for key, value in items
        ]
        with self._joined(connection) as joined:
            joined.execute(self._upsert, rows)

    def get(self, key: XComKey) -> XComValue | None:
        query = sa.select(_TABLE).where(
            *(_TABLE.c[name] == getattr(key, name) for name in _KEY), _TABLE.c.expires_at > DatabaseTime()
        )
        with self._database.reading() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else _value(row)

    def of_run(self, tenant_id: str, dag_id: str, run_id: str) -> list[tuple[XComKey, XComValue]]:
        query = (
            sa.select(_TABLE)
            .where(_TABLE.c.tenant_id == tenant_id, _TABLE.c.dag_id == dag_id, _TABLE.c.run_id == run_id)
            .where(_TABLE.c.expires_at > DatabaseTime())
            .order_by(_TABLE.c.task_id, _TABLE.c.key)
        )
        with self._database.reading() as connection:
            rows = connection.execute(query).mappings().all()
        return [(XComKey(*(row[name] for name in _KEY)), _value(row)) for row in rows]

    def sizes_of_run(self, tenant_id: str, dag_id: str, run_id: str) -> list[tuple[XComKey, int]]:
        query = (
            sa.select(*(_TABLE.c[name] for name in _KEY), sa.func.length(_TABLE.c.value))
            .where(_TABLE.c.tenant_id == tenant_id, _TABLE.c.dag_id == dag_id, _TABLE.c.run_id == run_id)
            .where(_TABLE.c.expires_at > DatabaseTime())
            .order_by(_TABLE.c.task_id, _TABLE.c.key)
        )
        with self._database.reading() as connection:
            return [(XComKey(*key), int(size)) for *key, size in connection.execute(query)]

    def delete_task(
        self, tenant_id: str, dag_id: str, run_id: str, task_id: str, connection: sa.Connection | None = None
    ) -> None:
        parts = dict(zip(_KEY, (tenant_id, dag_id, run_id, task_id), strict=False))
        with self._joined(connection) as joined:
            joined.execute(sa.delete(_TABLE).where(*(_TABLE.c[name] == part for name, part in parts.items())))

    def delete_expired(self) -> int:
        # In transactions of bounded size, so that nobody waits long for a lock.
        total = 0
        while count := self._delete_some():
            total += count
        return total

    def _delete_some(self) -> int:
        key, is_expired = [_TABLE.c[name] for name in _KEY], _TABLE.c.expires_at <= DatabaseTime()
        oldest = sa.select(*key).where(is_expired).order_by(_TABLE.c.expires_at).limit(CHUNK_ROWS)
        # Again what has expired: a value may be renewed between the look and the lock.
        delete = sa.delete(_TABLE).where(sa.tuple_(*key).in_(oldest), is_expired)
        with self._database.transaction() as connection:
            return connection.execute(delete).rowcount


def _value(row: sa.RowMapping) -> XComValue:
    return XComValue(row["value"], row["content_type"], row["created_at"])
