"""Submitting: once per try, in one transaction, with the newest try the only one alive."""

from __future__ import annotations

import pytest

from leoflow_celery.domain.attempt import AttemptId, celery_task_id
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import ResultCallback
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import ClaimRefused, InvalidRequest, NotFound
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import FinishCondition
from tests.contract.store.rows import EVICTED, claim, event_names, new_try, race, submit


def test_a_recorded_try_is_queued_with_its_event_and_its_waiting_id(store: Store) -> None:
    callback = ResultCallback(task="notify", queue="mine")
    [submitted] = store.submissions.record([new_try("ti-1", result_callback=callback, priority=7)])
    assert submitted.created
    assert submitted.celery_task_id == celery_task_id("ti-1", 1)
    view = store.attempts.get("ti-1")
    assert (view.state, view.launch, view.priority, view.queue) == (TaskState.QUEUED, 1, 7, "subprocess")
    assert view.sent_at is view.holder is view.started_at is view.ended_at is None
    assert event_names(store) == ["submitted"]
    store.attempts.finish(view.attempt, view.outcome.success())
    [waiting] = store.completions.take(60)
    assert waiting.celery_task_id == submitted.celery_task_id
    assert waiting.context["task"] == "leoflow.execute.subprocess"
    assert waiting.result_callback == {"task": "notify", "queue": "mine"}


def test_the_same_try_again_changes_nothing(store: Store) -> None:
    first = submit(store)
    before = store.attempts.get("ti-1")
    [again] = store.submissions.record([new_try(priority=9)])
    assert not again.created
    assert again.attempt == first
    assert store.attempts.get("ti-1") == before
    assert event_names(store) == ["submitted"]


def test_the_same_try_twice_in_one_call_is_created_once(store: Store) -> None:
    submitted = store.submissions.record([new_try("a"), new_try("b"), new_try("a")])
    assert [item.created for item in submitted] == [True, True, False]
    assert event_names(store, "a") == ["submitted"]


def test_a_batch_larger_than_any_parameter_limit(store: Store) -> None:
    assert len(store.submissions.record([new_try(f"ti-{n}") for n in range(2_500)])) == 2_500
    assert store.submissions.record([]) == []
    assert len(store.submissions.unsent(0, limit=10_000)) == 2_500


@pytest.mark.parametrize("state", [TaskState.SKIPPED, TaskState.UPSTREAM_FAILED])
def test_a_try_recorded_as_ended_waits_for_nothing(store: Store, state: TaskState) -> None:
    store.submissions.record([new_try()], state)
    view = store.attempts.get("ti-1")
    assert view.state is state
    assert view.ended_at is not None
    assert store.completions.take(60) == []
    assert store.submissions.unsent(0) == []


@pytest.mark.parametrize("state", [TaskState.RUNNING, TaskState.NONE, TaskState.SCHEDULED, TaskState.UP_FOR_RETRY])
def test_a_try_cannot_be_recorded_in_the_middle_of_its_life(store: Store, state: TaskState) -> None:
    with pytest.raises(InvalidRequest, match=state):
        store.submissions.record([new_try()], state)
    with pytest.raises(NotFound):
        store.attempts.get("ti-1")


def test_a_newer_try_ends_the_older_one_and_fences_its_holder(store: Store) -> None:
    old = submit(store)
    guard = claim(store, old)
    new = submit(store, try_number=2)
    ended = store.attempts.get("ti-1", 1)
    assert (ended.state, ended.reason) == (TaskState.FAILED, FailureReason.SUPERSEDED)
    assert store.attempts.get("ti-1").attempt == new
    assert not store.attempts.finish(old, ended.outcome.success(), guard).recorded
    with pytest.raises(ClaimRefused) as refused:
        store.attempts.claim(old, "h2", "host", 60)
    assert refused.value.why == "superseded"
    assert [waiting.try_number for waiting in store.completions.take(60)] == [1]


