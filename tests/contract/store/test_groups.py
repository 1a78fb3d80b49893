"""Short transactions that threads share: all that was asked for is written, and nobody's error is another one's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from leoflow_celery.errors import DatabaseUnavailable
from leoflow_celery.store import Store
from tests.support.waiting import wait_until

_TABLE = sa.table("grouped", sa.column("number", sa.Integer))


@pytest.fixture
def table(store: Store) -> Iterator[None]:
    with store.database.transaction() as connection:
        connection.execute(sa.text("CREATE TABLE grouped (number INTEGER PRIMARY KEY)"))
    yield
    with store.database.transaction() as connection:
        connection.execute(sa.text("DROP TABLE grouped"))


def numbers(store: Store) -> set[int]:
    with store.database.reading() as connection:
        return set(connection.execute(sa.select(_TABLE.c.number)).scalars())


def together(store: Store, work: dict[int, object]) -> dict[int, object]:
    """Results or errors of what threads wrote at one moment: all of them wait while another one writes."""
    begun, outcomes = threading.Barrier(len(work) + 1), {}

    def write(number: int) -> None:
        def insert(connection: sa.Connection) -> int:
            connection.execute(sa.insert(_TABLE).values(number=number))
            if isinstance(work[number], BaseException):
                raise work[number]
            return -number

        begun.wait()
        try:
            outcomes[number] = store.database.grouped(insert)
        except Exception as error:
            outcomes[number] = error

    with ThreadPoolExecutor(len(work)) as pool:
        with store.database.transaction():
            threads = [pool.submit(write, number) for number in work]
            begun.wait()
            if store.database.is_sqlite:
                wait_until(lambda: len(store.database._waiting) == len(work))
        for thread in threads:
            thread.result()
    return outcomes


@pytest.mark.usefixtures("table")
def test_each_gets_its_own_result_and_all_of_it_is_written(store: Store) -> None:
    commits: list[sa.Connection] = []
    sa.event.listen(store.database.engine, "commit", commits.append)
    assert together(store, dict.fromkeys(range(1, 9))) == {number: -number for number in range(1, 9)}
    assert numbers(store) == set(range(1, 9))
    if store.database.is_sqlite:
        assert len(commits) == 2  # of the one they waited for, and one for all of them


@pytest.mark.usefixtures("table")
def test_an_error_is_only_its_own(store: Store) -> None:
    wrong = ValueError("mine")
    outcomes = together(store, {1: None, 2: wrong, 3: None})
    assert outcomes == {1: -1, 2: wrong, 3: -3}
    assert numbers(store) == {1, 3}


@pytest.mark.usefixtures("table")
def test_what_came_meanwhile_is_written_next(store: Store) -> None:
    late: list[threading.Thread] = []

    def late_insert() -> None:
        store.database.grouped(lambda connection: connection.execute(sa.insert(_TABLE).values(number=2)))

    def insert(connection: sa.Connection) -> None:
        connection.execute(sa.insert(_TABLE).values(number=1))
        late.append(threading.Thread(target=late_insert))
        late[0].start()
        if store.database.is_sqlite:
            wait_until(lambda: bool(store.database._waiting))

    store.database.grouped(insert)
    late[0].join(10)
    assert numbers(store) == {1, 2}


def test_a_database_that_is_no_use_says_so_to_each_of_them(store: Store) -> None:
    assert {type(outcome) for outcome in together(store, {1: None, 2: None}).values()} == {DatabaseUnavailable}
