"""Completions: whoever waits for a try gets its result once, whatever dies in between."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from leoflow_celery.domain.attempt import celery_task_id
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.errors import InvalidRequest
from leoflow_celery.store import Store
from leoflow_celery.store.completions import Waiting
from leoflow_celery.store.models import TaskCompletion, table_of
from tests.contract.store.rows import EVICTED, race, submit


def finished(store: Store, task_instance_id: str) -> str:
    attempt = submit(store, task_instance_id)
    store.attempts.finish(attempt, Outcome.success())
    return celery_task_id(task_instance_id, 1)


def ids(waiting: list[Waiting]) -> set[str]:
    return {item.celery_task_id for item in waiting}


def test_nothing_is_due_before_the_try_ended(store: Store) -> None:
    attempt = submit(store)
    assert store.completions.take(60) == []
    store.attempts.claim(attempt, "h1", "host", 60)
    store.attempts.finish(attempt, EVICTED)
    assert store.completions.take(60) == []
    store.attempts.finish(attempt.evolve(launch=2), Outcome.success())
    assert ids(store.completions.take(60)) == {celery_task_id("ti-1", 1)}


def test_what_is_leased_is_not_given_twice_until_the_lease_runs_out(store: Store) -> None:
    waiting_id = finished(store, "a")
    assert ids(store.completions.take(-1)) == {waiting_id}
    assert ids(store.completions.take(60)) == {waiting_id}
    assert store.completions.take(60) == []


def test_what_is_done_is_never_given_again(store: Store) -> None:
    waiting_id = finished(store, "a")
    taken = store.completions.take(-1)
    assert ids(taken) == {waiting_id}
    store.completions.done(taken)
    store.completions.done([])
    assert store.completions.take(60) == []


def test_only_who_holds_the_lease_says_how_it_went(store: Store) -> None:
    waiting_id = finished(store, "a")
    slow, quick = store.completions.take(-2), store.completions.take(-1)  # two leases, also within a millisecond
    store.completions.done(slow)
    store.completions.failed(slow[0])
    [again] = store.completions.take(60)
    assert (again.celery_task_id, again.failures) == (waiting_id, 0)
    store.completions.done(quick)
    store.completions.done([again])
    assert _open(store) == 0


def _open(store: Store) -> int:
    table = table_of(TaskCompletion)
    with store.database.reading() as connection:
        count = sa.select(sa.func.count()).select_from(table).where(table.c.done_at.is_(None))
        return int(connection.execute(count).scalar_one())


def test_any_number_of_ids_of_any_shape_wait_for_one_try(store: Store) -> None:
    own = finished(store, "a")
    ours = "x" * 200
    context = {"task": "leoflow.dispatch", "callbacks": [{"task": "next"}]}
    assert [store.completions.register(ours, "a", 1, context) for _ in range(2)] == [True, False]
    taken = store.completions.take(60, "a", 1)
    assert ids(taken) == {own, ours}
    [extra] = [item for item in taken if item.celery_task_id == ours]
    assert extra.context["callbacks"] == [{"task": "next"}]
    assert extra.result_callback is None


def test_a_try_can_be_named_and_the_oldest_come_first(store: Store) -> None:
    first, second, third = (finished(store, name) for name in "abc")
    assert ids(store.completions.take(60, "b", 1)) == {second}
    assert ids(store.completions.take(60, "b", 2)) == set()
    assert ids(store.completions.take(60, limit=1)) == {first}
    assert ids(store.completions.take(60, limit=10)) == {third}


def test_racing_takers_share_the_work_and_no_id_goes_to_two(store: Store) -> None:
    due = {finished(store, f"ti-{n}") for n in range(60)}
    taken: list[str] = []

    def take(_: int) -> list[str]:
        mine: list[str] = []
        while found := store.completions.take(60, limit=3):
            assert len(found) <= 3
            mine += ids(found)
            store.completions.done(found)
        return mine

    for result in race(20, take):
        assert not isinstance(result, Exception), result
        taken += result
    # A taker that found only locked rows stopped early; what it left is still due.
    taken += ids(store.completions.take(60))
    assert len(taken) == len(set(taken))
    assert set(taken) == due


def test_one_that_cannot_be_completed_waits_longer_each_time_up_to_an_hour(store: Store) -> None:
    celery_id, delays = finished(store, "a"), []
    for _ in range(9):
        [taken] = store.completions.take(60)
        assert taken.celery_task_id == celery_id
        delays.append(store.completions.failed(taken))
        _pass(store, delays[-1] - 5)
        assert store.completions.take(60) == []
        _pass(store, 6)
    assert delays == [30, 60, 120, 240, 480, 960, 1920, 3600, 3600]
    [taken] = store.completions.take(60)
    store.completions.done([taken])
    assert store.completions.failed(taken) == 3600
    _pass(store, 4_000)
    assert store.completions.take(60) == []


def _pass(store: Store, seconds: float) -> None:
    """So many seconds later: every lease ends so much sooner."""
    table = table_of(TaskCompletion)
    with store.database.transaction() as connection:
        for name, until in connection.execute(sa.select(table.c.celery_task_id, table.c.lease_until)).all():
            update = sa.update(table).where(table.c.celery_task_id == name)
            connection.execute(update.values(lease_until=until - seconds))


@pytest.mark.parametrize("waiting_id", ["x" * 256, "a\0b", "\ud800", ""])
def test_an_id_that_no_database_keeps_is_refused(store: Store, waiting_id: str) -> None:
    finished(store, "a")
    with pytest.raises(InvalidRequest, match=r"^id: "):
        store.completions.register(waiting_id, "a", 1, {})
    store.completions.register("x" * 255, "a", 1, {})


def test_an_id_belongs_to_the_try_that_registered_it_first(store: Store) -> None:
    own = finished(store, "a")
    finished(store, "b")
    store.completions.register("mine", "a", 1, {})
    assert store.completions.owners(["mine", own, "nobody", "a\0"]) == {"mine": ("a", 1), own: ("a", 1)}
    assert store.completions.waits("mine", "a", 1)
    assert not store.completions.waits("nobody", "a", 1)
    for foreign in ("mine", own, celery_task_id("not submitted yet", 1)):
        with pytest.raises(InvalidRequest, match="is the Celery id of another try") as caught:
            store.completions.waits(foreign, "b", 1)
        assert caught.value.field == "id"
        with pytest.raises(InvalidRequest, match="is the Celery id of another try"):
            store.completions.register(foreign, "b", 1, {})
    assert ids(store.completions.take(60, "b", 1)) == {celery_task_id("b", 1)}
