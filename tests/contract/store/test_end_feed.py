"""The feed of ends: each end once, in one order, whoever writes and whoever reads at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.states import TaskState
from leoflow_celery.store import Store
from leoflow_celery.store.ends import Ends
from tests.contract.store.rows import EXIT_1, claim, new_try, submit

SUCCESS = Outcome(TaskState.SUCCESS)


def _end(store: Store, task_instance_id: str, outcome: Outcome = SUCCESS, **changes: object) -> None:
    attempt = submit(store, task_instance_id, **changes)
    assert store.attempts.finish(attempt, outcome, claim(store, attempt, f"h-{task_instance_id}")).recorded


def _all(store: Store, owner: str | None = None, limit: int = 500) -> list[str]:
    """The whole feed, page by page."""
    found: list[str] = []
    page = Ends(0, ())
    while (page := store.ends.read(page.cursor, owner, limit)).tries:
        found += [view.task_instance_id for view in page.tries]
    return found


def test_an_end_comes_once_and_a_cursor_goes_on_from_where_it_was(store: Store) -> None:
    _end(store, "a")
    first = store.ends.read(0)
    _end(store, "b", EXIT_1)
    second = store.ends.read(first.cursor)
    assert [view.task_instance_id for view in first.tries] == ["a"]
    assert [(view.task_instance_id, view.state, view.reason) for view in second.tries] == [
        ("b", TaskState.FAILED, "non_zero_exit")
    ]
    assert store.ends.read(second.cursor) == Ends(second.cursor)
    assert _all(store) == ["a", "b"]


def test_every_kind_of_end_is_in_the_feed(store: Store) -> None:
    submit(store, "superseded")
    submit(store, "superseded", 2)
    submit(store, "cancelled")
    store.attempts.request_cancel("cancelled")
    store.submissions.record([new_try("skipped")], TaskState.SKIPPED)
    _end(store, "done")
    views = store.ends.read(0).tries
    found = [(view.task_instance_id, view.try_number, view.reason) for view in views]
    assert found == [
        ("superseded", 1, "superseded"),
        ("cancelled", 1, "cancelled"),
        ("skipped", 1, None),
        ("done", 1, None),
    ]


def test_without_a_cursor_the_feed_begins_now(store: Store) -> None:
    _end(store, "before")
    now = store.ends.read(None)
    assert now.tries == ()
    _end(store, "after")
    assert [view.task_instance_id for view in store.ends.read(now.cursor).tries] == ["after"]


def test_an_owner_reads_his_own_and_passes_what_is_of_others(store: Store) -> None:
    for number in range(6):
        _end(store, f"ti-{number}", owner="mine" if number % 2 else "")
    assert _all(store, "mine", limit=2) == ["ti-1", "ti-3", "ti-5"]
    assert store.ends.read(0, "nobody").cursor == store.ends.read(None).cursor
    assert len(_all(store, limit=4)) == 6


def test_pages_hold_what_they_may_and_lose_nothing(store: Store) -> None:
    for number in range(7):
        _end(store, f"ti-{number}")
    assert _all(store, limit=3) == [f"ti-{number}" for number in range(7)]


def test_a_number_is_not_given_again_after_the_history_was_pruned(store: Store) -> None:
    _end(store, "old")
    cursor = store.ends.read(0).cursor
    with store.database.transaction() as connection:
        connection.exec_driver_sql("DELETE FROM task_instance")
    _end(store, "new")
    assert [view.task_instance_id for view in store.ends.read(cursor).tries] == ["new"]


def test_an_end_whose_transaction_commits_late_is_not_passed(store: Store) -> None:
    """It began first and is seen last: a number taken while it was written would be behind the reader's cursor."""
    if store.database.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    submit(store, "late")
    with store.database.engine.connect() as connection, connection.begin():
        connection.exec_driver_sql(
            "UPDATE task_instance SET state = 'success', ended_at = statement_timestamp()"
            " WHERE task_instance_id = 'late'"
        )
        _end(store, "quick")
        first = store.ends.read(0)
        assert [view.task_instance_id for view in first.tries] == ["quick"]
    assert [view.task_instance_id for view in store.ends.read(first.cursor).tries] == ["late"]


def test_ten_writers_and_four_readers_agree_on_one_order(store: Store) -> None:
    writers, each = 10, 12
    expected = {f"w{writer}-{number}" for writer in range(writers) for number in range(each)}
    for name in expected:
        submit(store, name, owner="o")
    written = threading.Event()

    def write(writer: int) -> None:
        for number in range(each):
            # Nobody holds them: what is shown here is the order of ends, not who may end.
            assert store.attempts.request_cancel(f"w{writer}-{number}").is_terminal

    def read(_: int) -> list[str]:
        found: list[str] = []
        cursor = 0
        while True:
            is_last_look = written.is_set()
            page = store.ends.read(cursor, "o", 7)
            found += [view.task_instance_id for view in page.tries]
            cursor = page.cursor
            if is_last_look and not page.tries:
                return found

    with ThreadPoolExecutor(writers + 4) as pool:
        reading = [pool.submit(read, number) for number in range(4)]
        for one in [pool.submit(write, number) for number in range(writers)]:
            one.result()
        written.set()
        seen = [one.result() for one in reading]
    assert len(seen[0]) == len(expected)
    assert set(seen[0]) == expected
    assert seen == [seen[0]] * 4
    # A reader that starts anew sees the same.
    assert _all(store, "o") == seen[0]


def test_those_of_some_task_instances_that_are_over(store: Store) -> None:
    _end(store, "done")
    submit(store, "live")
    assert [view.task_instance_id for view in store.ends.ended(["done", "live", "unknown", "done"])] == ["done"]
