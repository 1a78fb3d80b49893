"""All SQL on ``task_instance``: whoever reads or writes tries does it with a statement from here.

Building a statement in SQLAlchemy costs more than running it on SQLite, so what every task executes is made once, with
named parameters. Parameters are prefixed with ``p_``: plain column names belong to the VALUES clause. Statements that
return tries return whole rows: nobody has to read again what a write left behind.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum
from functools import cache
from typing import Any

import sqlalchemy as sa

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.states import TERMINAL, TaskState, sources_of
from leoflow_celery.store.models import LIVE, DatabaseTime, TaskCompletion, TaskInstance, table_of
from leoflow_celery.store.views import needs_host

TABLE = table_of(TaskInstance)
_T = TABLE.c
_TASK = ("tenant_id", "dag_id", "run_id", "task_id")
_RUN = ("tenant_id", "dag_id", "run_id")
_END_COLUMNS = ("state", "reason", "message", "exit_code", "last_event", "log_tail", "ended_at")
_CLEARED = ("holder", "lease_until", "last_heartbeat_at", "sent_at", "launched_at", "started_at")
#: The longest waiting first; the ids make the order total.
_ORDER = (_T.queued_at, _T.task_instance_id, _T.try_number)

Condition = sa.ColumnElement[bool]
Rows = sa.Select[*tuple[Any, ...]]


class ClaimMode(Enum):
    """Why a claim may be given: nobody has it, the same holder asks again, or its holder's lease ran out."""

    UNCLAIMED = "unclaimed"
    SAME_HOLDER = "same_holder"
    EXPIRED = "expired"


# -- conditions --------------------------------------------------------------------------------------------------------


def attempt_parameters(attempt: AttemptId) -> dict[str, object]:
    """What ``is_attempt`` compares with."""
    return {"p_ti": attempt.task_instance_id, "p_try": attempt.try_number, "p_launch": attempt.launch}


def is_live() -> Condition:
    """The condition the partial index on live rows was made for."""
    # Without a type: as a Boolean it would become "(…) = 1" on SQLite, and that no partial index serves.
    return sa.literal_column(f"(task_instance.{LIVE.text})")


def of_try(table: sa.Table) -> Condition:
    """Rows of the try ``p_ti``, ``p_try`` in any table that has its ids."""
    return sa.and_(table.c.task_instance_id == sa.bindparam("p_ti"), table.c.try_number == sa.bindparam("p_try"))


def _is_attempt() -> Condition:
    """The row is this try and stands at this launch."""
    return sa.and_(of_try(TABLE), _T.launch == sa.bindparam("p_launch"))


def _needs_host() -> Condition:
    condition: Condition = needs_host(_T.executor, _T.staging_claim, _T.queue_name)
    return condition


def _has_ended() -> Condition:
    return _T.state.in_([state.value for state in TERMINAL])


def _from_states(to_state: TaskState) -> Condition:
    return _T.state.in_([state.value for state in sources_of(to_state) if state not in TERMINAL])


def _runs_at() -> Condition:
    """The attempt was given to ``p_back_end``: it runs there, or nobody told yet and its queue leads there.

    ``p_back_end_queue`` is the queue of that back end alone.
    """
    is_own_queue = sa.or_(_T.queue_name == "", _T.queue_name == sa.bindparam("p_back_end_queue"))
    return sa.or_(_T.back_end == sa.bindparam("p_back_end"), sa.and_(_T.back_end == "", is_own_queue))


def ended_try(task_instance_id: sa.ColumnElement[str], try_number: sa.ColumnElement[int]) -> Condition:
    """There is such a try, and it has ended."""
    return sa.exists().where(_T.task_instance_id == task_instance_id, _T.try_number == try_number, _has_ended())


def any_of_run(run: sa.FromClause) -> Condition:
    """There is a try of a run, which ``run`` has the columns of."""
    return sa.exists().where(*(_T[name] == run.c[name] for name in _RUN))


def is_mounted(claim_name: sa.ColumnElement[str]) -> Condition:
    """A live try mounts the staging volume."""
    return claim_name.in_(sa.select(_T.staging_claim).where(is_live()))


