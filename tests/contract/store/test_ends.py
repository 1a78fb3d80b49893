"""The end: the first one wins, later ones are history, infrastructure failures start the next launch."""

from __future__ import annotations

import pytest

from leoflow_celery.domain.attempt import LaunchReport
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TRANSITIONS, TaskState
from leoflow_celery.errors import InvalidRequest, NotFound
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import Beat, FinishCondition
from leoflow_celery.store.database import Database
from leoflow_celery.store.models import TaskInstance, table_of
from tests.contract.store.rows import EVICTED, EXIT_1, EXPIRED, LEASE_SECONDS, claim, event_names, race, submit

LIVE = (TaskState.QUEUED, TaskState.RUNNING)
ENDS = (TaskState.SUCCESS, TaskState.FAILED, TaskState.SKIPPED)


def put_into(database: Database, state: TaskState) -> None:
    with database.transaction() as connection:
        connection.execute(table_of(TaskInstance).update().values(state=state.value))


def test_everything_known_about_the_end_is_on_the_row(store: Store) -> None:
    attempt = submit(store)
    guard = claim(store, attempt)
    outcome = Outcome.failed(
        FailureReason.OOM_KILLED, "over 512Mi", 137, last_event="OOMKilling", log_tail=("one", "zwölf")
    )
    finished = store.attempts.finish(attempt, outcome, guard)
    assert (finished.recorded, finished.relaunch, finished.state) == (True, None, TaskState.FAILED)
    view = store.attempts.get("ti-1")
    assert view.outcome == outcome
    assert view.ended_at is not None
    assert store.events.of("ti-1")[-1].details == outcome.to_json()


def test_what_user_code_prints_can_always_be_recorded(store: Store) -> None:
    outcome = Outcome.failed(
        FailureReason.NON_ZERO_EXIT, "nul \x00 and \udcff", 1, last_event="\x00", log_tail=("\ud800", "\x00")
    )
    assert store.attempts.finish(submit(store), outcome).recorded
    assert store.attempts.get("ti-1").message.startswith("nul ")


class TestATaskThatLooksAgainLater:
    def test_goes_on_with_the_next_launch_and_spends_nothing(self, store: Store) -> None:
        attempt = submit(store)
        for count in range(1, 6):  # more often than there are relaunches
            claim(store, attempt)
            finished = store.attempts.reschedule(attempt, "h1", 0)
            assert (finished.recorded, finished.state) == (True, TaskState.QUEUED)
            view = store.attempts.get("ti-1")
            assert (view.launch, view.reschedules, view.holder, view.sent_at) == (count + 1, count, None, None)
            attempt = view.attempt
        assert event_names(store)[-1] == "rescheduled"
        guard = claim(store, attempt)
        assert store.attempts.finish(attempt, EVICTED, guard).relaunch is not None, "the budget is whole"

    def test_waits_in_sql_until_then(self, store: Store) -> None:
        attempt = submit(store)
        claim(store, attempt)
        before = store.attempts.get("ti-1").read_at
        store.attempts.reschedule(attempt, "h1", 3_600)
        view = store.attempts.get("ti-1")
        assert view.send_after - before >= 3_599
        assert view.first_reschedule_at is not None
        assert list(store.submissions.unsent(0)) == []
        assert store.reaper_queries.oldest_waiting() == {}
        assert list(store.reaper_queries.waiting(0)) == []

    def test_is_the_holders_alone_to_say(self, store: Store) -> None:
        attempt = submit(store)
        claim(store, attempt)
        assert not store.attempts.reschedule(attempt, "another", 0).recorded
        assert store.attempts.reschedule(attempt, "h1", 0).recorded
        assert not store.attempts.reschedule(attempt, "h1", 0).recorded, "the next launch is not the last one's"
        assert store.attempts.get("ti-1").launch == 2

    def test_that_was_cancelled_ends(self, store: Store) -> None:
        attempt = submit(store)
        claim(store, attempt)
        store.attempts.request_cancel("ti-1")
        assert store.attempts.reschedule(attempt, "h1", 60).state is TaskState.FAILED
        assert store.attempts.get("ti-1").reason == FailureReason.CANCELLED


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("state", list(TaskState))
def test_every_transition_the_table_forbids_is_refused(store: Store, state: TaskState, end: TaskState) -> None:
    attempt = submit(store)
    put_into(store.database, state)
    outcome = EXIT_1 if end is TaskState.FAILED else Outcome(end)
    finished = store.attempts.finish(attempt, outcome)
    legal = end in TRANSITIONS[state]
    assert finished.recorded is legal
    assert store.attempts.get("ti-1").state is (end if legal else state)
    assert event_names(store)[-1] == ("finished" if legal else "late_report")


