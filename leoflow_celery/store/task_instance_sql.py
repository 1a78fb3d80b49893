"""All SQL on ``task_instance``: whoever reads or writes tries does it with a statement from here.

Building a statement in SQLAlchemy costs more than running it on SQLite, so what every task executes is made once, with
named parameters. Parameters are prefixed with ``p_``: plain column names belong to the VALUES clause. Statements that
return tries return whole rows: nobody has to read again what a write left behind.

Every time here is written and compared by the database's clock. A row comes with the time at which it was read
(``read_at``), so that who computes an age needs no clock of his own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum
from functools import cache
from typing import Any

import sqlalchemy as sa

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.request import RelaunchMode
from leoflow_celery.domain.states import TERMINAL, TaskState, sources_of
from leoflow_celery.store.models import (
    LIVE,
    UNNUMBERED,
    DatabaseTime,
    TaskCompletion,
    TaskInstance,
    is_ahead,
    is_over,
    table_of,
)
from leoflow_celery.store.views import needs_host

TABLE = table_of(TaskInstance)
_T = TABLE.c
_TASK = ("tenant_id", "dag_id", "run_id", "task_id")
_RUN = ("tenant_id", "dag_id", "run_id")
_END_COLUMNS = ("state", "reason", "message", "exit_code", "last_event", "log_tail")
_CLEARED = ("holder", "lease_until", "last_heartbeat_at", "sent_at", "launched_at", "started_at")
#: A whole row, and the time by the same clock.
_ROW = (*_T, DatabaseTime().label("read_at"))
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

    ``p_back_end_queue`` is the queue of that back end alone, ``p_back_end_places`` is like all of its places.
    """
    is_there = sa.or_(_T.back_end == sa.bindparam("p_back_end"), _T.back_end.like(sa.bindparam("p_back_end_places")))
    is_own_queue = sa.or_(_T.queue_name == "", _T.queue_name == sa.bindparam("p_back_end_queue"))
    return sa.or_(is_there, sa.and_(_T.back_end == "", is_own_queue))


def ended_try(task_instance_id: sa.ColumnElement[str], try_number: sa.ColumnElement[int]) -> Condition:
    """There is such a try, and it has ended."""
    return sa.exists().where(_T.task_instance_id == task_instance_id, _T.try_number == try_number, _has_ended())


def value_is_replaced(task_instance_id: sa.ColumnElement[str], try_number: sa.ColumnElement[int]) -> Condition:
    """The try succeeded, and a later one of its task and run has taken away the value it left."""
    told, later = TABLE.alias("told_try"), TABLE.alias("later_try")
    same_task = [later.c[name] == told.c[name] for name in (*_RUN, "task_id")]
    is_same = later.c.task_instance_id == told.c.task_instance_id
    is_later = sa.or_(
        sa.and_(is_same, later.c.try_number > told.c.try_number),
        sa.and_(~is_same, later.c.queued_at >= told.c.queued_at),
    )
    return (
        sa.exists()
        .where(told.c.task_instance_id == task_instance_id, told.c.try_number == try_number)
        .where(told.c.state == TaskState.SUCCESS.value, sa.exists().where(*same_task, is_later).correlate(told))
    )


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
    query = sa.select(*_ROW).where(_T.task_instance_id == sa.bindparam("p_ti"))
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
    return sa.select(*_ROW).where(_T.task_instance_id.in_(sa.bindparam("p_ids", expanding=True)), _has_ended())


# -- submitting --------------------------------------------------------------------------------------------------------


def insert_tries(insert: Any, ended: bool) -> Any:
    """Insert tries that are not there; returns the ids of those that were inserted, each with ``_runs_again``.

    ``insert`` is ``Database.insert``. With ``ended`` they are over at once. The caller keeps the statement.
    """
    now = DatabaseTime()
    times = {"queued_at": now, "send_after": now, **({"ended_at": now} if ended else {})}
    statement = insert(TABLE).values(times).on_conflict_do_nothing()
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
    """End the live tries that have a newer try: of the task instances ``p_ids``, or of all."""
    newer = TABLE.alias("newer")
    is_older = sa.exists().where(newer.c.task_instance_id == _T.task_instance_id, newer.c.try_number > _T.try_number)
    update = sa.update(TABLE).where(is_live(), is_older)
    if named:
        update = update.where(_T.task_instance_id.in_(sa.bindparam("p_ids", expanding=True)))
    return update.values(
        state=sa.bindparam("p_state"),
        reason=sa.bindparam("p_reason"),
        message=sa.bindparam("p_message"),
        ended_at=DatabaseTime(),
    ).returning(_T.task_instance_id, _T.try_number, _T.launch)