# -- reading one try ---------------------------------------------------------------------------------------------------


@cache
def select_try(newest: bool) -> Rows:
    """A row by ``p_ti``, and by ``p_try`` unless the newest try is asked for."""
    query = sa.select(TABLE).where(_T.task_instance_id == sa.bindparam("p_ti"))
    if newest:
        return query.order_by(_T.try_number.desc()).limit(1)
    return query.where(_T.try_number == sa.bindparam("p_try"))


@cache
def lock_try() -> Rows:
    """The row of a try, which nobody changes until the transaction ends."""
    return select_try(newest=False).with_for_update()


@cache
def select_ended() -> Rows:
    """The rows of those tries of the task instances ``p_ids`` that are over."""
    return sa.select(TABLE).where(_T.task_instance_id.in_(sa.bindparam("p_ids", expanding=True)), _has_ended())


# -- submitting --------------------------------------------------------------------------------------------------------


def insert_tries(insert: Any) -> Any:
    """Insert tries that are not there; returns the ids of those that were inserted, each with ``_runs_again``.

    ``insert`` is ``Database.insert``. The caller keeps the statement.
    """
    statement = insert(TABLE).on_conflict_do_nothing()
    return statement.returning(_T.task_instance_id, _T.try_number, _runs_again())


def _runs_again() -> sa.ColumnElement[bool]:
    """Whether another task instance of the same task and run was there before the inserted row."""
    other = TABLE.alias("other")
    # As text: what RETURNING asks of the inserted row would become another FROM of the subquery.
    inserted: dict[str, sa.ColumnElement[str]] = {
        name: sa.literal_column(f"task_instance.{name}") for name in (*_TASK, "task_instance_id")
    }
    same_task = (other.c[name] == inserted[name] for name in _TASK)
    return sa.exists().where(*same_task, other.c.task_instance_id != inserted["task_instance_id"]).label("runs_again")


@cache
def supersede(named: bool) -> sa.Executable:
    """End the live tries that have a newer try, at ``p_now``: of the task instances ``p_ids``, or of all."""
    newer = TABLE.alias("newer")
    is_older = sa.exists().where(newer.c.task_instance_id == _T.task_instance_id, newer.c.try_number > _T.try_number)
    update = sa.update(TABLE).where(is_live(), is_older)
    if named:
        update = update.where(_T.task_instance_id.in_(sa.bindparam("p_ids", expanding=True)))
    return update.values(
        state=sa.bindparam("p_state"),
        reason=sa.bindparam("p_reason"),
        message=sa.bindparam("p_message"),
        ended_at=sa.bindparam("p_now"),
    ).returning(_T.task_instance_id, _T.try_number, _T.launch)


@cache
def mark_sent() -> sa.Executable:
    """The broker has the message of the attempt since ``p_now``."""
    return sa.update(TABLE).where(_is_attempt()).values(sent_at=sa.bindparam("p_now"))


@cache
def set_queue() -> sa.Executable:
    """The message of the try goes to ``p_queue``."""
    return sa.update(TABLE).where(of_try(TABLE)).values(queue_name=sa.bindparam("p_queue"))


def unsent(now: float, grace_seconds: float, limit: int) -> Rows:
    """Unclaimed tries whose message is due and was not sent."""
    is_due = sa.and_(_T.holder.is_(None), _T.sent_at.is_(None), ~_needs_host(), _T.send_after <= now)
    is_old = sa.or_(_T.launch > 1, _T.queued_at <= now - grace_seconds)
    return sa.select(TABLE).where(is_live(), is_due, is_old).order_by(_T.queued_at).limit(limit)


def unplaced(queued_before: float, limit: int) -> Rows:
    """Tries that wait for a host of their staging volume, queued before that."""
    waiting = sa.and_(is_live(), _needs_host(), _T.queued_at <= queued_before)
    return sa.select(TABLE).where(waiting).order_by(_T.queued_at).limit(limit)


def unplaced_claims(limit: int) -> Rows:
    """The staging volumes that tries wait for: their ids and its name."""
    columns = sa.select(_T.task_instance_id, _T.try_number, _T.staging_claim)
    return columns.where(is_live(), _needs_host()).order_by(_T.queued_at).limit(limit)


