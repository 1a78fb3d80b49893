"""Fresh PostgreSQL databases on a server that is there: one per test, copied from a template."""

from __future__ import annotations

import uuid

import psycopg
from psycopg import sql
from sqlalchemy.engine import make_url


class PostgresDatabases:
    """Creates and drops databases. ``admin_url`` may create databases; SQLAlchemy's form of a URL."""

    def __init__(self, admin_url: str) -> None:
        self._admin = make_url(admin_url)
        self._template = ""

    def empty(self, template: str = "template1") -> str:
        """The URL of a new database that no other test has, a copy of ``template``."""
        name = f"leoflow_test_{uuid.uuid4().hex[:12]}"
        self._execute("CREATE DATABASE {} TEMPLATE {}", name, template)
        url = self._admin.set(database=name, drivername="postgresql+psycopg")
        return url.render_as_string(hide_password=False)

    def migrated(self) -> str:
        """The URL of a new database with the newest schema, copied from one that was migrated once."""
        if not self._template:
            url = self.empty()
            migrate(url)
            self._template = str(make_url(url).database)
        return self.empty(self._template)

    def drop(self, url: str) -> None:
        """Remove a database, and disconnect whoever still uses it."""
        self._execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", str(make_url(url).database))

    def close(self) -> None:
        """Remove the template."""
        if self._template:
            self._execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", self._template)

    def _execute(self, statement: str, *names: str) -> None:
        url = self._admin.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


def migrate(url: str) -> None:
    """Bring a database to the newest schema."""
    from pydantic import SecretStr

    from leoflow_celery.settings import DatabaseSettings
    from leoflow_celery.store.database import Database
    from leoflow_celery.store.migrate import upgrade

    database = Database(DatabaseSettings(url=SecretStr(url)))
    try:
        upgrade(database)
    finally:
        database.close()
