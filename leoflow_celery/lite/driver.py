"""``RunDriver`` drives one run to its end; ``watch_run`` tells of a run that somebody else drives. Both give events.

All the driver's knowledge is read back from the client at every step, so a driver that was killed loses nothing: start
it again with the same run id. Submitting a try twice starts it once, which makes every step safe to repeat. What it
uses of the client are ports, so that a scripted client (``testing.scripted``) can take its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from leoflow_celery.domain.reasons import parse_reason
from leoflow_celery.domain.request import TaskRequest, check_size
from leoflow_celery.domain.states import TERMINAL, TERMINAL_RUN, RunState, TaskState
from leoflow_celery.errors import AtCapacity, InvalidRequest, NotFound, Unavailable
from leoflow_celery.lite.dag import Dag, task_request
from leoflow_celery.lite.plan import Plan, TaskStatus, effective_state, plan_run


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The run exists. ``resumed``: an earlier driver had started it. ``ended``: and it has ended since.

    ``watched``: somebody else drives it.
    """

    dag_id: str
    run_id: str
    tenant_id: str
    resumed: bool
    ended: bool = False
    watched: bool = False


@dataclass(frozen=True, slots=True)
class TaskChanged:
    """A task has a new state. ``up_for_retry``: failed with tries left; ``none``: cleared and not started since."""

    task_id: str
    state: TaskState
    try_number: int
    reason: str | None = None
    message: str = ""
    #: Seconds the user's code ran, once it ended; for who watches a run, also how long it has been running.
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RetryPlanned:
    """The next try of a failed task starts in ``delay_seconds``."""

    task_id: str
    try_number: int
    delay_seconds: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """The system is away or full; the driver tries again. ``why`` is the error's sentence."""

    why: str


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The run has ended."""

    state: RunState


RunEvent = RunStarted | TaskChanged | RetryPlanned | Waiting | RunFinished


class RunRecord(Protocol):
    """A run as the client shows it."""

    @property
    def state(self) -> RunState: ...


class TryRecord(Protocol):
    """The newest try of a task as the client shows it. Times are seconds since the epoch."""

    @property
    def task_instance_id(self) -> str: ...
    @property
    def task_id(self) -> str: ...
    @property
    def try_number(self) -> int: ...
    @property
    def state(self) -> TaskState: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def message(self) -> str: ...
    @property
    def started_at(self) -> float | None: ...
    @property
    def ended_at(self) -> float | None: ...


class RunClient(Protocol):
    """Submits tries, shows their states, and keeps the run's own state."""

    def create_run(
        self, dag_id: str, run_id: str, tenant_id: str = "default", dag_version: str = "", dag: Dag | None = None
    ) -> RunRecord: ...
    def run(self, dag_id: str, run_id: str, tenant_id: str = "default") -> RunRecord: ...
    def finish_run(self, dag_id: str, run_id: str, state: RunState, tenant_id: str = "default") -> object: ...
    def task_instances(self, dag_id: str, run_id: str, tenant_id: str = "default") -> Sequence[TryRecord]: ...
    def cleared(self, dag_id: str, run_id: str, tenant_id: str = "default") -> Mapping[str, int]: ...
    def submit_many(self, requests: Sequence[TaskRequest]) -> object: ...
    def mark(self, request: TaskRequest, state: TaskState) -> object: ...
    def cancel(self, task_instance_id: str, try_number: int | None = None) -> bool: ...


@dataclass(frozen=True, slots=True)
class Pace:
    """How often the driver looks, and how long it puts up with a system that is away. In seconds."""

    poll_seconds: float = 0.2
    #: Between tries while the system is away or full.
    busy_seconds: float = 1.0
    #: A broker or database that is away for longer ends the driver, not the run.
    outage_seconds: float = 60.0
    clock: Callable[[], float] = time.time
    pause: Callable[[float], None] = time.sleep


Records = Mapping[str, TryRecord]
_LIVE = frozenset({TaskState.QUEUED, TaskState.RUNNING})