@cache
def release_queue() -> sa.Executable:
    """Live tries that mount the staging volume ``p_claim`` wait for another host."""
    return (
        sa.update(TABLE)
        .where(is_live(), _T.staging_claim == sa.bindparam("p_claim"))
        .values(
            queue_name="",
            # A message that is in the queue of the host that is gone counts as never sent.
            sent_at=sa.case((_T.holder.is_(None), sa.null()), else_=_T.sent_at),
        )
    )


# -- claims and heartbeats ---------------------------------------------------------------------------------------------


@cache
def claim(mode: ClaimMode, start: bool) -> sa.Executable:
    """Give the attempt to ``p_holder`` on ``p_hostname`` until ``p_until``; ``start`` makes it running at ``p_now``."""
    newer = TABLE.alias("newer")
    superseded = sa.exists().where(
        newer.c.task_instance_id == sa.bindparam("p_ti"), newer.c.try_number > sa.bindparam("p_try")
    )
    condition = {
        ClaimMode.UNCLAIMED: _T.holder.is_(None),
        ClaimMode.SAME_HOLDER: _T.holder == sa.bindparam("p_holder"),
        ClaimMode.EXPIRED: _T.lease_until < sa.bindparam("p_now"),
    }[mode]
    now: sa.BindParameter[float] = sa.bindparam("p_now")
    values: dict[str, object] = {
        "holder": sa.bindparam("p_holder"),
        "hostname": sa.bindparam("p_hostname"),
        "lease_until": sa.bindparam("p_until"),
    }
    if start:
        # This holder lives in the worker that writes its heartbeats, so they have begun.
        values |= {"state": TaskState.RUNNING.value, "started_at": _first("started_at"), "last_heartbeat_at": now}
    elif mode is not ClaimMode.SAME_HOLDER:
        # An agent that never sends any must not be taken for one that fell silent.
        values["last_heartbeat_at"] = None
    return (
        sa.update(TABLE)
        .where(_is_attempt(), is_live(), _T.cancel_requested_at.is_(None), condition, ~superseded)
        .values(values)
        .returning(*_T)
    )


def _first(column: str) -> sa.ColumnElement[float]:
    """A time as it was, or ``p_now``."""
    return sa.func.coalesce(_T[column], sa.bindparam("p_now", type_=_T[column].type))


@cache
def start() -> sa.Executable:
    """User code runs: by ``p_holder``, at ``p_now``."""
    return (
        sa.update(TABLE)
        .where(_is_attempt(), _T.holder == sa.bindparam("p_holder"), _from_states(TaskState.RUNNING))
        .values(state=TaskState.RUNNING.value, started_at=_first("started_at"))
    )


_CLAIM = (_T.task_instance_id, _T.try_number, _T.launch, _T.holder)


@cache
def select_claim() -> Rows:
    """The claim on a try."""
    now = DatabaseTime().label("now")
    return sa.select(*_CLAIM, _T.state, _T.lease_until, _T.ended_at, now).where(of_try(TABLE))


@cache
def hand_over() -> sa.Executable:
    """The attempt of ``p_holder`` is ``p_after``'s."""
    held = sa.and_(_is_attempt(), _T.holder == sa.bindparam("p_holder"), is_live())
    return sa.update(TABLE).where(held).values(holder=sa.bindparam("p_after"))


@cache
def lock_claim(locking: bool) -> Rows:
    """One row while ``p_holder`` holds the attempt; ``locking`` keeps it so until the transaction ends."""
    query = sa.select(_T.launch).where(_is_attempt(), _T.holder == sa.bindparam("p_holder"), is_live())
    return query.with_for_update() if locking else query


@cache
def select_any() -> Rows:
    """The cheapest question that needs the table."""
    return sa.select(_T.launch).limit(1)


def _held() -> Condition:
    """Live tries of the task instances ``p_ids`` that one of ``p_holders`` holds."""
    is_one = _T.task_instance_id.in_(sa.bindparam("p_ids", expanding=True))
    return sa.and_(is_one, _T.holder.in_(sa.bindparam("p_holders", expanding=True)), is_live())


