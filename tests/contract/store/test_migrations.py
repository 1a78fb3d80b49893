"""Migrations: they make what the models say, on both databases, from any number of processes at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from leoflow_celery.errors import DatabaseUnavailable
from leoflow_celery.settings import DatabaseSettings
from leoflow_celery.store import migrate
from leoflow_celery.store.database import Database
from leoflow_celery.store.models import Base

_UPGRADE = """
import sys
from leoflow_celery.settings import DatabaseSettings
from leoflow_celery.store.database import Database
from leoflow_celery.store.migrate import upgrade
print("ready", flush=True)
sys.stdin.readline()
upgrade(Database(DatabaseSettings(url=sys.argv[1])))
"""


@pytest.fixture
def database(database_url: str):
    made = Database(DatabaseSettings(url=database_url))
    yield made
    made.close()


def test_a_fresh_database_has_no_revision_and_says_what_creates_the_tables(database: Database) -> None:
    current, newest = migrate.revisions(database)
    assert current is None
    assert newest is not None
    with pytest.raises(DatabaseUnavailable, match="leoflow db upgrade"), database.reading() as connection:
        connection.execute(sa.select(Base.metadata.tables["task_instance"]))


def test_upgrade_makes_exactly_what_the_models_say_and_again_changes_nothing(database: Database) -> None:
    migrate.upgrade(database)
    migrate.upgrade(database)
    current, newest = migrate.revisions(database)
    assert current == newest
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_partial_indexes_keep_their_condition(database: Database) -> None:
    migrate.upgrade(database)
    source = (
        "SELECT name, sql FROM sqlite_master WHERE type = 'index'"
        if database.is_sqlite
        else "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
    )
    with database.reading() as connection:
        definitions = dict(connection.exec_driver_sql(source).all())
    for name in ("ix_task_instance_live", "ix_task_completion_open", "ix_staging_volume_active"):
        assert "WHERE" in definitions[name]


def test_downgrade_removes_every_table(database: Database) -> None:
    migrate.upgrade(database)
    config = Config()
    config.set_main_option("script_location", str(migrate._MIGRATIONS))
    with database.transaction() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert sa.inspect(database.engine).get_table_names() == ["alembic_version"]


def test_several_processes_upgrade_the_same_fresh_database_at_once(database: Database) -> None:
    url = database.url.render_as_string(hide_password=False)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _UPGRADE, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all of them are imported and connected to nothing: now they go at once
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 0], "\n".join(errors)
    current, newest = migrate.revisions(database)
    assert current == newest