@cache
def mark_sent() -> sa.Executable:
    """The broker has the message of the attempt now."""
    return sa.update(TABLE).where(_is_attempt()).values(sent_at=DatabaseTime())


@cache
def set_queue() -> sa.Executable:
    """The message of the try goes to ``p_queue``."""
    return sa.update(TABLE).where(of_try(TABLE)).values(queue_name=sa.bindparam("p_queue"))


@cache
def replace_request() -> sa.Executable:
    """The live try has the request ``p_after``, if it still has ``p_before``."""
    is_same = _T.sealed_request == sa.bindparam("p_before")
    return sa.update(TABLE).where(of_try(TABLE), is_live(), is_same).values(sealed_request=sa.bindparam("p_after"))


@cache
def count_live() -> Rows:
    """How many live tries of ``p_executor`` were not started yet, and how many were."""
    is_started = sa.or_(_T.holder.is_not(None), _T.launched_at.is_not(None))
    started = sa.func.count(sa.case((is_started, 1)))
    return sa.select(sa.func.count() - started, started).where(is_live(), _T.executor == sa.bindparam("p_executor"))


def unsend(since: float, until: float | None = None) -> sa.Update:
    """Messages that the broker took since then are to be sent again, unless their launch is known to have begun."""
    is_waiting = sa.and_(_T.holder.is_(None), _T.launched_at.is_(None), _T.sent_at >= since)
    if until is not None:
        is_waiting = sa.and_(is_waiting, _T.sent_at <= until)
    return sa.update(TABLE).where(is_live(), is_waiting).values(sent_at=None)


def unsent(grace_seconds: float, limit: int) -> Rows:
    """Unclaimed tries whose message is due and was not sent."""
    # Of a clock that was set back: a delay of ours is no longer than the step that makes queued_at impossible, and a
    # task that asked for a later time looks once too early.
    is_time = sa.or_(_T.send_after <= DatabaseTime(), is_ahead(_T.queued_at))
    is_due = sa.and_(_T.holder.is_(None), _T.sent_at.is_(None), ~_needs_host(), is_time)
    is_old = sa.or_(_T.launch > 1, is_over(_T.queued_at, grace_seconds))
    return sa.select(*_ROW).where(is_live(), is_due, is_old).order_by(_T.queued_at).limit(limit)


def unplaced(at_least_seconds: float, limit: int) -> Rows:
    """Tries that have waited that long for a host of their staging volume."""
    waiting = sa.and_(is_live(), _needs_host(), is_over(_T.queued_at, at_least_seconds))
    return sa.select(*_ROW).where(waiting).order_by(_T.queued_at).limit(limit)


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
    """Give the attempt to ``p_holder`` on ``p_hostname`` for ``p_lease`` seconds; ``start`` makes it running.

    The claim is the first sign of life of its holder.
    """
    newer = TABLE.alias("newer")
    superseded = sa.exists().where(
        newer.c.task_instance_id == sa.bindparam("p_ti"), newer.c.try_number > sa.bindparam("p_try")
    )
    condition = {
        ClaimMode.UNCLAIMED: _T.holder.is_(None),
        ClaimMode.SAME_HOLDER: _T.holder == sa.bindparam("p_holder"),
        ClaimMode.EXPIRED: _has_run_out(),
    }[mode]
    values: dict[str, object] = {
        "holder": sa.bindparam("p_holder"),
        "hostname": sa.bindparam("p_hostname"),
        **_renewed(),
    }
    if start:
        values |= {"state": TaskState.RUNNING.value, "started_at": _first("started_at")}
    return (
        sa.update(TABLE)
        .where(_is_attempt(), is_live(), _T.cancel_requested_at.is_(None), condition, ~superseded)
        .values(values)
        .returning(*_ROW)
    )


def _renewed() -> dict[str, object]:
    """A holder lives now, and holds for ``p_lease`` seconds."""
    lease: sa.BindParameter[float] = sa.bindparam("p_lease", type_=sa.Double())
    return {"last_heartbeat_at": DatabaseTime(), "lease_until": DatabaseTime(lease)}


def _has_run_out() -> Condition:
    """The lease is over, or was given by a clock that was set back since (a lease may be of any length)."""
    return sa.or_(_T.lease_until < DatabaseTime(), is_ahead(_T.last_heartbeat_at))


