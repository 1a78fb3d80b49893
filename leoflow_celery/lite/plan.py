"""Which task of a run is next: trigger rules and ``plan_run``, pure.

A task is decided at the first moment at which no later event could decide otherwise, so the end of a run does not
depend on the order in which its tasks happen to end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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

    ``all_success`` gives up at the first failure; everything else waits until all upstreams are done, because a
    failure that is still to come would outrank a skip.
    """
    if rule is not TriggerRule.ALL_DONE:
        hopeless = {_S.UPSTREAM_FAILED, _S.FAILED} if rule is TriggerRule.ALL_SUCCESS else {_S.UPSTREAM_FAILED}
        if not hopeless.isdisjoint(upstreams):
            return _S.UPSTREAM_FAILED
    if not TERMINAL.issuperset(upstreams):
        return None
    if not upstreams or _fires(rule, upstreams):
        return _S.SCHEDULED
    return _S.SKIPPED


def _fires(rule: TriggerRule, done: Collection[TaskState]) -> bool:
    match rule:
        case TriggerRule.ALL_SUCCESS:
            return all(state is _S.SUCCESS for state in done)
        case TriggerRule.ALL_FAILED:
            return all(state is _S.FAILED for state in done)
        case TriggerRule.ONE_SUCCESS:
            return _S.SUCCESS in done
        case TriggerRule.ONE_FAILED:
            return _S.FAILED in done
        case TriggerRule.ALL_DONE:
            return True


def run_state(states: Collection[TaskState]) -> RunState | None:
    """How a run ended, or None while a task is not done."""
    if not TERMINAL.issuperset(states):
        return None
    return RunState.FAILED if {_S.FAILED, _S.UPSTREAM_FAILED} & set(states) else RunState.SUCCESS
