"""``watch_run``: what happens in a run that somebody else drives, as the events that its driver would give."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from leoflow_celery.lite.dag import Dag
from leoflow_celery.lite.plan import TaskStatus, effective_state
from leoflow_celery.domain.reasons import parse_reason
from leoflow_celery.domain.states import TERMINAL, TERMINAL_RUN, RunState, TaskState
from leoflow_celery.lite.driver import RunEvent, RunFinished, RunStarted, TaskChanged, Waiting
from leoflow_celery.lite.driver import RunRecord, TryRecord
from leoflow_celery.lite.driver import Pace
from leoflow_celery.errors import NotFound, Unavailable


class WatchedTry(TryRecord, Protocol):
    """A try, and the database's time when it was read."""

    @property
    def read_at(self) -> float: ...


class WatchClient(Protocol):
    """The part of the client that watching needs."""

    def run(self, dag_id: str, run_id: str, tenant_id: str = "default") -> RunRecord: ...
    def cleared(self, dag_id: str, run_id: str, tenant_id: str = "default") -> Mapping[str, int]: ...
    def task_instances(self, dag_id: str, run_id: str, tenant_id: str = "default") -> Sequence[WatchedTry]: ...


def watch_run(
    client: WatchClient,
    dag_id: str,
    run_id: str,
    on_event: Callable[[RunEvent], None],
    *,
    dag: Dag | None = None,
    tenant_id: str = "default",
    pace: Pace | None = None,
) -> RunState:
    """Block until the run has ended, and return how; a system that is away is waited for.

    ``dag`` tells which failure has tries left. A run without a record ends when every try that it has ended.
    """
    pace = pace or Pace(poll_seconds=0.5, pause=time.sleep)
    shown: dict[str, tuple[int, TaskState]] = {}
    on_event(RunStarted(dag_id, run_id, tenant_id, resumed=True))
    while True:
        try:
            state = _run_state(client, dag_id, run_id, tenant_id)
            cleared = client.cleared(dag_id, run_id, tenant_id)
            records = client.task_instances(dag_id, run_id, tenant_id)
        except Unavailable as error:
            on_event(Waiting(str(error)))
            pace.pause(pace.busy_seconds)
            continue
        for record in records:
            change = _change(record, cleared.get(record.task_id, 0), dag)
            if shown.get(change.task_id) != (change.try_number, change.state):
                shown[change.task_id] = (change.try_number, change.state)
                on_event(change)
        if state is None and all(record.state in TERMINAL for record in records):
            state = RunState.FAILED if {record.state for record in records} - _GOOD else RunState.SUCCESS
        if state in TERMINAL_RUN:
            on_event(RunFinished(state))
            return state
        pace.pause(pace.poll_seconds)


_GOOD = frozenset({TaskState.SUCCESS, TaskState.SKIPPED})


def _run_state(client: WatchClient, dag_id: str, run_id: str, tenant_id: str) -> RunState | None:
    try:
        return client.run(dag_id, run_id, tenant_id).state
    except NotFound:
        return None


def _change(record: WatchedTry, last_cleared: int, dag: Dag | None) -> TaskChanged:
    if record.try_number <= last_cleared:
        return TaskChanged(record.task_id, TaskState.NONE, record.try_number + 1)
    state = record.state
    if dag is not None and record.task_id in dag.by_id:
        reason = parse_reason(record.reason) if record.reason else None
        status = TaskStatus(record.state, record.try_number - last_cleared, reason)
        state = effective_state(status, dag.retries_of(record.task_id))
    seconds = None
    if record.started_at is not None:
        seconds = (record.read_at if record.ended_at is None else record.ended_at) - record.started_at
    return TaskChanged(record.task_id, state, record.try_number, record.reason, record.message, seconds)
