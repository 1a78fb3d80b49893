"""Claims, heartbeats and ends of attempts: every write is a compare-and-set.

The database decides, not the message: whoever wants to run an attempt claims it here, and whoever writes about one
must still hold it. A write that finds nothing to change says why.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import sqlalchemy as sa

from leoflow_celery.domain.attempt import AttemptId, LaunchReport
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.outcome import Outcome, storable
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.relaunch import Relaunch, RelaunchPolicy, relaunch_decision
from leoflow_celery.domain.request import RelaunchMode
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.states import TERMINAL, TaskState
from leoflow_celery.domain.xcom import XComKey, XComValue
from leoflow_celery.errors import ClaimRefused, Fenced, InvalidRequest, NotFound
from leoflow_celery.store import task_instance_sql
from leoflow_celery.store.completions import take_of_try
from leoflow_celery.store.database import CHUNK_ROWS, Database, batched
from leoflow_celery.store.events import append_event
from leoflow_celery.store.presence import PresenceStore
from leoflow_celery.store.task_instance_sql import ClaimMode, attempt_parameters
from leoflow_celery.store.views import Finished, TaskInstanceView
from leoflow_celery.store.xcom.base import XComStore

_HOSTNAME_CHARACTERS = 255


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat of a holder. A holder holds one attempt."""

    attempt: AttemptId
    holder: str


@dataclass(frozen=True, slots=True)
class BeatVerdicts:
    """What a flush of heartbeats found: holders that lost their claim, and holders asked to stop."""

    fenced: frozenset[str]
    cancelled: frozenset[str]

    @classmethod
    def find(
        cls, connection: sa.Connection, statement: sa.Executable, beats: Collection[Beat], **values: object
    ) -> BeatVerdicts:
        """The verdicts on these beats, from the rows of ``select_held`` or ``renew_held``."""
        of_holder = {beat.holder: beat.attempt for beat in beats}
        live: dict[str, float | None] = {}
        # In one order everywhere: two gateways may flush the beats of an agent that moved between them.
        for chunk in batched(sorted(of_holder.items(), key=lambda item: item[1].task_instance_id), CHUNK_ROWS):
            names = {
                "p_ids": [attempt.task_instance_id for _, attempt in chunk],
                "p_holders": [name for name, _ in chunk],
            }
            live |= {
                holder: cancelled_at
                for *attempt, holder, cancelled_at in connection.execute(statement, {**names, **values})
                if of_holder.get(holder) == AttemptId(*attempt)
            }
        cancelled = (holder for holder, cancelled_at in live.items() if cancelled_at is not None)
        return cls(frozenset(of_holder.keys() - live.keys()), frozenset(cancelled))


