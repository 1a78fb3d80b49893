"""The statements of the hot path, built once.

Building a statement in SQLAlchemy costs more than running it on SQLite, so what every task executes is made here with
named parameters and reused. Parameters are prefixed with ``p_``: plain column names belong to the VALUES clause.
"""

from __future__ import annotations

from enum import Enum
from functools import cache

import sqlalchemy as sa

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.states import TERMINAL, TaskState, sources_of
from leoflow_celery.store.models import TaskCompletion, TaskInstance, is_live, table_of

TASK_INSTANCE = table_of(TaskInstance)
COMPLETION = table_of(TaskCompletion)
_T = TASK_INSTANCE.c
_END_COLUMNS = ("state", "reason", "message", "exit_code", "last_event", "log_tail", "ended_at")
_CLEARED = ("holder", "lease_until", "last_heartbeat_at", "sent_at", "launched_at", "started_at")


class Free(Enum):
    """Why a claim may be given: nobody has it, the same holder asks again, or its holder's lease ran out."""

    UNCLAIMED = "unclaimed"
    SAME_HOLDER = "same_holder"
    EXPIRED = "expired"


def attempt_parameters(attempt: AttemptId) -> dict[str, object]:
    """What ``is_attempt`` compares with."""
    return {"p_ti": attempt.task_instance_id, "p_try": attempt.try_number, "p_launch": attempt.launch}


def is_attempt() -> sa.ColumnElement[bool]:
    """The row is this try and stands at this launch."""
    return sa.and_(
        _T.task_instance_id == sa.bindparam("p_ti"),
        _T.try_number == sa.bindparam("p_try"),
        _T.launch == sa.bindparam("p_launch"),
    )


@cache
def select_try(newest: bool) -> sa.Select[tuple[object, ...]]:
    """A row by ``p_ti``, and by ``p_try`` unless the newest try is asked for."""
    query = sa.select(TASK_INSTANCE).where(_T.task_instance_id == sa.bindparam("p_ti"))
    if newest:
        return query.order_by(_T.try_number.desc()).limit(1)
    return query.where(_T.try_number == sa.bindparam("p_try"))


@cache
def select_ended() -> sa.Select[tuple[object, ...]]:
    """The rows of those tries of the task instances ``p_ids`` that are over."""
    of_these = _T.task_instance_id.in_(sa.bindparam("p_ids", expanding=True))
    return sa.select(TASK_INSTANCE).where(of_these, _T.state.in_([state.value for state in TERMINAL]))


@cache
def claim(free: Free, start: bool) -> sa.Executable:
    """Give the attempt to ``p_holder`` on ``p_hostname`` until ``p_until``; ``start`` makes it running at ``p_now``."""
    newer = TASK_INSTANCE.alias("newer")
    superseded = sa.exists().where(
        newer.c.task_instance_id == sa.bindparam("p_ti"), newer.c.try_number > sa.bindparam("p_try")
    )
    condition = {
        Free.UNCLAIMED: _T.holder.is_(None),
        Free.SAME_HOLDER: _T.holder == sa.bindparam("p_holder"),
        Free.EXPIRED: _T.lease_until < sa.bindparam("p_now"),
    }[free]
    now: sa.BindParameter[float] = sa.bindparam("p_now")
    values: dict[str, object] = {
        "holder": sa.bindparam("p_holder"),
        "hostname": sa.bindparam("p_hostname"),
        "lease_until": sa.bindparam("p_until"),
    }
    if start:
        # This holder lives in the worker that writes its heartbeats, so they have begun.
        values |= {"state": TaskState.RUNNING.value, "started_at": first_start(), "last_heartbeat_at": now}
    elif free is not Free.SAME_HOLDER:
        # An agent that never sends any must not be taken for one that fell silent.
        values["last_heartbeat_at"] = None
    return (
        sa.update(TASK_INSTANCE)
        .where(is_attempt(), is_live(), _T.cancel_requested_at.is_(None), condition, ~superseded)
        .values(values)
        .returning(*_T)
    )


def first_start() -> sa.ColumnElement[float]:
    """``started_at`` as it was, or ``p_now``."""
    return sa.func.coalesce(_T.started_at, sa.bindparam("p_now", type_=_T.started_at.type))


@cache
def start() -> sa.Executable:
    """User code runs: by ``p_holder``, at ``p_now``."""
    return (
        sa.update(TASK_INSTANCE)
        .where(is_attempt(), _T.holder == sa.bindparam("p_holder"), _from_states(TaskState.RUNNING))
        .values(state=TaskState.RUNNING.value, started_at=first_start())
    )


