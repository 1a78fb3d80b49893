"""XCom values: one Protocol, a SQL and a Redis back end, one contract test suite."""

from __future__ import annotations

from leoflow_celery.settings import Settings
from leoflow_celery.store.database import Database
from leoflow_celery.store.xcom.base import XComStore

__all__ = ["XComStore", "create_xcom_store"]


def create_xcom_store(settings: Settings, database: Database) -> XComStore:
    """The back end that LEOFLOW_XCOM_BACKEND names; a client is imported only when used."""
    if settings.xcom.backend == "redis":
        from leoflow_celery.store.xcom.redis import RedisXComStore

        return RedisXComStore(settings.xcom.redis_url or settings.broker.url, settings)
    from leoflow_celery.store.xcom.sql import SqlXComStore

    return SqlXComStore(database, settings.xcom.ttl_seconds)
