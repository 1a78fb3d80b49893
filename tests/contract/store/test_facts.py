"""What a back end states is believed only about attempts that SQL gave to it, and a repeated fact changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from leoflow_celery.domain.attempt import AttemptId, LaunchReport
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import TaskState
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import FinishCondition
from leoflow_celery.store.presence import Kind
from tests.contract.store.rows import EVICTED, EXIT_1, claim, event_names, submit
from tests.support.statements import recorded

K8S, DOCKER = ExecutorType.KUBERNETES, ExecutorType.DOCKER


def report(attempt: AttemptId, back_end: str = "docker:h1", host: str = "h1") -> LaunchReport:
    return LaunchReport(attempt, "container-1", host, back_end)


# -- launches ----------------------------------------------------------------------------------------------------


def test_the_same_launch_told_again_changes_nothing(store: Store) -> None:
    attempt = submit(store, on=DOCKER)
    assert store.attempts.launched([report(attempt)], DOCKER) == {attempt}
    before = store.attempts.get("ti-1")
    assert (before.external_name, before.hostname, before.back_end) == ("container-1", "h1", "docker:h1")
    again = replace(report(attempt), external_name="other", hostname="other")
    assert store.attempts.launched([again], DOCKER) == {attempt}
    assert store.attempts.get("ti-1") == before


@pytest.mark.parametrize(
    ("back_end", "speaker"),
    [
        ("docker:h2", DOCKER),
        ("docker:h2", None),
        ("kubernetes", K8S),
        ("kubernetes", DOCKER),
        ("docker:h1", K8S),
        ("", K8S),
        ("subprocess", None),
    ],
)
def test_another_back_end_tells_nothing_about_a_launch(
    store: Store, back_end: str, speaker: ExecutorType | None
) -> None:
    attempt = submit(store, on=DOCKER)
    store.attempts.launched([report(attempt)])
    before = store.attempts.get("ti-1")
    assert store.attempts.launched([report(attempt, back_end, "foreign")], speaker) == frozenset()
    assert store.attempts.get("ti-1") == before


@pytest.mark.parametrize(("back_end", "speaker"), [("kubernetes", None), ("kubernetes", DOCKER), ("", K8S)])
def test_an_attempt_of_another_executor_was_not_launched(
    store: Store, back_end: str, speaker: ExecutorType | None
) -> None:
    attempt = submit(store, on=DOCKER)
    assert store.attempts.launched([report(attempt, back_end)], speaker) == frozenset()
    assert store.attempts.get("ti-1").launched_at is None


def test_a_try_that_is_bound_to_one_host_is_launched_by_that_host_only(store: Store) -> None:
    store.presence.keep_present(Kind.BACK_END, "docker:h1")
    attempt = submit(store, on=DOCKER, staging_claim="claim-1")
    assert store.attempts.launched([report(attempt, "docker:h2")]) == frozenset()
    assert store.attempts.launched([report(attempt, "docker:h1")]) == {attempt}


# -- ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [Outcome.success(), EXIT_1, EVICTED], ids=lambda one: one.state)
@pytest.mark.parametrize(
    ("executor", "back_end"), [("kubernetes", None), ("kubernetes", "kubernetes"), ("docker", "docker:h2")]
)
@pytest.mark.parametrize("is_seen", [False, True])
def test_another_back_end_ends_nothing(
    store: Store, outcome: Outcome, executor: str, back_end: str | None, is_seen: bool
) -> None:
    attempt = submit(store, on=DOCKER)
    store.attempts.launched([report(attempt)])
    before = store.attempts.get("ti-1")
    condition = FinishCondition(executor=executor, back_end=back_end)
    finished = store.attempts.finish(attempt, outcome, condition, seen=before if is_seen else None)
    assert (finished.recorded, finished.relaunch, finished.view) == (False, None, before)
    assert store.attempts.get("ti-1") == before
    assert event_names(store) == ["submitted", "late_report"]


@pytest.mark.parametrize("is_launched", [False, True])
def test_the_back_end_that_runs_it_ends_it_also_before_anybody_told_where_it_runs(
    store: Store, is_launched: bool
) -> None:
    attempt = submit(store, on=DOCKER)
    if is_launched:
        store.attempts.launched([report(attempt)])
    condition = FinishCondition(unclaimed=True, executor="docker", back_end="docker:h1")
    assert store.attempts.finish(attempt, EXIT_1, condition).recorded


def test_a_host_ends_nothing_that_waits_in_the_queue_of_another(store: Store) -> None:
    store.presence.keep_present(Kind.BACK_END, "docker:h1")
    attempt = submit(store, on=DOCKER, staging_claim="claim-1")
    assert not store.attempts.finish(attempt, EXIT_1, FinishCondition(back_end="docker:h2")).recorded
    assert store.attempts.finish(attempt, EXIT_1, FinishCondition(back_end="docker:h1")).recorded


# -- rows are read once ------------------------------------------------------------------------------------------


def counts(statements: list[tuple[str, object]]) -> tuple[int, int]:
    """How many statements read tries, and how many write them."""
    reads = [text for text, _ in statements if text.startswith("SELECT") and "FROM task_instance" in text]
    writes = [text for text, _ in statements if text.startswith("UPDATE task_instance")]
    return len(reads), len(writes)


@pytest.mark.parametrize("outcome", [Outcome.success(), EXIT_1, EVICTED], ids=lambda one: one.state)
def test_an_end_of_a_try_that_was_read_is_one_statement(store: Store, outcome: Outcome) -> None:
    attempt = submit(store)
    seen = store.attempts.get("ti-1")
    with recorded(store) as statements:
        finished = store.attempts.finish(attempt, outcome, seen=seen)
    assert counts(statements) == (0, 1)
    assert finished.view == store.attempts.get("ti-1")


def test_a_late_end_of_a_try_that_was_read_reads_nothing(store: Store) -> None:
    attempt = submit(store)
    store.attempts.finish(attempt, Outcome.success())
    seen = store.attempts.get("ti-1")
    with recorded(store) as statements:
        finished = store.attempts.finish(attempt, EXIT_1, seen=seen)
    assert counts(statements) == (0, 0)
    assert (finished.recorded, finished.view) == (False, seen)


def test_an_end_without_a_look_before_reads_the_row_once(store: Store) -> None:
    for number, outcome in enumerate((EXIT_1, EVICTED)):
        attempt = submit(store, f"ti-{number}")
        claim(store, attempt)
        with recorded(store) as statements:
            assert not store.attempts.finish(attempt, outcome, FinishCondition(holder="h2")).recorded
        assert counts(statements) == (1, 1)
        with recorded(store) as statements:
            assert store.attempts.finish(attempt, outcome, FinishCondition(holder="h1")).recorded
        assert counts(statements) == (1, 1)


def test_a_cancellation_after_the_look_is_not_forgotten(store: Store) -> None:
    attempt = submit(store)
    condition = claim(store, attempt)
    seen = store.attempts.get("ti-1")
    store.attempts.request_cancel("ti-1")
    finished = store.attempts.finish(attempt, EVICTED, condition, seen=seen)
    assert finished.relaunch is None
    assert finished.view is not None
    assert (finished.view.state, finished.view.reason) == (TaskState.FAILED, "cancelled")


def test_a_cancellation_reads_nothing_that_its_write_returned(store: Store) -> None:
    submit(store, "queued")
    claim(store, submit(store, "held"))
    for name, writes in (("queued", 2), ("held", 1)):
        with recorded(store) as statements:
            view = store.attempts.request_cancel(name)
        assert counts(statements) == (0, writes)
        assert view == store.attempts.get(name)
