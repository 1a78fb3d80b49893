"""What ended long ago is removed as a whole, and nothing that anybody still needs."""

from __future__ import annotations

import pytest

from leoflow_celery.domain.attempt import AttemptId, celery_task_id
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.states import RunState
from leoflow_celery.errors import NotFound
from leoflow_celery.store import Store
from tests.contract.store.rows import EXIT_1, submit

#: Everything that ended by now is old.
ALL = -60.0


def ended(store: Store, task_instance_id: str, try_number: int = 1) -> AttemptId:
    """A try that ended and whose result was delivered."""
    attempt = submit(store, task_instance_id, try_number)
    store.attempts.finish(attempt, Outcome.success())
    taken = store.completions.take(60, task_instance_id, try_number)
    store.completions.done(taken)
    return attempt


def is_there(store: Store, task_instance_id: str, try_number: int = 1) -> bool:
    try:
        store.attempts.get(task_instance_id, try_number)
    except NotFound:
        return False
    return True


def test_an_old_try_goes_with_its_events_and_completions(store: Store) -> None:
    ended(store, "old")
    assert store.completions.is_registered(celery_task_id("old", 1))
    assert store.history.prune(3_600) == 0
    assert is_there(store, "old")
    assert store.history.prune(ALL) == 1
    assert not is_there(store, "old")
    assert store.events.of("old") == []
    assert not store.completions.is_registered(celery_task_id("old", 1))
    assert store.history.prune(ALL) == 0


def test_live_tries_and_undelivered_results_stay(store: Store) -> None:
    submit(store, "live")
    store.attempts.finish(submit(store, "undelivered"), EXIT_1)
    assert store.history.prune(ALL) == 0
    assert is_there(store, "live")
    assert is_there(store, "undelivered")


def test_an_older_try_stays_while_a_newer_one_lives(store: Store) -> None:
    ended(store, "ti", 1)
    submit(store, "ti", 2)
    assert store.history.prune(ALL) == 0
    assert is_there(store, "ti", 1)


def test_every_try_of_a_task_instance_goes_in_batches(store: Store) -> None:
    for number in (1, 2):
        ended(store, "ti", number)
    ended(store, "other")
    counts = [store.history.prune(ALL, limit=2), store.history.prune(ALL, limit=2)]
    assert sorted(counts) == [1, 2]


@pytest.mark.parametrize("state", [RunState.SUCCESS, RunState.FAILED])
def test_a_run_goes_after_its_tasks(store: Store, state: RunState) -> None:
    run = ("default", "sales", "r1")
    store.runs.create(*run)
    ended(store, "a")
    store.staging.record_staging_volume(*run, "kept", "1Gi", "kubernetes")
    store.staging.record_staging_volume(*run, "deleted", "1Gi", "kubernetes")
    store.staging.mark_staging_deleted("deleted", "run_succeeded")
    assert store.history.prune_runs(3_600) == 0
    assert store.history.prune_runs(ALL) == 1  # the record of the deleted volume
    store.runs.finish(*run, state)
    assert store.history.prune_runs(ALL) == 0
    store.history.prune(ALL)
    assert store.history.prune_runs(ALL) == 1
    with pytest.raises(NotFound):
        store.runs.get(*run)
    assert [one.claim_name for one in store.staging.list_active()] == ["kept"]
