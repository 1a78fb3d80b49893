"""The table of legal transitions: what it must allow, and what nothing may ever do."""

from __future__ import annotations

import itertools

import pytest

from leoflow_celery.domain.states import (
    TERMINAL,
    TERMINAL_RUN,
    TRANSITIONS,
    RunState,
    TaskState,
    can_transition,
    sources_of,
)

S = TaskState


def test_the_names_are_the_contracts() -> None:
    assert [state.value for state in TaskState] == [
        "none",
        "scheduled",
        "queued",
        "running",
        "success",
        "failed",
        "skipped",
        "upstream_failed",
        "up_for_retry",
        "up_for_reschedule",  # of the newer agent protocol
    ]
    assert [state.value for state in RunState] == ["queued", "running", "success", "failed"]
    assert {RunState.SUCCESS, RunState.FAILED} == TERMINAL_RUN


def test_every_state_has_a_row() -> None:
    assert set(TRANSITIONS) == set(TaskState)


@pytest.mark.parametrize(("terminal", "other"), list(itertools.product(sorted(TERMINAL), TaskState)))
def test_a_terminal_state_is_final(terminal: TaskState, other: TaskState) -> None:
    assert not can_transition(terminal, other)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (S.NONE, S.QUEUED),
        (S.SCHEDULED, S.QUEUED),
        (S.QUEUED, S.RUNNING),
        (S.RUNNING, S.SUCCESS),
        (S.RUNNING, S.FAILED),
        (S.QUEUED, S.FAILED),
        (S.QUEUED, S.SUCCESS),  # the report of RUNNING was lost
        (S.RUNNING, S.QUEUED),  # relaunch
        (S.QUEUED, S.QUEUED),  # relaunch before it ran
        (S.RUNNING, S.RUNNING),  # another holder after a lost lease
    ],
)
def test_what_happens_in_a_tasks_life_is_legal(before: TaskState, after: TaskState) -> None:
    assert can_transition(before, after)


@pytest.mark.parametrize(
    ("before", "after"),
    [(S.NONE, S.RUNNING), (S.NONE, S.SUCCESS), (S.SCHEDULED, S.SUCCESS), (S.QUEUED, S.UPSTREAM_FAILED)],
)
def test_nothing_skips_the_queue(before: TaskState, after: TaskState) -> None:
    assert not can_transition(before, after)


@pytest.mark.parametrize("state", TaskState)
def test_sources_are_the_table_read_backwards(state: TaskState) -> None:
    assert set(sources_of(state)) == {before for before in TaskState if can_transition(before, state)}


@pytest.mark.parametrize("state", sorted(set(TaskState) - TERMINAL))
def test_every_state_that_is_not_terminal_can_still_end(state: TaskState) -> None:
    reached = {state}
    while more := set().union(*(TRANSITIONS[one] for one in reached)) - reached:
        reached |= more
    assert reached & TERMINAL
