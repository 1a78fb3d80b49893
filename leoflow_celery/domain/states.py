"""Task and run states and the transitions that are legal between them.

The names are Leoflow's. One ``task_instance`` row is one *try*: a terminal state is final for that row, and the
scheduler's retry is a new row with the next try number.
"""

from __future__ import annotations

from enum import StrEnum


class TaskState(StrEnum):
    """Where one try of a task stands."""

    NONE = "none"
    SCHEDULED = "scheduled"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCESS = "success"
    FAILED = "failed"
    SKIPPED = "skipped"
    UPSTREAM_FAILED = "upstream_failed"
    UP_FOR_RETRY = "up_for_retry"
    #: What an agent reports of a task that released its place until later; the row is queued again at once.
    UP_FOR_RESCHEDULE = "up_for_reschedule"


class RunState(StrEnum):
    """Where one run of a DAG stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCESS = "success"
    FAILED = "failed"


TERMINAL = frozenset({TaskState.SUCCESS, TaskState.FAILED, TaskState.SKIPPED, TaskState.UPSTREAM_FAILED})
TERMINAL_RUN = frozenset({RunState.SUCCESS, RunState.FAILED})

_S = TaskState
#: from → to. QUEUED and RUNNING reach QUEUED again by a relaunch (launch + 1); QUEUED reaches SUCCESS when the report
#: of RUNNING was lost on the way.
TRANSITIONS: dict[TaskState, frozenset[TaskState]] = {
    _S.NONE: frozenset({_S.SCHEDULED, _S.QUEUED, _S.SKIPPED, _S.UPSTREAM_FAILED}),
    _S.SCHEDULED: frozenset({_S.QUEUED, _S.SKIPPED, _S.UPSTREAM_FAILED, _S.FAILED}),
    _S.QUEUED: frozenset({_S.QUEUED, _S.RUNNING, _S.SUCCESS, _S.FAILED, _S.SKIPPED}),
    _S.RUNNING: frozenset({_S.QUEUED, _S.RUNNING, _S.SUCCESS, _S.FAILED, _S.SKIPPED}),
    _S.UP_FOR_RETRY: frozenset({_S.SCHEDULED, _S.QUEUED}),
    _S.UP_FOR_RESCHEDULE: frozenset({_S.QUEUED}),
    _S.SUCCESS: frozenset(),
    _S.FAILED: frozenset(),
    _S.SKIPPED: frozenset(),
    _S.UPSTREAM_FAILED: frozenset(),
}


def can_transition(from_state: TaskState, to_state: TaskState) -> bool:
    """Whether a row may go from one state to the other."""
    return to_state in TRANSITIONS[from_state]


def sources_of(to_state: TaskState) -> tuple[TaskState, ...]:
    """The states a compare-and-set towards ``to_state`` may start from."""
    return tuple(state for state in TaskState if to_state in TRANSITIONS[state])