@cache
def select_held() -> Rows:
    """``_held``: attempt, holder and since when it is asked to stop."""
    return sa.select(*_CLAIM, _T.cancel_requested_at).where(_held())


@cache
def renew_held() -> sa.Executable:
    """The same, with claims renewed at ``p_now`` until ``p_until``."""
    update = sa.update(TABLE).where(_held())
    renewed = update.values(last_heartbeat_at=sa.bindparam("p_now"), lease_until=sa.bindparam("p_until"))
    return renewed.returning(*_CLAIM, _T.cancel_requested_at)


# -- launches and ends -------------------------------------------------------------------------------------------------


@cache
def launched(of_executor: bool, at_back_end: bool) -> sa.Executable:
    """An executor started the attempt at ``p_now``: ``p_external_name`` at ``p_back_end``, by ``p_hostname``.

    Only an attempt that was given to ``p_executor`` and to that back end, where they are named: a second delivery may
    have started it elsewhere too, and only one of them is served. The first report counts, another one changes nothing.
    """
    conditions = [_is_attempt(), is_live()]
    if of_executor:
        conditions.append(_T.executor == sa.bindparam("p_executor"))
    if at_back_end:
        conditions.append(_runs_at())
    is_first = _T.launched_at.is_(None)
    names = ("external_name", "back_end", "hostname")
    first = {
        name: sa.case((is_first, sa.bindparam(f"p_{name}", type_=_T[name].type)), else_=_T[name]) for name in names
    }
    # An agent that called before the report told where it runs.
    first["hostname"] = sa.case((_T.hostname == "", first["hostname"]), else_=_T.hostname)
    return sa.update(TABLE).where(*conditions).values(launched_at=_first("launched_at"), **first)


@cache
def end(state: TaskState, conditions: frozenset[str]) -> sa.Executable:
    """The attempt ends in ``state``; every column of the end is a parameter ``p_<column>``."""
    return _ending(state, conditions, _end_values())


def _end_values() -> dict[str, object]:
    return {name: sa.bindparam(f"p_{name}", type_=_T[name].type) for name in _END_COLUMNS}


@cache
def next_launch(conditions: frozenset[str]) -> sa.Executable:
    """The try goes on with its next launch, queued at ``p_now``, to be sent after ``p_send_after``.

    ``p_growths`` is 1 when its memory limit grows.
    """
    values: dict[str, object] = {
        "state": TaskState.QUEUED.value,
        "launch": _T.launch + 1,
        "oom_relaunches": _T.oom_relaunches + sa.bindparam("p_growths", type_=sa.Integer()),
        "queued_at": sa.bindparam("p_now"),
        "send_after": sa.bindparam("p_send_after"),
        "hostname": "",
        "external_name": "",
        "back_end": "",
        **dict.fromkeys(_CLEARED),
    }
    return _ending(TaskState.FAILED, conditions, values)


def _ending(state: TaskState, names: frozenset[str], values: dict[str, object]) -> sa.Executable:
    conditions = {
        "holder": _T.holder == sa.bindparam("p_holder"),
        "unclaimed": _T.holder.is_(None),
        "unlaunched": _T.launched_at.is_(None),
        "silent_since": _T.last_heartbeat_at <= sa.bindparam("p_silent_since"),
        "executor": _T.executor == sa.bindparam("p_executor"),
        "back_end": _runs_at(),
        "uncancelled": _T.cancel_requested_at.is_(None),
    }
    return (
        sa.update(TABLE)
        .where(_is_attempt(), _from_states(state), *(conditions[name] for name in sorted(names)))
        .values(values)
        .returning(*_T)
    )


@cache
def request_cancel(newest: bool) -> sa.Executable:
    """Ask a live try to stop, since ``p_now``: the newest, or ``p_try``. One that was asked before is left as it is."""
    number: Any = sa.bindparam("p_try")
    if newest:
        other = TABLE.alias("other")
        of_task = other.c.task_instance_id == sa.bindparam("p_ti")
        number = sa.select(sa.func.max(other.c.try_number)).where(of_task).scalar_subquery()
    is_try = sa.and_(_T.task_instance_id == sa.bindparam("p_ti"), _T.try_number == number)
    update = sa.update(TABLE).where(is_try, is_live(), _T.cancel_requested_at.is_(None))
    return update.values(cancel_requested_at=sa.bindparam("p_now")).returning(*_T)


