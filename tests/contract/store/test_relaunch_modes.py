"""``relaunch`` of a request: when the system itself starts a try again."""

from __future__ import annotations

import pytest

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.request import RelaunchMode
from leoflow_celery.domain.states import TaskState
from leoflow_celery.store import Store
from tests.contract.store.rows import EVICTED, claim, submit


def _evicted(store: Store, mode: RelaunchMode, *, started: bool, seen: bool = False) -> TaskState:
    attempt = submit(store, relaunch=mode)
    mine = claim(store, attempt)
    view = store.attempts.get("ti-1") if seen else None
    if started:
        store.attempts.start(attempt, "h1")
    store.attempts.finish(attempt, EVICTED, mine, seen=view)
    return store.attempts.get("ti-1").state


@pytest.mark.parametrize(
    ("mode", "started", "state"),
    [
        (RelaunchMode.ALWAYS, False, TaskState.QUEUED),
        (RelaunchMode.ALWAYS, True, TaskState.QUEUED),
        (RelaunchMode.BEFORE_START, False, TaskState.QUEUED),
        (RelaunchMode.BEFORE_START, True, TaskState.FAILED),
        (RelaunchMode.NEVER, False, TaskState.FAILED),
        (RelaunchMode.NEVER, True, TaskState.FAILED),
    ],
)
def test_an_evicted_try_is_started_again_as_its_request_says(
    store: Store, mode: RelaunchMode, started: bool, state: TaskState
) -> None:
    assert _evicted(store, mode, started=started) is state


def test_a_start_after_the_row_was_read_counts(store: Store) -> None:
    assert _evicted(store, RelaunchMode.BEFORE_START, started=True, seen=True) is TaskState.FAILED
    view = store.attempts.get("ti-1")
    assert (view.reason, view.attempt) == ("evicted", AttemptId("ti-1", 1, 1))