@pytest.mark.parametrize("state", sorted(set(TaskState) - {*ENDS, TaskState.UPSTREAM_FAILED}))
def test_what_is_no_end_cannot_end_an_attempt(store: Store, state: TaskState) -> None:
    attempt = submit(store)
    with pytest.raises(InvalidRequest, match="state"):
        store.attempts.finish(attempt, Outcome(state))
    assert store.attempts.get("ti-1").state is TaskState.QUEUED


def test_the_first_end_wins_and_a_later_one_is_only_an_event(store: Store) -> None:
    attempt = submit(store)
    guard = claim(store, attempt)
    store.attempts.finish(attempt, Outcome.success(), guard)
    before = store.attempts.get("ti-1")
    late = store.attempts.finish(attempt, EXIT_1)
    assert (late.recorded, late.state) == (False, TaskState.SUCCESS)
    assert store.attempts.get("ti-1") == before
    last = store.events.of("ti-1")[-1]
    assert (last.event, last.details["reason"]) == ("late_report", "non_zero_exit")


def test_the_holder_that_says_the_same_again_is_acknowledged(store: Store) -> None:
    attempt = submit(store)
    guard = claim(store, attempt)
    store.attempts.finish(attempt, EXIT_1, guard)
    before = store.attempts.get("ti-1")
    assert store.attempts.finish(attempt, EXIT_1, guard).recorded
    assert store.attempts.get("ti-1") == before
    assert event_names(store) == ["submitted", "claimed", "finished"]
    assert not store.attempts.finish(attempt, Outcome.success(), guard).recorded
    assert not store.attempts.finish(attempt, EXIT_1, FinishCondition(holder="h2")).recorded


def test_a_report_about_nothing_is_no_row_and_no_event(store: Store) -> None:
    attempt = submit(store).evolve(task_instance_id="unknown")
    finished = store.attempts.finish(attempt, Outcome.success())
    assert (finished.recorded, finished.state) == (False, None)
    assert store.events.of("unknown") == []
    with pytest.raises(NotFound, match="unknown"):
        store.attempts.get("unknown")
    with pytest.raises(NotFound, match="try 7"):
        store.attempts.get("ti-1", 7)


def test_threads_race_to_end_an_attempt_and_one_end_is_recorded(store: Store) -> None:
    attempt = submit(store)
    claim(store, attempt)
    outcomes = [Outcome.failed(FailureReason.NON_ZERO_EXIT, f"exit {n}", n) for n in range(20)]
    results = race(20, lambda number: store.attempts.finish(attempt, outcomes[number]))
    winners = [n for n, finished in enumerate(results) if finished.recorded]  # type: ignore[union-attr]
    assert len(winners) == 1
    assert store.attempts.get("ti-1").exit_code == winners[0]
    assert event_names(store).count("late_report") == 19


# -- guards ------------------------------------------------------------------------------------------------------


def test_guard_holder(store: Store) -> None:
    attempt = submit(store)
    assert not store.attempts.finish(attempt, EXIT_1, FinishCondition(holder="h1")).recorded
    claim(store, attempt)
    assert not store.attempts.finish(attempt, EXIT_1, FinishCondition(holder="h2")).recorded
    assert store.attempts.finish(attempt, EXIT_1, FinishCondition(holder="h1")).recorded


def test_guard_unclaimed(store: Store) -> None:
    claimed, free = submit(store, "a"), submit(store, "b")
    claim(store, claimed)
    assert not store.attempts.finish(claimed, EXIT_1, FinishCondition(unclaimed=True)).recorded
    assert store.attempts.finish(free, EXIT_1, FinishCondition(unclaimed=True)).recorded


def test_guard_unlaunched(store: Store) -> None:
    """A launch that was told after the reaper looked is no lost message."""
    started, waiting = submit(store, "started"), submit(store, "waiting")
    store.attempts.launched([LaunchReport(started, "pod", "node")])
    assert not store.attempts.finish(started, EVICTED, FinishCondition(unclaimed=True, unlaunched=True)).recorded
    assert store.attempts.finish(waiting, EVICTED, FinishCondition(unclaimed=True, unlaunched=True)).recorded


def test_guard_silent_since_spares_what_woke_up_and_what_never_spoke(store: Store) -> None:
    attempt, never = submit(store, "a"), submit(store, "b")
    claim(store, attempt)
    store.attempts.heartbeat([Beat(attempt, "h1")], 60)
    seen = store.attempts.get("a").last_heartbeat_at
    store.attempts.heartbeat([Beat(attempt, "h1")], 60)  # it woke up
    assert not store.attempts.finish(attempt, EXIT_1, FinishCondition(silent_since=seen)).recorded
    seen = store.attempts.get("a").last_heartbeat_at
    assert store.attempts.finish(attempt, EXIT_1, FinishCondition(silent_since=seen)).recorded
    assert not store.attempts.finish(never, EXIT_1, FinishCondition(silent_since=seen)).recorded


