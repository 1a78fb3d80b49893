"""Which task of a run is next: trigger rules and ``plan_run``, pure.

A task is decided at the first moment at which no later event could decide otherwise, so the end of a run does not
depend on the order in which its tasks happen to end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from leoflow_celery.domain.reasons import CLASS_OF, FailureClass, FailureReason
from leoflow_celery.domain.states import TERMINAL, RunState, TaskState


class TriggerRule(StrEnum):
    """What the upstreams of a task must have become for it to start."""

    ALL_SUCCESS = "all_success"
    ALL_FAILED = "all_failed"
    ALL_DONE = "all_done"
    ONE_SUCCESS = "one_success"
    ONE_FAILED = "one_failed"
    ONE_DONE = "one_done"
    NONE_FAILED = "none_failed"
    NONE_FAILED_MIN_ONE_SUCCESS = "none_failed_min_one_success"
    NONE_SKIPPED = "none_skipped"
    ALL_SKIPPED = "all_skipped"
    ALL_DONE_MIN_ONE_SUCCESS = "all_done_min_one_success"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Retries:
    """How many further tries a task has after its first, and the pause before each."""

    count: int = 0
    delay_seconds: float = 0


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """The newest try of a task, as far as planning cares."""

    state: TaskState = TaskState.NONE
    try_number: int = 1
    reason: FailureReason | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now. ``state`` is set when, after these marks, nothing is left to do."""

    start: tuple[str, ...] = ()
    #: Failed with tries left: submit the next try when its delay is over.
    retry: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    upstream_failed: tuple[str, ...] = ()
    state: RunState | None = None


class PlannedTask(Protocol):
    """The part of a task that planning reads."""

    @property
    def depends_on(self) -> Sequence[str]: ...
    @property
    def trigger_rule(self) -> TriggerRule: ...


class PlannedDag(Protocol):
    """The part of a DAG that planning reads."""

    @property
    def order(self) -> Sequence[str]: ...
    @property
    def by_id(self) -> Mapping[str, PlannedTask]: ...
    def retries_of(self, task_id: str) -> Retries: ...


_S = TaskState
_NOT_STARTED = frozenset({_S.NONE, _S.SCHEDULED})


def plan_run(dag: PlannedDag, statuses: Mapping[str, TaskStatus]) -> Plan:
    """The next steps of a run; a task that ``statuses`` does not name has not started.

    Marks go through in one call: the downstreams of a task that is marked here are decided here too.
    """
    states: dict[str, TaskState] = {}
    start, retry, skip, upstream_failed = [], [], [], []
    for task_id in dag.order:
        status = statuses.get(task_id, TaskStatus())
        state = effective_state(status, dag.retries_of(task_id))
        task = dag.by_id[task_id]
        decision = trigger(task.trigger_rule, [states[up] for up in task.depends_on]) if state in _NOT_STARTED else None
        if decision is _S.SCHEDULED:
            start.append(task_id)
        elif decision is _S.SKIPPED:
            skip.append(task_id)
        elif decision is _S.UPSTREAM_FAILED:
            upstream_failed.append(task_id)
        elif state is _S.UP_FOR_RETRY:
            retry.append(task_id)
        states[task_id] = decision or state
    return Plan(tuple(start), tuple(retry), tuple(skip), tuple(upstream_failed), run_state(states.values()))


def effective_state(status: TaskStatus, retries: Retries) -> TaskState:
    """The state of a task rather than of its newest try: failed with tries left is up_for_retry."""
    if status.state is _S.FAILED and status.try_number <= retries.count and may_retry(status.reason):
        return _S.UP_FOR_RETRY
    return status.state


def may_retry(reason: FailureReason | None) -> bool:
    """Whether another try makes sense: not after somebody cancelled it, nor when it can never work."""
    return reason is None or (reason is not FailureReason.CANCELLED and CLASS_OF[reason] is not FailureClass.CONFIG)


def trigger(rule: TriggerRule, upstreams: Collection[TaskState]) -> TaskState | None:
    """What becomes of a task that has not started: scheduled, skipped, upstream_failed, or None to wait.

    One row of ``_RULES`` says it all. A task is decided at once when no later end could decide otherwise; everything
    else waits until all upstreams are done.
    """
    if rule is TriggerRule.ALWAYS or not upstreams:
        return _S.SCHEDULED
    at_once, at_the_end = _RULES[rule]
    for state, decision in at_once.items():
        if state in upstreams:
            return decision
    return at_the_end(set(upstreams)) if TERMINAL.issuperset(upstreams) else None


_Decision = tuple[dict[TaskState, TaskState], Callable[[set[TaskState]], TaskState]]
_OK, _BAD, _SKIP, _UP, _START = _S.SUCCESS, _S.FAILED, _S.SKIPPED, _S.UPSTREAM_FAILED, _S.SCHEDULED


def _start_if(
    fires: Callable[[set[TaskState]], bool], otherwise: TaskState = _SKIP
) -> Callable[[set[TaskState]], TaskState]:
    return lambda done: _START if fires(done) else otherwise


def _start(_: set[TaskState]) -> TaskState:
    return _START


#: Rule → what one upstream in a state decides at once (the first that is found), and what they decide when all are
#: done. In the five oldest rules an upstream_failed upstream outranks all but all_done; the others are Airflow's.
_RULES: dict[TriggerRule, _Decision] = {
    TriggerRule.ALL_SUCCESS: ({_UP: _UP, _BAD: _UP}, _start_if(lambda done: done == {_OK})),
    TriggerRule.ALL_FAILED: ({_UP: _UP}, _start_if(lambda done: done == {_BAD})),
    TriggerRule.ALL_DONE: ({}, _start),
    TriggerRule.ONE_SUCCESS: ({_UP: _UP}, _start_if(lambda done: _OK in done)),
    TriggerRule.ONE_FAILED: ({_UP: _UP}, _start_if(lambda done: _BAD in done)),
    TriggerRule.ONE_DONE: ({_OK: _START, _BAD: _START}, lambda _: _SKIP),
    TriggerRule.NONE_FAILED: ({_UP: _UP, _BAD: _UP}, _start),
    TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS: ({_UP: _UP, _BAD: _UP}, _start_if(lambda done: _OK in done)),
    TriggerRule.NONE_SKIPPED: ({_SKIP: _SKIP}, _start),
    TriggerRule.ALL_SKIPPED: ({_OK: _SKIP, _BAD: _SKIP, _UP: _SKIP}, _start),
    TriggerRule.ALL_DONE_MIN_ONE_SUCCESS: ({_SKIP: _SKIP}, _start_if(lambda done: _OK in done, _UP)),
}


def run_state(states: Collection[TaskState]) -> RunState | None:
    """How a run ended, or None while a task is not done."""
    if not TERMINAL.issuperset(states):
        return None
    return RunState.FAILED if {_S.FAILED, _S.UPSTREAM_FAILED} & set(states) else RunState.SUCCESS