@cache
def launched() -> sa.Executable:
    """An executor started the attempt at ``p_now``: ``p_external_name`` at ``p_back_end``, by ``p_hostname``."""
    back_end: sa.BindParameter[str] = sa.bindparam("p_back_end")
    hostname: sa.BindParameter[str] = sa.bindparam("p_hostname")
    return (
        sa.update(TASK_INSTANCE)
        .where(is_attempt(), is_live())
        .values(
            launched_at=sa.bindparam("p_now"),
            external_name=sa.bindparam("p_external_name"),
            # The first one: a second delivery may have started it elsewhere too, and only one of them is served.
            back_end=sa.case((_T.back_end == "", back_end), else_=_T.back_end),
            hostname=sa.case((_T.hostname == "", hostname), else_=_T.hostname),
        )
    )


@cache
def end(state: TaskState, guards: frozenset[str]) -> sa.Executable:
    """The attempt ends in ``state``; every column of the end is a parameter ``p_<column>``."""
    return _ending(state, guards, {name: sa.bindparam(f"p_{name}", type_=_T[name].type) for name in _END_COLUMNS})


@cache
def next_launch(guards: frozenset[str]) -> sa.Executable:
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
    return _ending(TaskState.FAILED, guards, values)


def _ending(state: TaskState, guards: frozenset[str], values: dict[str, object]) -> sa.Executable:
    conditions = {
        "holder": _T.holder == sa.bindparam("p_holder"),
        "unclaimed": _T.holder.is_(None),
        "unlaunched": _T.launched_at.is_(None),
        "silent_since": _T.last_heartbeat_at <= sa.bindparam("p_silent_since"),
    }
    return (
        sa.update(TASK_INSTANCE)
        .where(is_attempt(), _from_states(state), *(conditions[name] for name in sorted(guards)))
        .values(values)
        .returning(*_T)
    )


def _from_states(to_state: TaskState) -> sa.ColumnElement[bool]:
    return _T.state.in_([state.value for state in sources_of(to_state) if state not in TERMINAL])


@cache
def take_completions(one_try: bool, locking: bool) -> sa.Executable:
    """Lease up to ``p_limit`` completions that are due at ``p_now`` until ``p_until``; of one try, or of all."""
    columns = COMPLETION.c
    ended = sa.exists().where(
        _T.task_instance_id == columns.task_instance_id,
        _T.try_number == columns.try_number,
        _T.state.in_([state.value for state in TERMINAL]),
    )
    free = sa.or_(columns.lease_until.is_(None), columns.lease_until < sa.bindparam("p_now"))
    due = sa.select(columns.celery_task_id).where(columns.done_at.is_(None), free, ended)
    if one_try:
        due = due.where(columns.task_instance_id == sa.bindparam("p_ti"), columns.try_number == sa.bindparam("p_try"))
    due = due.order_by(columns.created_at).limit(sa.bindparam("p_limit", type_=sa.Integer()))
    if locking:
        due = due.with_for_update(skip_locked=True)
    # A CTE runs once; a plain subquery with a limit may be run again for every row it is compared with.
    taken = due.cte("due")
    return (
        sa.update(COMPLETION)
        .where(columns.celery_task_id.in_(sa.select(taken.c.celery_task_id)))
        .values(lease_until=sa.bindparam("p_until"))
        .returning(
            columns.celery_task_id,
            columns.task_instance_id,
            columns.try_number,
            columns.context,
            columns.result_callback,
            columns.failures,
        )
    )


@cache
def complete() -> sa.Executable:
    """The completion ``p_id`` is done at ``p_now``; run with a list of parameters (an expanded IN is compiled anew)."""
    return (
        sa.update(COMPLETION)
        .where(COMPLETION.c.celery_task_id == sa.bindparam("p_id"))
        .values(done_at=sa.bindparam("p_now"))
    )


@cache
def supersede(named: bool) -> sa.Executable:
    """End the live tries that have a newer try, at ``p_now``: of the task instances ``p_ids``, or of all."""
    newer = TASK_INSTANCE.alias("newer")
    is_older = sa.exists().where(newer.c.task_instance_id == _T.task_instance_id, newer.c.try_number > _T.try_number)
    update = sa.update(TASK_INSTANCE).where(is_live(), is_older)
    if named:
        update = update.where(_T.task_instance_id.in_(sa.bindparam("p_ids", expanding=True)))
    return update.values(
        state=sa.bindparam("p_state"),
        reason=sa.bindparam("p_reason"),
        message=sa.bindparam("p_message"),
        ended_at=sa.bindparam("p_now"),
    ).returning(_T.task_instance_id, _T.try_number, _T.launch)
