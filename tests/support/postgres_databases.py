"""Fresh databases with the newest schema, copied from a template: on a PostgreSQL server, or SQLite files."""

from __future__ import annotations

import functools
import tempfile
import uuid
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy.engine import make_url

_DISCONNECT = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()"""
_EMPTY = """DO $$ BEGIN EXECUTE (
    SELECT 'TRUNCATE ' || string_agg(quote_ident(tablename), ', ') || ' RESTART IDENTITY CASCADE'
    FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'alembic_version'
); END $$"""


class PostgresDatabases:
    """Creates and drops databases. ``admin_url`` may create databases; SQLAlchemy's form of a URL."""

    def __init__(self, admin_url: str) -> None:
        self._admin = make_url(admin_url)
        self._template = ""
        #: With the newest schema: those that tests have now, and emptied ones for the next tests.
        self._migrated: set[str] = set()
        self._pool: list[str] = []

    def empty(self, template: str = "template1") -> str:
        """The URL of a new database that no other test has, a copy of ``template``."""
        name = f"leoflow_test_{uuid.uuid4().hex[:12]}"
        self._execute("CREATE DATABASE {} TEMPLATE {}", name, template)
        return self._url(name)

    def migrated(self) -> str:
        """The URL of an empty database with the newest schema that no other test has."""
        if not self._template:
            url = self.empty()
            migrate(url)
            self._template = str(make_url(url).database)
        url = self._url(self._pool.pop()) if self._pool else self.empty(self._template)
        self._migrated.add(str(make_url(url).database))
        return url

    def drop(self, url: str) -> None:
        """The test that had a database is over; whoever still uses it is disconnected."""
        name = str(make_url(url).database)
        if name in self._migrated:  # to empty one takes a tenth of what it takes to make one
            self._migrated.remove(name)
            with self._connect(name) as connection:
                connection.execute(_DISCONNECT)
                connection.execute(_EMPTY)
            self._pool.append(name)
        else:
            self._execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", name)

    def close(self) -> None:
        """Remove what is kept for the next test."""
        for name in filter(None, (*self._pool, self._template)):
            self._execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", name)

    def _url(self, name: str) -> str:
        url = self._admin.set(database=name, drivername="postgresql+psycopg")
        return url.render_as_string(hide_password=False)

    def _execute(self, statement: str, *names: str) -> None:
        with self._connect() as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def _connect(self, name: str = "") -> psycopg.Connection[Any]:
        url = self._admin.set(drivername="postgresql", database=name or self._admin.database)
        return psycopg.connect(url.render_as_string(hide_password=False), autocommit=True, connect_timeout=10)


def migrate(url: str) -> None:
    """Bring a new database to the newest schema."""
    path = make_url(url).database or ""
    if url.startswith("sqlite:") and not Path(path).exists():
        Path(path).write_bytes(_migrated_sqlite())
    else:
        _upgrade(url)


@functools.cache
def _migrated_sqlite() -> bytes:
    """A file with the newest schema and no rows: to run all migrations takes a hundred times what a copy does."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "template.db"
        _upgrade(f"sqlite:///{path}")
        return path.read_bytes()


def _upgrade(url: str) -> None:
    from pydantic import SecretStr

    from leoflow_celery.settings import DatabaseSettings
    from leoflow_celery.store.database import Database
    from leoflow_celery.store.migrate import upgrade

    database = Database(DatabaseSettings(url=SecretStr(url)))
    try:
        upgrade(database)
    finally:
        database.close()