def test_an_older_try_recorded_late_never_lives(store: Store) -> None:
    new = submit(store, try_number=2)
    claim(store, new)
    late = submit(store, try_number=1)
    view = store.attempts.get("ti-1", 1)
    assert (view.state, view.reason) == (TaskState.FAILED, FailureReason.SUPERSEDED)
    assert store.submissions.unsent(-1) == []
    with pytest.raises(ClaimRefused) as refused:
        store.attempts.claim(late, "h2", "host", 60)
    assert refused.value.why == "superseded"
    assert store.attempts.get("ti-1").holder == "h1"


def test_a_newer_try_leaves_an_ended_one_and_other_tasks_alone(store: Store) -> None:
    first, other = submit(store), submit(store, "other")
    store.attempts.finish(first, store.attempts.get("ti-1").outcome.success())
    submit(store, try_number=2)
    assert store.attempts.get("ti-1", 1).state is TaskState.SUCCESS
    assert store.attempts.get("other").attempt == other
    assert not store.attempts.get("other").is_terminal


def test_unsent_gives_a_submit_under_way_its_grace_and_forgets_what_was_sent(store: Store) -> None:
    first, second = submit(store, "a"), submit(store, "b")
    assert store.submissions.unsent(60) == []
    assert [view.attempt for view in store.submissions.unsent(0)] == [first, second]
    store.submissions.mark_sent([first])
    store.submissions.mark_sent([])
    assert [view.attempt for view in store.submissions.unsent(0)] == [second]


def test_a_relaunch_is_due_without_grace_and_an_old_launch_cannot_mark_it_sent(store: Store) -> None:
    attempt = submit(store)
    store.submissions.mark_sent([attempt])
    store.attempts.finish(attempt, EVICTED, FinishCondition(unclaimed=True))
    store.submissions.mark_sent([attempt])
    assert [view.attempt for view in store.submissions.unsent(60)] == [AttemptId("ti-1", 1, 2)]


def test_rows_are_locked_in_one_order_whatever_the_caller_says(store: Store) -> None:
    """Two submitters of the same tries in opposite orders would wait for each other on PostgreSQL."""
    store.submissions.record([new_try(name) for name in ("c", "a", "b")])
    with store.database.reading() as connection:
        rows = connection.exec_driver_sql("SELECT task_instance_id FROM task_event ORDER BY id").all()
    assert [row[0] for row in rows] == ["a", "b", "c"]


def test_many_threads_submit_the_same_tries_in_any_order_and_each_is_created_once(store: Store) -> None:
    tries = [new_try(f"ti-{n}", number) for n in range(50) for number in (1, 2)]
    results = race(20, lambda number: store.submissions.record(tries if number % 2 else tries[::-1]))
    failures = [result for result in results if isinstance(result, Exception)]
    assert failures == []
    created = [item.attempt for result in results for item in result if item.created]  # type: ignore[union-attr]
    assert sorted(map(str, created)) == sorted(str(item.request.attempt) for item in tries)
    for n in range(50):
        assert store.attempts.get(f"ti-{n}", 1).reason == FailureReason.SUPERSEDED
        assert store.attempts.get(f"ti-{n}", 2).state is TaskState.QUEUED
        assert sorted(event_names(store, f"ti-{n}")) == ["finished", "submitted", "submitted"]


def test_two_tries_that_were_recorded_at_one_moment_still_leave_one_that_can_run(store: Store) -> None:
    """Neither submit saw the other's row then: the claim decides, and a sweep ends the older one."""
    old = submit(store)
    submit(store, try_number=2)
    with store.database.transaction() as connection:
        connection.exec_driver_sql("UPDATE task_instance SET state = 'queued' WHERE try_number = 1")
    with pytest.raises(ClaimRefused) as refused:
        store.attempts.claim(old, "h1", "host", 60)
    assert refused.value.why == "superseded"
    assert (store.submissions.end_superseded(), store.submissions.end_superseded()) == (1, 0)
    ended = store.attempts.get("ti-1", 1)
    assert (ended.state, ended.reason) == (TaskState.FAILED, FailureReason.SUPERSEDED)
    assert [waiting.try_number for waiting in store.completions.take(60)] == [1]
