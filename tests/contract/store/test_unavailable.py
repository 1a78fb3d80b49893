"""A database that is away is one error of ours, which names where it was looked for and no password."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import sqlalchemy as sa

from leoflow_celery.domain.xcom import XComKey, XComValue
from leoflow_celery.errors import DatabaseUnavailable
from leoflow_celery.settings import DatabaseSettings
from leoflow_celery.store import Store
from leoflow_celery.store.database import Database
from leoflow_celery.store.migrate import upgrade
from tests.contract.store.rows import new_try, race, settings_for, submit
from tests.support.ports import free_port

PASSWORD = "correct-horse-battery"


@pytest.mark.parametrize("query", ["", "?sslpassword=" + PASSWORD])
def test_a_postgresql_that_is_away(tmp_path: Path, query: str) -> None:
    port = free_port()
    url = f"postgresql://leo:{PASSWORD}@127.0.0.1:{port}/leoflow{query}"
    store = Store(settings_for(url, tmp_path))
    with pytest.raises(DatabaseUnavailable) as away:
        store.submissions.record([new_try()])
    with pytest.raises(DatabaseUnavailable):
        store.attempts.get("ti-1")
    with pytest.raises(DatabaseUnavailable):
        upgrade(store.database)
    store.close()
    assert f"127.0.0.1:{port}" in str(away.value)
    assert PASSWORD not in str(away.value)


def test_an_sqlite_file_that_cannot_be_opened(tmp_path: Path) -> None:
    store = Store(settings_for(f"sqlite:///{tmp_path}/no/such/directory/leoflow.db", tmp_path))
    with pytest.raises(DatabaseUnavailable, match="no/such/directory"):
        store.submissions.record([new_try()])
    store.close()


def test_an_sqlite_file_that_is_none_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "leoflow.db"
    store = Store(settings_for(f"sqlite:///{path}", tmp_path))
    path.write_bytes(b"no database at all " * 1_000)
    with pytest.raises(DatabaseUnavailable, match=r"leoflow\.db is damaged or none: file is not a database"):
        upgrade(store.database)
    path.unlink()
    upgrade(store.database)
    store.close()
    with path.open("r+b") as file:
        file.seek(4_096)
        file.write(b"\xff" * 200_000)
    with pytest.raises(DatabaseUnavailable, match="malformed"):
        store.attempts.get("ti-1")
    store.close()


@pytest.mark.parametrize("same_process", [True, False])
def test_a_lock_that_is_not_to_be_had_in_time(tmp_path: Path, same_process: bool) -> None:
    settings = DatabaseSettings(url=f"sqlite:///{tmp_path}/leoflow.db", timeout_seconds=0.2)
    database = Database(settings)
    other = database if same_process else Database(settings)
    upgrade(database)
    with database.transaction(), pytest.raises(DatabaseUnavailable, match="locked"), other.transaction():
        pass
    with other.transaction() as connection:
        assert connection.execute(sa.text("SELECT 1")).scalar() == 1
    other.close()
    database.close()


def test_a_child_process_does_not_inherit_its_parents_turn(tmp_path: Path) -> None:
    database = Database(DatabaseSettings(url=f"sqlite:///{tmp_path}/leoflow.db", timeout_seconds=0.2))
    with database.transaction():
        database.after_fork()
        turn = database._turn()
        turn.__enter__()
        turn.__exit__(None, None, None)
    database.close()


def test_readers_do_not_wait_for_a_writer(store: Store) -> None:
    submit(store)
    with store.database.transaction() as connection:
        connection.exec_driver_sql("UPDATE task_instance SET hostname = 'not committed yet'")
        assert store.attempts.get("ti-1").hostname == ""


def test_a_pool_that_is_empty(database_url: str) -> None:
    database = Database(DatabaseSettings(url=database_url, pool_size=1, timeout_seconds=0.2))
    with database.reading(), database.reading(), pytest.raises(DatabaseUnavailable), database.reading():
        pass
    database.close()


def test_an_error_never_repeats_a_value(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = XComKey("t", "d", "r", "k", None)  # type: ignore[arg-type]
    with pytest.raises(sa.exc.IntegrityError) as broken:
        store.xcom.put([(key, XComValue(PASSWORD.encode()))])
    assert PASSWORD not in str(broken.value)
    assert PASSWORD not in caplog.text


def test_a_failed_transaction_leaves_nothing_and_the_next_one_works(store: Store) -> None:
    def fail(_: int) -> None:
        with store.database.transaction() as connection:
            connection.exec_driver_sql("DELETE FROM task_instance")
            raise ZeroDivisionError

    attempt = submit(store)
    assert {type(result) for result in race(4, fail)} == {ZeroDivisionError}
    assert store.attempts.get("ti-1").attempt == attempt
