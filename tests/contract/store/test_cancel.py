"""Cancelling: at once when nobody runs the try, through the holder when somebody does, and never forgotten."""

from __future__ import annotations

import pytest

from leoflow_celery.domain.attempt import LaunchReport
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import ClaimRefused, NotFound
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import Beat, FinishCondition
from tests.contract.store.rows import EVICTED, EXIT_1, LEASE_SECONDS, claim, event_names, race, submit


@pytest.mark.parametrize("launched", [False, True])
def test_what_nobody_claimed_ends_at_once(store: Store, launched: bool) -> None:
    attempt = submit(store)
    if launched:
        store.attempts.launched([LaunchReport(attempt, "pod", "node")])
    view = store.attempts.request_cancel("ti-1")
    assert (view.state, view.reason) == (TaskState.FAILED, FailureReason.CANCELLED)
    assert event_names(store) == ["submitted", "cancel_requested", "finished"]
    with pytest.raises(ClaimRefused) as refused:
        store.attempts.claim(attempt, "h1", "host", LEASE_SECONDS)
    assert refused.value.why == "terminal"
    assert len(store.completions.take(60)) == 1


@pytest.mark.parametrize("running", [False, True])
def test_a_holder_is_told_and_its_failure_becomes_cancelled(store: Store, running: bool) -> None:
    attempt = submit(store)
    guard = claim(store, attempt)
    if running:
        store.attempts.start(attempt, "h1")
    view = store.attempts.request_cancel("ti-1")
    assert not view.is_terminal
    assert store.attempts.heartbeat([Beat(attempt, "h1")], 60).cancelled == {"h1"}
    store.attempts.request_cancel("ti-1")
    assert event_names(store).count("cancel_requested") == 1
    finished = store.attempts.finish(attempt, EVICTED, guard)
    assert finished.relaunch is None
    ended = store.attempts.get("ti-1")
    assert (ended.state, ended.reason) == (TaskState.FAILED, FailureReason.CANCELLED)
    assert "drained" in ended.message


def test_a_holder_that_had_already_succeeded_keeps_its_success(store: Store) -> None:
    attempt = submit(store)
    guard = claim(store, attempt)
    store.attempts.request_cancel("ti-1")
    assert store.attempts.finish(attempt, Outcome.success(), guard).recorded
    assert store.attempts.get("ti-1").state is TaskState.SUCCESS


def test_a_cancelled_try_cannot_be_claimed_even_when_its_holder_is_gone(store: Store) -> None:
    attempt = submit(store)
    claim(store, attempt, lease_seconds=-1)
    store.attempts.request_cancel("ti-1")
    with pytest.raises(ClaimRefused) as refused:
        store.attempts.claim(attempt, "h2", "host", LEASE_SECONDS)
    assert refused.value.why == "terminal"


def test_a_try_between_two_launches_ends_at_once(store: Store) -> None:
    attempt = submit(store)
    store.attempts.finish(attempt, EVICTED)
    assert store.attempts.request_cancel("ti-1").reason == FailureReason.CANCELLED
    assert store.submissions.unsent(-1) == []


def test_an_ended_try_stays_as_it_ended(store: Store) -> None:
    attempt = submit(store)
    store.attempts.finish(attempt, EXIT_1)
    before = store.attempts.get("ti-1")
    assert store.attempts.request_cancel("ti-1") == before
    assert "cancel_requested" not in event_names(store)


def test_the_newest_try_unless_named(store: Store) -> None:
    store.attempts.finish(submit(store), EXIT_1)
    submit(store, try_number=2)
    assert store.attempts.request_cancel("ti-1", 1).reason == FailureReason.NON_ZERO_EXIT
    assert store.attempts.request_cancel("ti-1").try_number == 2
    with pytest.raises(NotFound):
        store.attempts.request_cancel("nobody")


def test_a_cancellation_that_meets_a_relaunch_is_never_lost(store: Store) -> None:
    """Whichever comes first: afterwards the try is over, or its next launch is."""
    attempts = [submit(store, f"ti-{n}") for n in range(12)]
    for attempt in attempts:
        guard = claim(store, attempt)

        def act(number: int, attempt=attempt, guard=guard) -> object:
            if number:
                return store.attempts.request_cancel(attempt.task_instance_id)
            return store.attempts.finish(attempt, EVICTED, guard)

        assert not [result for result in race(2, act) if isinstance(result, Exception)]
    states = {(view.state, view.reason) for view in (store.attempts.get(a.task_instance_id) for a in attempts)}
    assert states == {(TaskState.FAILED, FailureReason.CANCELLED)}


def test_a_cancellation_that_meets_a_claim_ends_the_try_or_tells_the_holder(store: Store) -> None:
    for n in range(12):
        attempt = submit(store, f"ti-{n}")

        def act(number: int, attempt=attempt) -> object:
            if number:
                return store.attempts.request_cancel(attempt.task_instance_id)
            return store.attempts.claim(attempt, "h1", "host", LEASE_SECONDS)

        claimed, _ = race(2, act)
        view = store.attempts.get(f"ti-{n}")
        assert view.cancel_requested_at is not None
        assert view.is_terminal is isinstance(claimed, ClaimRefused)
        if not view.is_terminal:
            assert store.attempts.heartbeat([Beat(attempt, "h1")], 60).cancelled == {"h1"}
            assert store.attempts.finish(attempt, EXIT_1, FinishCondition(holder="h1")).recorded