@dataclass(frozen=True, slots=True)
class FinishCondition:
    """Under which condition a writer may end an attempt; a set field must hold.

    ``holder``: the claim is mine. ``unclaimed``: nobody has claimed it (a launch failed before any agent called).
    ``unlaunched``: no executor has told that it started it. ``silent_since``: no sign of life came after this one, the
    view's ``last_seen_at`` (a reaper saw silence and must not kill what woke up). ``executor``: it was given to this
    executor. ``back_end`` (``BackEnd`` as text): it runs there, or nobody knows yet where and its queue leads there.
    """

    holder: str | None = None
    unclaimed: bool = False
    unlaunched: bool = False
    silent_since: float | None = None
    executor: str | None = None
    back_end: str | None = None

    def names(self) -> frozenset[str]:
        """Which conditions hold."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        return frozenset(name for name, value in given.items() if value is not None and value is not False)

    def parameters(self) -> dict[str, object]:
        """What the conditions compare with."""
        values: dict[str, object] = {
            "p_holder": self.holder,
            "p_silent_since": self.silent_since,
            "p_executor": self.executor,
            **(_back_end_parameters(self.back_end) if self.back_end is not None else {}),
        }
        return {name: value for name, value in values.items() if value is not None}


ANY = FinishCondition()


def _back_end_parameters(back_end: str) -> dict[str, object]:
    named = BackEnd.parse(back_end)
    return {"p_back_end": back_end, "p_back_end_places": f"{named}/%", "p_back_end_queue": named.queue}


@dataclass(frozen=True, slots=True)
class _End:
    """An end that somebody reports."""

    attempt: AttemptId
    outcome: Outcome
    condition: FinishCondition
    may_relaunch: bool


class AttemptStore:
    """The life of attempts after they were recorded (see ``submissions`` for before)."""

    def __init__(
        self, database: Database, xcom: XComStore, presence: PresenceStore, policy: RelaunchPolicy | None = None
    ) -> None:
        self._database, self._xcom, self._presence = database, xcom, presence
        self._policy = policy or RelaunchPolicy()

    # -- reading ------------------------------------------------------------------------------------------------

    def get(self, task_instance_id: str, try_number: int | None = None) -> TaskInstanceView:
        """One try, the newest unless named.

        Raises:
            NotFound: no such task instance or try.
        """
        with self._database.reading() as connection:
            return self._get(connection, task_instance_id, try_number)

    def _get(self, connection: sa.Connection, task_instance_id: str, try_number: int | None) -> TaskInstanceView:
        query = task_instance_sql.select_try(newest=try_number is None)
        view = _read(connection, query, {"p_ti": task_instance_id, "p_try": try_number})
        if view is None:
            which = "" if try_number is None else f" try {try_number}"
            raise NotFound(f"task instance {task_instance_id!r}{which} does not exist")
        return view

    def ended(self, attempts: Collection[AttemptId]) -> list[TaskInstanceView]:
        """The tries of these attempts that are over."""
        tries = {(one.task_instance_id, one.try_number) for one in attempts}
        found = []
        with self._database.reading() as connection:
            for chunk in batched(tries, CHUNK_ROWS):
                parameters = {"p_ids": [task_instance_id for task_instance_id, _ in chunk]}
                rows = connection.execute(task_instance_sql.select_ended(), parameters).mappings()
                found += [TaskInstanceView.from_row(row) for row in rows]
        return [view for view in found if (view.task_instance_id, view.try_number) in tries]

    def is_newest(self, view: TaskInstanceView) -> bool:
        """Whether no later try of its task and run was submitted, which would have taken away the value it left."""
        columns = task_instance_sql.TABLE.c
        names = ("tenant_id", "dag_id", "run_id", "task_id")
        is_later = sa.or_(
            sa.and_(columns.task_instance_id == view.task_instance_id, columns.try_number > view.try_number),
            sa.and_(columns.task_instance_id != view.task_instance_id, columns.queued_at >= view.queued_at),
        )
        later = sa.select(columns.try_number).where(*(columns[name] == getattr(view, name) for name in names), is_later)
        with self._database.reading() as connection:
            return connection.execute(later.limit(1)).first() is None

    # -- the claim ----------------------------------------------------------------------------------------------

    def claim(
        self, attempt: AttemptId, holder: str, hostname: str, lease_seconds: float, *, start: bool = False
    ) -> TaskInstanceView:
        """Make ``holder`` the only one who may run the attempt; again by the same holder is fine.

        With ``start`` the attempt is running at once (inline tasks, which have no agent to report it), and is never
        taken from a holder, however silent: the reaper says whether its call may be made again.

        Raises:
            ClaimRefused: why is unknown, terminal, superseded (a later launch or try exists) or held (by a live holder,
                or by one whose heartbeats nobody could hear).
        """
        parameters = {
            **attempt_parameters(attempt),
            "p_holder": holder,
            "p_hostname": storable(hostname)[:_HOSTNAME_CHARACTERS],
            "p_lease": lease_seconds,
        }
        claimed = self._database.grouped(lambda connection: self._claim(connection, attempt, parameters, start=start))
        if isinstance(claimed, ClaimRefused):
            raise claimed
        return claimed

    def _claim(
        self, connection: sa.Connection, attempt: AttemptId, parameters: dict[str, Any], *, start: bool
    ) -> TaskInstanceView | ClaimRefused:
        free = _read(connection, task_instance_sql.claim(ClaimMode.UNCLAIMED, start), parameters)
        again = free or _read(connection, task_instance_sql.claim(ClaimMode.SAME_HOLDER, start), parameters)
        view = again or (
            None if start else _read(connection, task_instance_sql.claim(ClaimMode.EXPIRED, start=False), parameters)
        )
        if view is None:
            return self._refusal(connection, attempt)
        if not again and not self._presence.may_judge(view.executor, parameters["p_lease"], connection):
            # Raised, which takes the claim back: after an outage a holder that lives has an old lease too.
            raise ClaimRefused("held", f"attempt {attempt} is held, and its holder's heartbeats may come late")
        # The same holder asking again begins nothing: what it pushed meanwhile stays.
        if free or not again:
            self._begin(connection, view, replaces=not free)
        return view

    def _begin(self, connection: sa.Connection, view: TaskInstanceView, *, replaces: bool) -> None:
        if replaces or view.try_number > 1 or view.launch > 1:
            # A consumer must never see a value of a try, launch or holder that did not succeed.
            self._xcom.delete_task(view.tenant_id, view.dag_id, view.run_id, view.task_id, connection)
        append_event(connection, view.attempt, "claimed", {"hostname": view.hostname})

    def _refusal(self, connection: sa.Connection, attempt: AttemptId) -> ClaimRefused:
        try:
            current = self._get(connection, attempt.task_instance_id, None)
        except NotFound:
            return ClaimRefused("unknown", f"attempt {attempt} is not recorded here")
        if (current.try_number, current.launch) > (attempt.try_number, attempt.launch):
            return ClaimRefused("superseded", f"attempt {attempt} was superseded by {current.attempt}")
        if (current.try_number, current.launch) < (attempt.try_number, attempt.launch):
            return ClaimRefused("unknown", f"attempt {attempt} is not recorded here")
        if current.is_terminal or current.cancel_requested_at is not None:
            state = current.state if current.is_terminal else "cancelled"
            return ClaimRefused("terminal", f"attempt {attempt} is {state} already")
        return ClaimRefused("held", f"attempt {attempt} is held by another agent, on {current.hostname}")

    def start(self, attempt: AttemptId, holder: str) -> None:
        """Record that user code runs.

        Raises:
            Fenced: the holder lost the attempt.
        """
        parameters = {**attempt_parameters(attempt), "p_holder": holder}
        with self._database.transaction() as connection:
            if connection.execute(task_instance_sql.start(), parameters).rowcount == 0:
                raise Fenced(f"attempt {attempt} is not held by the writer any more")

    def heartbeat(self, beats: Collection[Beat], lease_seconds: float) -> BeatVerdicts:
        """Renew many claims in one transaction and say which holders must stop."""
        if not beats:
            return BeatVerdicts(frozenset(), frozenset())
        with self._database.transaction() as connection:
            return BeatVerdicts.find(connection, task_instance_sql.renew_held(), beats, p_lease=lease_seconds)

    # -- the end ------------------------------------------------------------------------------------------------

    def finish(
        self,
        attempt: AttemptId,
        outcome: Outcome,
        condition: FinishCondition = ANY,
        xcoms: Sequence[tuple[XComKey, XComValue]] = (),
        *,
        may_relaunch: bool = True,
        seen: TaskInstanceView | None = None,
        lease_completions: float | None = None,
    ) -> Finished:
        """Record how the attempt ended, with its XComs, in one transaction; or start the next launch instead.

        The first end wins. A later one becomes an event, and so does one whose condition does not hold. The same end
        by the same holder again (its acknowledgement was lost) counts as recorded. Without ``may_relaunch`` a failure
        is final whatever its budget says. ``seen`` is the try as the caller read it a moment ago: the row is then not
        read again before it is written. ``lease_completions`` (seconds) leases who waits for the try in the same
        transaction, for a writer that completes them at once.

        Raises:
            InvalidRequest: the outcome is no end.
        """
        if outcome.state not in TERMINAL:
            raise InvalidRequest(
                f"state: {outcome.state} is no end of an attempt; use success, failed or skipped", "state"
            )
        end = _End(attempt, outcome, condition, may_relaunch)
        return self._database.grouped(lambda connection: self._finish(connection, end, xcoms, seen, lease_completions))

    def _finish(
        self,
        connection: sa.Connection,
        end: _End,
        xcoms: Sequence[tuple[XComKey, XComValue]],
        seen: TaskInstanceView | None,
        lease_completions: float | None,
    ) -> Finished:
        finished, current = self._end(connection, end, seen)
        if finished is None:
            return self._too_late(connection, end, current)
        self._xcom.put(xcoms, connection)
        if lease_completions is not None and finished.relaunch is None:
            attempt = end.attempt
            waiting = take_of_try(connection, lease_completions, attempt.task_instance_id, attempt.try_number)
            finished = replace(finished, waiting=tuple(waiting))
        return finished

    def _end(
        self, connection: sa.Connection, end: _End, seen: TaskInstanceView | None
    ) -> tuple[Finished | None, TaskInstanceView | None]:
        """What was written; or None when nothing could be, and the row as it stands where that is known."""
        if seen is not None and (seen.is_terminal or seen.attempt != end.attempt):
            return None, seen
        if end.outcome.state is not TaskState.FAILED:
            return self._write(connection, end, end.outcome, None), None
        if seen is not None:
            # Of what decides here only a cancellation can come while the launch stays the same.
            is_uncancelled = seen.cancel_requested_at is None
            finished = self._write(connection, end, *self._judge(end, seen), uncancelled=is_uncancelled)
            if finished is not None or not is_uncancelled:
                return finished, None
        # Locked until the end is written: a cancellation in between would be forgotten by a relaunch.
        view = _read(connection, task_instance_sql.lock_try(), attempt_parameters(end.attempt))
        if view is None or view.is_terminal or view.attempt != end.attempt:
            return None, view
        return self._write(connection, end, *self._judge(end, view)), view

    def _judge(self, end: _End, view: TaskInstanceView) -> tuple[Outcome, Relaunch | None]:
        outcome = end.outcome
        if view.cancel_requested_at is not None:
            return outcome.evolve(reason=FailureReason.CANCELLED, message=_cancelled_message(outcome)), None
        reason = outcome.reason or FailureReason.NON_ZERO_EXIT
        spent = end.attempt.launch - view.reschedules
        relaunch = relaunch_decision(reason, spent, self._policy, view.memory)
        may_relaunch = end.may_relaunch and RelaunchMode(view.relaunch).permits(view.started_at is not None)
        return outcome.evolve(reason=reason), relaunch if may_relaunch else None

    @staticmethod
    def _write(
        connection: sa.Connection, end: _End, outcome: Outcome, relaunch: Relaunch | None, *, uncancelled: bool = False
    ) -> Finished | None:
        conditions = end.condition.names() | ({"uncancelled"} if uncancelled else set())
        if relaunch:
            conditions |= {"startable"}
            statement = task_instance_sql.next_launch(conditions)
            growths = int(relaunch.growth is not None)
            values: dict[str, object] = {"p_delay": relaunch.delay_seconds, "p_growths": growths, "p_reschedules": 0}
        else:
            statement = task_instance_sql.end(outcome.state, conditions)
            values = _end_parameters(outcome)
        parameters = {**attempt_parameters(end.attempt), **end.condition.parameters(), **values}
        view = _read(connection, statement, parameters)
        if view is None:
            return None
        name = "relaunched" if relaunch else "finished"
        growth = {"memory_limit": str(relaunch.growth)} if relaunch and relaunch.growth else {}
        append_event(connection, end.attempt, name, {**outcome.to_json(), **growth})
        return Finished(True, relaunch, view)

    def reschedule(self, attempt: AttemptId, holder: str, delay_seconds: float) -> Finished:
        """The task of a holder released its place: the next launch of the same try begins after a delay.

        No retry and no relaunch is spent. A try that was asked to stop meanwhile ends as cancelled instead. Again by
        the same holder (its acknowledgement was lost) finds the next launch, and is not recorded.
        """
        relaunch = Relaunch(delay_seconds)
        conditions = FinishCondition(holder=holder)
        parameters = {
            **attempt_parameters(attempt),
            **conditions.parameters(),
            "p_delay": delay_seconds,
            "p_growths": 0,
            "p_reschedules": 1,
        }
        with self._database.transaction() as connection:
            statement = task_instance_sql.next_launch(conditions.names() | {"uncancelled"})
            view = _read(connection, statement, parameters)
            if view is not None:
                append_event(connection, attempt, "rescheduled", {"seconds": round(delay_seconds, 3)})
                return Finished(True, relaunch, view)
        cancelled = Outcome.failed(FailureReason.CANCELLED, "cancelled before its task looked again")
        current = self.get(attempt.task_instance_id, attempt.try_number)
        if current.attempt != attempt or current.cancel_requested_at is None or current.is_terminal:
            return Finished(False, None, current)
        return self.finish(attempt, cancelled, conditions, may_relaunch=False)

    def _too_late(self, connection: sa.Connection, end: _End, current: TaskInstanceView | None) -> Finished:
        select = task_instance_sql.select_try(newest=False)
        current = current or _read(connection, select, attempt_parameters(end.attempt))
        if current is None:
            return Finished(False)
        same_writer = end.condition.holder is not None and end.condition.holder == current.holder
        if (
            same_writer
            and current.attempt == end.attempt
            and current.state is end.outcome.state
            and current.is_terminal
        ):
            return Finished(True, None, current)
        append_event(connection, end.attempt, "late_report", end.outcome.to_json())
        return Finished(False, None, current)

    # -- launching ----------------------------------------------------------------------------------------------

    def launched(self, reports: Sequence[LaunchReport], executor: ExecutorType | None = None) -> frozenset[AttemptId]:
        """Record that a back end started attempts; those of them that were given to it and are live.

        A report is believed about an attempt of the back end it names (of ``executor``, when the caller knows who
        speaks). The first one counts: again changes nothing.
        """
        with self._database.transaction() as connection:
            # In one order everywhere: a second delivery of some of them may be recorded at the same time.
            ordered = sorted(reports, key=lambda one: (one.attempt.task_instance_id, one.attempt.try_number))
            return frozenset(one.attempt for one in ordered if _is_launched(connection, one, executor))

    def request_cancel(self, task_instance_id: str, try_number: int | None = None) -> TaskInstanceView:
        """Ask a try to stop. One that nobody runs yet ends at once; a holder is told at its next call.

        Raises:
            NotFound: no such task instance or try.
        """
        parameters = {"p_ti": task_instance_id, **({} if try_number is None else {"p_try": try_number})}
        with self._database.transaction() as connection:
            request = task_instance_sql.request_cancel(newest=try_number is None)
            view = _read(connection, request, parameters)
            if view is None:
                return self._get(connection, task_instance_id, try_number)
            append_event(connection, view.attempt, "cancel_requested", {})
            if view.holder is not None:
                return view
            outcome = Outcome.failed(FailureReason.CANCELLED, "cancelled before it ran")
            end = _End(view.attempt, outcome, FinishCondition(unclaimed=True), may_relaunch=False)
            finished = self._write(connection, end, outcome, None)
            return finished.view if finished and finished.view else view


def _read(connection: sa.Connection, statement: sa.Executable, parameters: dict[str, Any]) -> TaskInstanceView | None:
    """The one try that a statement returns."""
    row = connection.execute(statement, parameters).mappings().first()
    return None if row is None else TaskInstanceView.from_row(row)


def _is_launched(connection: sa.Connection, report: LaunchReport, executor: ExecutorType | None) -> bool:
    named = BackEnd.parse(report.back_end).executor if report.back_end else executor
    if executor not in (None, named):
        return False
    parameters = {
        **attempt_parameters(report.attempt),
        "p_external_name": report.external_name,
        "p_back_end": report.back_end,
        "p_hostname": storable(report.hostname)[:_HOSTNAME_CHARACTERS],
        **({"p_executor": named.value} if named else {}),
        **(_back_end_parameters(report.back_end) if report.back_end else {}),
    }
    statement = task_instance_sql.launched(of_executor=named is not None, at_back_end=bool(report.back_end))
    return connection.execute(statement, parameters).rowcount > 0


def _end_parameters(outcome: Outcome) -> dict[str, object]:
    return {
        "p_state": outcome.state.value,
        "p_reason": outcome.reason.value if outcome.reason else None,
        "p_message": outcome.message,
        "p_exit_code": outcome.exit_code,
        "p_last_event": outcome.last_event,
        "p_log_tail": list(outcome.log_tail),
    }


def _cancelled_message(outcome: Outcome) -> str:
    return f"cancelled ({outcome.message})" if outcome.message else "cancelled"