def _first(column: str) -> sa.ColumnElement[float]:
    """A time as it was, or now."""
    return sa.func.coalesce(_T[column], DatabaseTime(), type_=_T[column].type)


@cache
def start() -> sa.Executable:
    """User code runs: by ``p_holder``, from now on."""
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
    """The same, with claims renewed for ``p_lease`` seconds."""
    return sa.update(TABLE).where(_held()).values(_renewed()).returning(*_CLAIM, _T.cancel_requested_at)


# -- launches and ends -------------------------------------------------------------------------------------------------


@cache
def launched(of_executor: bool, at_back_end: bool) -> sa.Executable:
    """An executor started the attempt: ``p_external_name`` at ``p_back_end``, by ``p_hostname``.

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
    """The attempt ends in ``state``; every other column of the end is a parameter ``p_<column>``."""
    values = {name: sa.bindparam(f"p_{name}", type_=_T[name].type) for name in _END_COLUMNS}
    return _ending(state, conditions, {**values, "ended_at": DatabaseTime()})


@cache
def next_launch(conditions: frozenset[str]) -> sa.Executable:
    """The try goes on with its next launch, queued now, to be sent ``p_delay`` seconds later.

    ``p_growths`` is 1 when its memory limit grows, ``p_reschedules`` 1 when its task asked for it.
    """
    reschedules = sa.bindparam("p_reschedules", type_=sa.Integer())
    first = sa.case((reschedules == 1, sa.func.coalesce(_T.first_reschedule_at, DatabaseTime())))
    values: dict[str, object] = {
        "state": TaskState.QUEUED.value,
        "launch": _T.launch + 1,
        "oom_relaunches": _T.oom_relaunches + sa.bindparam("p_growths", type_=sa.Integer()),
        "reschedules": _T.reschedules + reschedules,
        "first_reschedule_at": sa.func.coalesce(first, _T.first_reschedule_at, type_=_T.first_reschedule_at.type),
        "queued_at": DatabaseTime(),
        "send_after": DatabaseTime(sa.bindparam("p_delay", type_=sa.Double())),
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
        "silent_since": sa.and_(_T.holder.is_not(None), _said_nothing_since()),
        "executor": _T.executor == sa.bindparam("p_executor"),
        "back_end": _runs_at(),
        "uncancelled": _T.cancel_requested_at.is_(None),
        # The user's code may have begun since the row was read.
        "startable": sa.or_(_T.relaunch != RelaunchMode.BEFORE_START.value, _T.started_at.is_(None)),
    }
    return (
        sa.update(TABLE)
        .where(_is_attempt(), _from_states(state), *(conditions[name] for name in sorted(names)))
        .values(values)
        .returning(*_ROW)
    )


def _said_nothing_since() -> Condition:
    """Nothing was written of the holder after the sign of life that was read: ``p_silent_since``."""
    read = sa.bindparam("p_silent_since", type_=_T.last_heartbeat_at.type)
    return sa.func.coalesce(_T.last_heartbeat_at, _T.lease_until, type_=read.type) == read


@cache
def request_cancel(newest: bool) -> sa.Executable:
    """Ask a live try to stop: the newest, or ``p_try``. One that was asked before is left as it is."""
    number: Any = sa.bindparam("p_try")
    if newest:
        other = TABLE.alias("other")
        of_task = other.c.task_instance_id == sa.bindparam("p_ti")
        number = sa.select(sa.func.max(other.c.try_number)).where(of_task).scalar_subquery()
    is_try = sa.and_(_T.task_instance_id == sa.bindparam("p_ti"), _T.try_number == number)
    update = sa.update(TABLE).where(is_try, is_live(), _T.cancel_requested_at.is_(None))
    return update.values(cancel_requested_at=DatabaseTime()).returning(*_ROW)


# -- what the reapers look at ------------------------------------------------------------------------------------------


def is_silent(timeout_seconds: float) -> Condition:
    """Claimed, and the last sign of life is so long ago; of one that gave none, the lease has run out."""
    never = sa.and_(_T.last_heartbeat_at.is_(None), is_over(_T.lease_until, 0))
    return sa.and_(_T.holder.is_not(None), sa.or_(is_over(_T.last_heartbeat_at, timeout_seconds), never))


def is_waiting(at_least_seconds: float) -> Condition:
    """Unclaimed, and its message was sent so long ago."""
    return sa.and_(_T.holder.is_(None), is_over(_T.sent_at, at_least_seconds))


def is_cancelled(at_least_seconds: float) -> Condition:
    """It was asked to stop so long ago."""
    return is_over(_T.cancel_requested_at, at_least_seconds)


def live(condition: Condition, page: int, after: tuple[float, str, int] | None) -> Rows:
    """One page of the live tries, the longest queued first; ``after`` is where the page before it ended."""
    query = sa.select(*_ROW).where(is_live(), condition).order_by(*_ORDER).limit(page)
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
    """(executor, queue name, time, now): since when the oldest try of each launch queue has waited for a worker."""
    since = sa.func.min(sa.func.coalesce(_T.sent_at, _T.queued_at), type_=_T.queued_at.type)
    is_due = sa.or_(_T.sent_at.is_not(None), _T.send_after <= DatabaseTime())
    waiting = sa.and_(is_live(), _T.holder.is_(None), _T.launched_at.is_(None), is_due)
    return (
        sa.select(_T.executor, _T.queue_name, since, DatabaseTime()).where(waiting).group_by(_T.executor, _T.queue_name)
    )


# -- the feed of ends --------------------------------------------------------------------------------------------------


def _is_unnumbered() -> Condition:
    """The condition the partial index on ends without a number was made for; without a type, as in ``is_live``."""
    return sa.literal_column(f"({UNNUMBERED.text})")


@cache
def any_unnumbered() -> Rows:
    """Whether an end has no number yet."""
    return sa.select(_T.try_number).where(_is_unnumbered()).limit(1)


@cache
def unnumbered(locking: bool) -> Rows:
    """Up to ``p_limit`` ends without a number, the oldest first; with ``locking`` those that nobody changes now."""
    query = sa.select(_T.task_instance_id, _T.try_number).where(_is_unnumbered())
    order = (_T.ended_at, _T.task_instance_id, _T.try_number)
    query = query.order_by(*order).limit(sa.bindparam("p_limit", type_=sa.Integer()))
    return query.with_for_update(skip_locked=True) if locking else query


@cache
def number_end() -> sa.Executable:
    """The try's end is ``p_number`` in the feed."""
    return sa.update(TABLE).where(of_try(TABLE)).values(end_number=sa.bindparam("p_number"))


