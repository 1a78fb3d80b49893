"""Values and states belong together: none without its state, none of a start that did not succeed."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.xcom import XComKey, XComValue
from leoflow_celery.errors import Fenced
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import FinishCondition
from leoflow_celery.store.models import TaskInstance, table_of
from leoflow_celery.store.xcom import XComStore
from tests.contract.store.rows import EVICTED, EXIT_1, EXPIRED, claim, new_try, submit
from tests.support.listening import listened

KEY = XComKey("default", "sales", "r1", "ti-1")
VALUE = [(KEY, XComValue(b"42"))]


def test_the_value_comes_with_the_end(store: Store) -> None:
    attempt = submit(store)
    guard = claim(store, attempt)
    store.attempts.finish(attempt, Outcome.success(), guard, VALUE)
    found = store.xcom.get(KEY)
    assert found is not None
    assert found.value == b"42"


@pytest.mark.parametrize("guard", [FinishCondition(holder="h2"), FinishCondition(unclaimed=True)])
def test_an_end_that_does_not_count_leaves_no_value(store: Store, guard: FinishCondition) -> None:
    attempt = submit(store)
    claim(store, attempt)
    assert not store.attempts.finish(attempt, Outcome.success(), guard, VALUE).recorded
    assert store.xcom.get(KEY) is None


def test_a_late_end_does_not_replace_the_value_of_the_first(store: Store) -> None:
    attempt = submit(store)
    guard = claim(store, attempt)
    store.attempts.finish(attempt, Outcome.success(), guard, VALUE)
    late = [(KEY, XComValue(b"43"))]
    store.attempts.finish(attempt, Outcome.success(), guard, late)
    store.attempts.finish(attempt, EXIT_1, FinishCondition(), late)
    found = store.xcom.get(KEY)
    assert found is not None
    assert found.value == b"42"


def test_nobody_sees_the_value_before_the_state(sql_store: Store) -> None:
    """Seen from outside just before the commit, neither is there."""
    attempt = submit(sql_store)
    seen: list[object] = []

    def look(_: object) -> None:
        seen.extend((sql_store.xcom.get(KEY), sql_store.attempts.get("ti-1").is_terminal))

    sa.event.listen(sql_store.database.engine, "commit", look, once=True)
    sql_store.attempts.finish(attempt, Outcome.success(), FinishCondition(), VALUE)
    assert seen == [None, False]
    assert sql_store.xcom.get(KEY) is not None


def test_a_transaction_that_fails_takes_its_value_along(sql_store: Store) -> None:
    def fail() -> None:
        with sql_store.database.transaction() as connection:
            sql_store.xcom.put(VALUE, connection)
            connection.execute(sa.update(table_of(TaskInstance)).values(state="success"))
            raise ZeroDivisionError

    submit(sql_store)
    with pytest.raises(ZeroDivisionError):
        fail()
    assert sql_store.xcom.get(KEY) is None
    assert not sql_store.attempts.get("ti-1").is_terminal


def _push(xcom: XComStore) -> None:
    xcom.put(VALUE)


def test_the_next_launch_starts_without_the_values_of_the_last(store: Store) -> None:
    attempt = submit(store)
    guard = claim(store, attempt)
    _push(store.xcom)
    store.attempts.finish(attempt, EVICTED, guard)
    claim(store, attempt.evolve(launch=2), "h2")
    assert store.xcom.get(KEY) is None


def test_the_next_try_starts_without_the_values_of_the_last(store: Store) -> None:
    attempt = submit(store)
    store.attempts.finish(attempt, Outcome.success(), claim(store, attempt), VALUE)
    cleared = submit(store, try_number=2)
    assert store.xcom.get(KEY) is not None
    claim(store, cleared, "h2")
    assert store.xcom.get(KEY) is None


@pytest.mark.parametrize("state", [TaskState.QUEUED, TaskState.SKIPPED])
def test_a_new_instance_of_a_task_starts_without_the_values_of_an_earlier_one(store: Store, state: TaskState) -> None:
    """A run that was cleared: the scheduler may give its task instances new ids."""
    first, sibling = submit(store), submit(store, "sibling")
    for attempt, task_id in ((first, "ti-1"), (sibling, "sibling")):
        value = [(XComKey("default", "sales", "r1", task_id), XComValue(b"42"))]
        store.attempts.finish(attempt, Outcome.success(), claim(store, attempt), value)
    submit(store, "in another run", task_id="ti-1", run_id="r2")
    submit(store, "of another dag", task_id="ti-1", dag_id="costs")
    submit(store)
    assert store.xcom.get(KEY) is not None
    store.submissions.record([new_try(f"another-{n}", task_id="ti-1") for n in range(3)], state)
    assert store.xcom.get(KEY) is None
    assert store.xcom.get(XComKey("default", "sales", "r1", "sibling")) is not None


def test_a_try_that_is_skipped_leaves_no_value_of_the_try_before(store: Store) -> None:
    attempt = submit(store)
    store.attempts.finish(attempt, Outcome.success(), claim(store, attempt), VALUE)
    store.submissions.record([new_try(try_number=2)], TaskState.SKIPPED)
    assert store.xcom.get(KEY) is None


def test_who_replaces_a_silent_holder_starts_without_its_values(store: Store) -> None:
    attempt = submit(store)
    listened(store)
    claim(store, attempt, "silent", EXPIRED)
    _push(store.xcom)
    claim(store, attempt, "h2")
    assert store.xcom.get(KEY) is None


@pytest.mark.parametrize("try_number", [1, 2])
def test_a_holder_that_registers_again_keeps_what_it_pushed(store: Store, try_number: int) -> None:
    """A gateway that restarted in the middle of a task must not lose the task's values."""
    attempt = submit(store, try_number=try_number)
    claim(store, attempt)
    store.claims.put_xcoms(attempt, "h1", VALUE)
    claim(store, attempt)
    assert store.xcom.get(KEY) is not None


def test_a_fenced_holder_pushes_nothing(store: Store) -> None:
    attempt = submit(store)
    listened(store)
    claim(store, attempt, "silent", EXPIRED)
    claim(store, attempt, "h2")
    with pytest.raises(Fenced):
        store.claims.put_xcoms(attempt, "silent", VALUE)
    assert store.xcom.get(KEY) is None