# -- relaunches --------------------------------------------------------------------------------------------------


def test_infrastructure_failures_spend_the_launches_of_the_try_and_then_it_ends(store: Store) -> None:
    attempt = submit(store)
    for launch in (1, 2):
        current = attempt.evolve(launch=launch)
        claim(store, current, f"h{launch}")
        store.attempts.start(current, f"h{launch}")
        store.attempts.launched([LaunchReport(current, "pod", "node")])
        store.submissions.mark_sent([current])
        finished = store.attempts.finish(current, EVICTED, FinishCondition(holder=f"h{launch}"))
        assert finished.relaunch is not None
        view = store.attempts.get("ti-1")
        assert (view.launch, view.state, view.try_number) == (launch + 1, TaskState.QUEUED, 1)
        assert view.holder is view.lease_until is view.started_at is view.sent_at is view.launched_at is None
        assert view.last_heartbeat_at is None
        assert (view.hostname, view.external_name, view.reason) == ("", "", None)
        assert store.completions.take(60) == []
    last = store.attempts.finish(attempt.evolve(launch=3), EVICTED)
    assert (last.recorded, last.relaunch) == (True, None)
    view = store.attempts.get("ti-1")
    assert (view.state, view.reason, view.launch) == (TaskState.FAILED, FailureReason.EVICTED, 3)
    assert event_names(store).count("relaunched") == 2
    assert [waiting.try_number for waiting in store.completions.take(60)] == [1]


@pytest.mark.parametrize("reason", [FailureReason.NON_ZERO_EXIT, FailureReason.OOM_KILLED, FailureReason.INVALID_IMAGE])
def test_other_failures_are_final_at_once(store: Store, reason: FailureReason) -> None:
    finished = store.attempts.finish(submit(store), Outcome.failed(reason, "no"))
    assert finished.relaunch is None
    assert store.attempts.get("ti-1").is_terminal


def test_a_failure_without_a_reason_is_the_users(store: Store) -> None:
    store.attempts.finish(submit(store), Outcome(TaskState.FAILED))
    assert store.attempts.get("ti-1").reason == FailureReason.NON_ZERO_EXIT


def test_reports_about_an_earlier_launch_are_late(store: Store) -> None:
    attempt = submit(store)
    guard = claim(store, attempt)
    store.attempts.finish(attempt, EVICTED, guard)
    for outcome in (EVICTED, EXIT_1, Outcome.success()):
        assert not store.attempts.finish(attempt, outcome, guard).recorded
        assert not store.attempts.finish(attempt, outcome).recorded
    assert store.attempts.get("ti-1").attempt == attempt.evolve(launch=2)
    claim(store, attempt.evolve(launch=2), "h2")


def test_threads_race_to_report_an_eviction_and_one_launch_is_spent(store: Store) -> None:
    attempt = submit(store)
    results = race(20, lambda _: store.attempts.finish(attempt, EVICTED))
    assert sum(finished.recorded for finished in results) == 1  # type: ignore[union-attr]
    assert store.attempts.get("ti-1").launch == 2


# -- what the reapers read ---------------------------------------------------------------------------------------


def test_sweeps_see_live_attempts_only(store: Store) -> None:
    silent, waiting, cancelled, unsent = (submit(store, name) for name in ("silent", "waiting", "cancelled", "unsent"))
    ended = submit(store, "ended")
    store.submissions.mark_sent([silent, waiting, cancelled, ended])
    for attempt in (silent, cancelled, ended):
        claim(store, attempt, f"h-{attempt.task_instance_id}", EXPIRED)
        store.attempts.heartbeat([Beat(attempt, f"h-{attempt.task_instance_id}")], EXPIRED)
    store.attempts.request_cancel("cancelled")
    store.attempts.finish(ended, Outcome.success())
    at_once = -1.0
    assert [view.attempt for view in store.reaper_queries.silent(at_once)] == [silent, cancelled]
    assert [view.attempt for view in store.reaper_queries.waiting(at_once)] == [waiting]
    assert [view.attempt for view in store.reaper_queries.cancelled(at_once)] == [cancelled]
    assert [view.attempt for view in store.submissions.unsent(0)] == [unsent]
    assert [
        *store.reaper_queries.silent(LEASE_SECONDS),
        *store.reaper_queries.waiting(60),
        *store.reaper_queries.cancelled(60),
    ] == []
    assert [view.attempt for view in store.reaper_queries.silent(at_once, page=1)] == [silent, cancelled]
