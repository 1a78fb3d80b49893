"""Schema migrations, shipped in the package: ``leoflow db upgrade``."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from leoflow_celery.store.database import Database

_MIGRATIONS = Path(__file__).with_name("migrations")
#: Any constant will do; it names our lock among a database's advisory locks.
_ADVISORY_LOCK = 7_305_841


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    return config


def upgrade(database: Database) -> None:
    """Bring the schema to the newest revision; safe to run from several processes at once."""
    config = _config()
    with database.transaction() as connection:
        if not database.is_sqlite:  # SQLite's BEGIN IMMEDIATE is the lock
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def revisions(database: Database) -> tuple[str | None, str | None]:
    """The database's revision and the newest one of this package."""
    with database.reading() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
    return current, ScriptDirectory.from_config(_config()).get_current_head()