class RunDriver:
    """One run of one DAG. ``run`` blocks until it ended; ``on_event`` is called in the same thread."""

    def __init__(
        self,
        client: RunClient,
        dag: Dag,
        run_id: str,
        *,
        tenant_id: str = "default",
        on_event: Callable[[RunEvent], None] = lambda _event: None,
        pace: Pace | None = None,
    ) -> None:
        """Build every request now: one that cannot be sent is found before anything starts.

        Raises:
            InvalidRequest: a task cannot travel as a request; names the task and the field.
        """
        self._client, self._dag, self._run_id, self._tenant_id = client, dag, run_id, tenant_id
        self._emit, self._pace = on_event, pace or Pace()
        self._requests = {task_id: task_request(dag, task_id, run_id, tenant_id=tenant_id) for task_id in dag.by_id}
        self._check_sizes()
        self._shown: dict[str, tuple[int, TaskState]] = {}
        self._retry_at: dict[tuple[str, int], float] = {}
        self._unsent: dict[tuple[str, int], TaskRequest] = {}
        self._cleared: Mapping[str, int] = {}

    def run(self) -> RunState:
        """Drive the run to its end and return how it ended.

        A run that has ended already is only reported.

        Raises:
            Unavailable: broker or database were away at the start, or for longer than the pace allows. The run is
                as it was; start the driver again.
            InvalidRequest: the system refused a task, for an inline timeout above its cap for example. What ran was
                cancelled, and the run has failed.
        """
        ended = self._open()
        if ended is not None:
            return ended
        away_since: float | None = None
        while True:
            try:
                state = self._step()
            except (Unavailable, AtCapacity) as error:
                away_since = self._wait_out(error, away_since)
                continue
            except InvalidRequest:
                with suppress(Unavailable):  # then the run is as it was, and whoever goes on with it comes here again
                    self.cancel()
                raise
            if state is not None:
                return state
            away_since = None
            self._pace.pause(self._until_next_look())

    def cancel(self, grace_seconds: float = 15.0) -> None:
        """Cancel every live try, wait until they have ended (at most the grace), and end the run as failed."""
        deadline = self._pace.clock() + grace_seconds
        live = self._live()
        for record in live:
            self._client.cancel(record.task_instance_id, record.try_number)
        while live and self._pace.clock() < deadline:
            self._pace.pause(self._pace.poll_seconds)
            live = self._live()
        self._finish(RunState.FAILED)

    def _open(self) -> RunState | None:
        resumed = True
        try:
            state = self._client.run(self._dag.dag_id, self._run_id, self._tenant_id).state
        except NotFound:
            resumed = False
            version = self._dag.dag_version
            state = self._client.create_run(self._dag.dag_id, self._run_id, self._tenant_id, version, self._dag).state
        records = self._read() if state in TERMINAL_RUN else {}
        # Another driver may have ended the run after a clear had opened it.
        has_cleared = any(self._is_cleared(record) for record in records.values())
        has_ended = state in TERMINAL_RUN and not has_cleared
        self._emit(RunStarted(self._dag.dag_id, self._run_id, self._tenant_id, resumed, ended=has_ended))
        if has_cleared:
            self._open_again()
        if not has_ended:
            return None
        self._show(records)
        self._emit(RunFinished(state))
        return state

    def _step(self) -> RunState | None:
        records = self._read()
        self._show(records)
        plan = self._plan(records)
        self._mark(plan.skip, TaskState.SKIPPED, records)
        self._mark(plan.upstream_failed, TaskState.UPSTREAM_FAILED, records)
        self._plan_retries([records[task_id] for task_id in plan.retry])
        tries = [(task_id, self._next_try(task_id, records)) for task_id in plan.start]
        now = self._pace.clock()
        tries += [(task_id, tried + 1) for (task_id, tried), due_at in self._retry_at.items() if due_at <= now]
        self._submit(tries)
        if plan.state is None or not self._end(plan.state):
            return None
        return plan.state

    def _plan(self, records: Records) -> Plan:
        return plan_run(self._dag, {task_id: self._status(record) for task_id, record in records.items()})

    def _end(self, state: RunState) -> bool:
        """End the run, unless a task was cleared meanwhile: then the run goes on."""
        self._client.finish_run(self._dag.dag_id, self._run_id, state, self._tenant_id)
        if self._plan(self._read()).state is None:
            self._open_again()
            return False
        self._emit(RunFinished(state))
        return True

    def _open_again(self) -> None:
        self._client.create_run(self._dag.dag_id, self._run_id, self._tenant_id, self._dag.dag_version, self._dag)

    def _submit(self, tries: Iterable[tuple[str, int]]) -> None:
        # What could not be sent is remembered: its row may exist already, and then no plan would name it again.
        self._unsent |= {key: self._requests[key[0]].evolve(try_number=key[1]) for key in tries}
        if not self._unsent:
            return
        try:
            self._client.submit_many(list(self._unsent.values()))
        except AtCapacity:
            self._submit_while_there_is_room()
        self._unsent.clear()

    def _submit_while_there_is_room(self) -> None:
        """One by one: all at once may be more than the queue's whole limit."""
        for key, request in list(self._unsent.items()):
            self._client.submit_many([request])
            del self._unsent[key]

    def _mark(self, task_ids: Iterable[str], state: TaskState, records: Records) -> None:
        for task_id in task_ids:
            try_number = self._next_try(task_id, records)
            self._client.mark(self._requests[task_id].evolve(try_number=try_number), state)
            self._show_task(TaskChanged(task_id, state, try_number))

    def _next_try(self, task_id: str, records: Records) -> int:
        """The first try of a task that has not started; of one that was cleared, the one after its last."""
        record = records.get(task_id)
        if record is None:
            return 1
        return record.try_number + self._is_cleared(record)

    def _is_cleared(self, record: TryRecord) -> bool:
        return record.try_number <= self._cleared.get(record.task_id, 0)

    def _status(self, record: TryRecord) -> TaskStatus:
        """As planning sees it: tries that were cleared do not count, neither as an end nor as a retry."""
        if self._is_cleared(record):
            return TaskStatus()
        reason = parse_reason(record.reason) if record.reason else None
        return TaskStatus(record.state, record.try_number - self._cleared.get(record.task_id, 0), reason)

    def _plan_retries(self, failed: Iterable[TryRecord]) -> None:
        """Set the time of each next try, counted from the end of the last one, whichever driver saw it."""
        known, self._retry_at = self._retry_at, {}
        for record in failed:
            key = (record.task_id, record.try_number)
            due_at = known.get(key)
            if due_at is None:
                ended_at = self._pace.clock() if record.ended_at is None else record.ended_at
                due_at = ended_at + self._dag.retries_of(record.task_id).delay_seconds
                delay = max(0.0, due_at - self._pace.clock())
                self._emit(RetryPlanned(record.task_id, record.try_number + 1, delay))
            self._retry_at[key] = due_at

    def _until_next_look(self) -> float:
        now = self._pace.clock()
        return min([self._pace.poll_seconds, *(due_at - now for due_at in self._retry_at.values() if due_at > now)])

    def _wait_out(self, error: Unavailable | AtCapacity, away_since: float | None) -> float | None:
        if isinstance(error, AtCapacity):
            away_since = None  # it answered; a full queue is waited for as long as it takes
        else:
            away_since = self._pace.clock() if away_since is None else away_since
            if self._pace.clock() - away_since >= self._pace.outage_seconds:
                raise error
        self._emit(Waiting(str(error)))
        self._pace.pause(self._pace.busy_seconds)
        return away_since

    def _finish(self, state: RunState) -> None:
        self._client.finish_run(self._dag.dag_id, self._run_id, state, self._tenant_id)
        self._emit(RunFinished(state))

    def _read(self) -> Records:
        # First: a clear in between is seen at the next step, and no new try is taken for a cleared one.
        self._cleared = self._client.cleared(self._dag.dag_id, self._run_id, self._tenant_id)
        found = self._client.task_instances(self._dag.dag_id, self._run_id, self._tenant_id)
        return {record.task_id: record for record in found if record.task_id in self._dag.by_id}

    def _live(self) -> list[TryRecord]:
        records = self._read()
        self._show(records)
        return [record for record in records.values() if record.state in _LIVE]

    def _show(self, records: Records) -> None:
        for task_id, record in records.items():
            if self._is_cleared(record):
                continue
            state = effective_state(self._status(record), self._dag.retries_of(task_id))
            seconds = None
            if record.started_at is not None and record.ended_at is not None:
                seconds = record.ended_at - record.started_at
            self._show_task(TaskChanged(task_id, state, record.try_number, record.reason, record.message, seconds))

    def _show_task(self, change: TaskChanged) -> None:
        news = (change.try_number, change.state)
        if self._shown.get(change.task_id) != news:
            self._shown[change.task_id] = news
            self._emit(change)

    def _check_sizes(self) -> None:
        source_bytes = len(self._dag.source.encode())
        for request in self._requests.values():
            check_size(len(request.model_dump_json(exclude={"source"})) + source_bytes)


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
    on_event(RunStarted(dag_id, run_id, tenant_id, resumed=True, watched=True))
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