# -- what the reapers look at ------------------------------------------------------------------------------------------


def is_silent(before: float) -> Condition:
    """Claimed, and the last heartbeat is older."""
    return sa.and_(_T.holder.is_not(None), _T.last_heartbeat_at < before)


def is_waiting(before: float) -> Condition:
    """Unclaimed, and its message was sent before that."""
    return sa.and_(_T.holder.is_(None), _T.sent_at < before)


def is_cancelled(before: float) -> Condition:
    """It was asked to stop before that."""
    return _T.cancel_requested_at < before


def live(condition: Condition, page: int, after: tuple[float, str, int] | None) -> Rows:
    """One page of the live tries, the longest queued first; ``after`` is where the page before it ended."""
    query = sa.select(TABLE).where(is_live(), condition).order_by(*_ORDER).limit(page)
    return query if after is None else query.where(_is_after(*after))


def _is_after(queued_at: float, task_instance_id: str, try_number: int) -> Condition:
    # Not as a comparison of rows: the planners serve that from no index.
    same_time = _T.queued_at == queued_at
    same_task = sa.and_(same_time, _T.task_instance_id == task_instance_id)
    return sa.or_(
        _T.queued_at > queued_at,
        sa.and_(same_time, _T.task_instance_id > task_instance_id),
        sa.and_(same_task, _T.try_number > try_number),
    )


def expected(executors: Collection[str]) -> Rows:
    """What an expectation says of each live attempt of the executors."""
    columns = (_T.executor, *_CLAIM, _T.dag_id, _T.task_id, _T.launched_at, _T.back_end)
    return sa.select(*columns).where(is_live(), _T.executor.in_(executors))


def oldest_waiting() -> Rows:
    """(executor, queue name, time): since when the oldest try of each launch queue has waited for a worker."""
    since = sa.func.min(sa.func.coalesce(_T.sent_at, _T.queued_at), type_=_T.queued_at.type)
    waiting = sa.and_(is_live(), _T.holder.is_(None), _T.launched_at.is_(None))
    return sa.select(_T.executor, _T.queue_name, since).where(waiting).group_by(_T.executor, _T.queue_name)


# -- runs and history --------------------------------------------------------------------------------------------------


def of_run(tenant_id: str, dag_id: str, run_id: str) -> Rows:
    """Every try of a run, a younger one of a task instance after an older one."""
    is_run = sa.and_(_T.tenant_id == tenant_id, _T.dag_id == dag_id, _T.run_id == run_id)
    return sa.select(TABLE).where(is_run).order_by(_T.try_number)


def old_tries(before: float, limit: int) -> Rows:
    """Tries of task instances that ended before that as a whole and whose results were delivered."""
    completion, other = table_of(TaskCompletion), TABLE.alias("other")
    undelivered = sa.exists().where(
        completion.c.task_instance_id == _T.task_instance_id,
        completion.c.try_number == _T.try_number,
        completion.c.done_at.is_(None),
    )
    younger = sa.exists().where(
        other.c.task_instance_id == _T.task_instance_id,
        sa.or_(other.c.ended_at.is_(None), other.c.ended_at >= before),
    )
    ids = sa.select(_T.task_instance_id, _T.try_number)
    return ids.where(_has_ended(), _T.ended_at < before, ~undelivered, ~younger).limit(limit)


def celery_ids(connection: sa.Connection, tries: Sequence[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """The Celery id of each of these tries (task_instance_id, try_number) that is recorded."""
    query = sa.select(_T.task_instance_id, _T.try_number, _T.celery_task_id)
    rows = connection.execute(query.where(sa.tuple_(_T.task_instance_id, _T.try_number).in_(tries)))
    return {(task_instance_id, number): name for task_instance_id, number, name in rows}
