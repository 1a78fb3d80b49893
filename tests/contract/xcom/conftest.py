"""Each XCom back end over real servers: SQL on SQLite and PostgreSQL, and Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from leoflow_celery.settings import BrokerSettings, XComSettings
from leoflow_celery.store import Store
from leoflow_celery.store.xcom import XComStore
from tests.contract.store.rows import settings_for
from tests.support.postgres_databases import PostgresDatabases, migrate

StoreFactory = Callable[..., Store]


@pytest.fixture(params=["sqlite", "postgresql", "redis"])
def store_with(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreFactory]:
    """Build a store whose values are kept in the back end of this run; a keyword is a setting of ``XComSettings``."""
    made: list[Store] = []
    if request.param == "postgresql":
        postgres: PostgresDatabases = request.getfixturevalue("postgres")
        url = postgres.migrated()
    else:
        migrate(url := f"sqlite:///{tmp_path}/x.db")
    redis_url = request.getfixturevalue("redis_url") if request.param == "redis" else ""

    def build(**changes: int) -> Store:
        xcom = XComSettings(backend="redis" if redis_url else "sql", redis_url=redis_url, **changes)
        store = Store(settings_for(url, tmp_path, xcom=xcom, broker=BrokerSettings(key_prefix="leo*flow:")))
        made.append(store)
        return store

    yield build
    for store in made:
        store.close()
    if request.param == "postgresql":
        postgres.drop(url)


@pytest.fixture
def store(store_with: StoreFactory) -> Store:
    return store_with()


@pytest.fixture
def sql_store(migrated_database_url: str, tmp_path: Path) -> Iterator[Store]:
    """Values beside the states, in one transaction."""
    made = Store(settings_for(migrated_database_url, tmp_path))
    yield made
    made.close()


@pytest.fixture
def xcom(store: Store) -> XComStore:
    return store.xcom