@cache
def ends(owned: bool) -> Rows:
    """Up to ``p_limit`` ends after ``p_after`` and up to ``p_last``; ``owned``: those of ``p_owner``."""
    query = sa.select(*_ROW).where(_T.end_number > sa.bindparam("p_after"), _T.end_number <= sa.bindparam("p_last"))
    if owned:
        query = query.where(_T.owner == sa.bindparam("p_owner"))
    return query.order_by(_T.end_number).limit(sa.bindparam("p_limit", type_=sa.Integer()))


# -- runs and history --------------------------------------------------------------------------------------------------


def of_run(tenant_id: str, dag_id: str, run_id: str) -> Rows:
    """Every try of a run, a younger one of a task instance after an older one."""
    is_run = sa.and_(_T.tenant_id == tenant_id, _T.dag_id == dag_id, _T.run_id == run_id)
    return sa.select(*_ROW).where(is_run).order_by(_T.try_number)


def ids_of_run(tenant_id: str, dag_id: str, run_id: str) -> sa.Select[tuple[str]]:
    """The task instances of a run."""
    is_run = sa.and_(_T.tenant_id == tenant_id, _T.dag_id == dag_id, _T.run_id == run_id)
    return sa.select(_T.task_instance_id).where(is_run).distinct()


def times_of_runs(tenant_id: str, dag_id: str, run_ids: Collection[str]) -> Rows:
    """(run, task, try, start, end) of what succeeded in these runs of a DAG, a younger try after an older one."""
    is_one = sa.and_(_T.tenant_id == tenant_id, _T.dag_id == dag_id, _T.run_id.in_(run_ids))
    has_run = sa.and_(_T.state == TaskState.SUCCESS.value, _T.started_at.is_not(None))
    columns = sa.select(_T.run_id, _T.task_id, _T.started_at, _T.ended_at)
    return columns.where(is_one, has_run).order_by(_T.try_number)


def latest_run(tenant_id: str, dag_id: str) -> sa.Select[tuple[str]]:
    """The run that the newest task instance of a DAG names."""
    of_dag = sa.and_(_T.tenant_id == tenant_id, _T.dag_id == dag_id)
    return sa.select(_T.run_id).where(of_dag).order_by(_T.queued_at.desc()).limit(1)


def old_tries(older_than_seconds: float, limit: int) -> Rows:
    """Tries of task instances that ended so long ago as a whole and whose results were delivered."""
    before = DatabaseTime(-older_than_seconds)
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
