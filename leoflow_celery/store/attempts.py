"""Claims, heartbeats and ends of attempts: every write is a compare-and-set.

The database decides, not the message: whoever wants to run an attempt claims it here, and whoever writes about one
must still hold it. A write that finds nothing to change says why.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from leoflow_celery.domain.attempt import AttemptId, LaunchReport
from leoflow_celery.domain.outcome import Outcome, storable
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.relaunch import Memory, Relaunch, RelaunchPolicy, relaunch_decision
from leoflow_celery.domain.states import TERMINAL, TaskState
from leoflow_celery.domain.xcom import XComKey, XComValue
from leoflow_celery.errors import ClaimRefused, Fenced, InvalidRequest, NotFound
from leoflow_celery.store import statements
from leoflow_celery.store.database import CHUNK_ROWS, Database, batched
from leoflow_celery.store.events import append_event
from leoflow_celery.store.heartbeats import Beat, BeatVerdicts, record_heartbeats
from leoflow_celery.store.listeners import Listeners
from leoflow_celery.store.models import TaskInstance, is_live, table_of
from leoflow_celery.store.statements import Free
from leoflow_celery.store.views import Finished, TaskInstanceView
from leoflow_celery.store.xcom.base import XComStore

__all__ = ["ANY", "AttemptStore", "Beat", "BeatVerdicts", "Guard", "batched"]

_T = table_of(TaskInstance).c
_HOSTNAME_CHARACTERS = 255


@dataclass(frozen=True, slots=True)
class Guard:
    """Under which condition a writer may end an attempt; a set field must hold.

    ``holder``: the claim is mine. ``unclaimed``: nobody has claimed it (a launch failed before any agent called).
    ``unlaunched``: no executor has told that it started it. ``silent_since``: no heartbeat came after this time (a
    reaper saw silence and must not kill what woke up).
    """

    holder: str | None = None
    unclaimed: bool = False
    unlaunched: bool = False
    silent_since: float | None = None

    def names(self) -> frozenset[str]:
        """Which conditions hold."""
        given = {
            "holder": self.holder is not None,
            "unclaimed": self.unclaimed,
            "unlaunched": self.unlaunched,
            "silent_since": self.silent_since is not None,
        }
        return frozenset(name for name, is_given in given.items() if is_given)

    def parameters(self) -> dict[str, object]:
        """What the conditions compare with."""
        values = {"p_holder": self.holder, "p_silent_since": self.silent_since}
        return {name: value for name, value in values.items() if value is not None}


ANY = Guard()


class AttemptStore:
    """The life of attempts after they were recorded (see ``submissions`` for before)."""

    def __init__(
        self, database: Database, xcom: XComStore, listeners: Listeners, policy: RelaunchPolicy | None = None
    ) -> None:
        self._database, self._xcom, self._listeners = database, xcom, listeners
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
        query = statements.select_try(newest=try_number is None)
        row = connection.execute(query, {"p_ti": task_instance_id, "p_try": try_number}).mappings().first()
        if row is None:
            which = "" if try_number is None else f" try {try_number}"
            raise NotFound(f"task instance {task_instance_id!r}{which} does not exist")
        return TaskInstanceView.from_row(row)

    def ended(self, attempts: Collection[AttemptId]) -> list[TaskInstanceView]:
        """The tries of these attempts that are over."""
        tries = {(one.task_instance_id, one.try_number) for one in attempts}
        found = []
        with self._database.reading() as connection:
            for chunk in batched(tries, CHUNK_ROWS):
                parameters = {"p_ids": [task_instance_id for task_instance_id, _ in chunk]}
                rows = connection.execute(statements.select_ended(), parameters).mappings()
                found += [TaskInstanceView.from_row(row) for row in rows]
        return [view for view in found if (view.task_instance_id, view.try_number) in tries]

    # -- the claim ----------------------------------------------------------------------------------------------

    def claim(
        self, attempt: AttemptId, holder: str, hostname: str, lease_seconds: float, *, start: bool = False
    ) -> TaskInstanceView:
        """Make ``holder`` the only one who may run the attempt; again by the same holder is fine.

        With ``start`` the attempt is running at once (inline tasks, which have no agent to report it).

        Raises:
            ClaimRefused: why is unknown, terminal, superseded (a later launch or try exists) or held (by a live holder,
                or by one whose heartbeats nobody could hear).
        """
        now = time.time()
        parameters = {
            **statements.attempt_parameters(attempt),
            "p_holder": holder,
            "p_hostname": storable(hostname)[:_HOSTNAME_CHARACTERS],
            "p_until": now + lease_seconds,
            "p_now": now,
        }
        with self._database.transaction() as connection:
            free = _claim(connection, Free.UNCLAIMED, start, parameters)
            again = free or _claim(connection, Free.SAME_HOLDER, start, parameters)
            view = again or _claim(connection, Free.EXPIRED, start, parameters)
            if view is None:
                raise self._refusal(connection, attempt)
            if not again and not self._listeners.may_judge(view.executor, lease_seconds, connection):
                # This takes the claim back: after an outage a holder that lives has an old lease too.
                raise ClaimRefused("held", f"attempt {attempt} is held, and its holder's heartbeats may come late")
            # The same holder asking again begins nothing: what it pushed meanwhile stays.
            if free or not again:
                self._begin(connection, view, now, replaces=not free)
        return view

    def _begin(self, connection: sa.Connection, view: TaskInstanceView, now: float, *, replaces: bool) -> None:
        if replaces or view.try_number > 1 or view.launch > 1:
            # A consumer must never see a value of a try, launch or holder that did not succeed.
            self._xcom.delete_task(view.tenant_id, view.dag_id, view.run_id, view.task_id, connection)
        append_event(connection, view.attempt, "claimed", {"hostname": view.hostname}, now)

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
        parameters = {**statements.attempt_parameters(attempt), "p_holder": holder, "p_now": time.time()}
        with self._database.transaction() as connection:
            if connection.execute(statements.start(), parameters).rowcount == 0:
                raise Fenced(f"attempt {attempt} is not held by the writer any more")

    def heartbeat(self, beats: Collection[Beat], lease_seconds: float) -> BeatVerdicts:
        """Renew many claims in one transaction and say which holders must stop."""
        return record_heartbeats(self._database, beats, lease_seconds)

    # -- the end ------------------------------------------------------------------------------------------------

    def finish(
        self,
        attempt: AttemptId,
        outcome: Outcome,
        guard: Guard = ANY,
        xcoms: Sequence[tuple[XComKey, XComValue]] = (),
        *,
        may_relaunch: bool = True,
    ) -> Finished:
        """Record how the attempt ended, with its XComs, in one transaction; or start the next launch instead.

        The first end wins. A later one becomes an event, and so does one whose guard does not hold. The same end by
        the same holder again (its acknowledgement was lost) counts as recorded. Without ``may_relaunch`` a failure is
        final whatever its budget says.

        Raises:
            InvalidRequest: the outcome is no end.
        """
        if outcome.state not in TERMINAL:
            raise InvalidRequest(
                f"state: {outcome.state} is no end of an attempt; use success, failed or skipped", "state"
            )
        now = time.time()
        with self._database.transaction() as connection:
            relaunch = None
            if outcome.state is TaskState.FAILED:
                outcome, relaunch = self._judge(connection, attempt, outcome)
            relaunch = relaunch if may_relaunch else None
            if relaunch:
                statement = statements.next_launch(guard.names())
                values: dict[str, object] = {"p_now": now, "p_send_after": now + relaunch.delay_seconds}
                values["p_growths"] = int(relaunch.growth is not None)
            else:
                statement = statements.end(outcome.state, guard.names())
                values = {f"p_{name}": value for name, value in self._end(outcome, now).items()}
            parameters = {**statements.attempt_parameters(attempt), **guard.parameters(), **values}
            row = connection.execute(statement, parameters).mappings().first()
            if row is None:
                return self._too_late(connection, attempt, outcome, guard, now)
            self._xcom.put(xcoms, connection)
            name = "relaunched" if relaunch else "finished"
            growth = {"memory_limit": str(relaunch.growth)} if relaunch and relaunch.growth else {}
            append_event(connection, attempt, name, {**outcome.to_json(), **growth}, now)
        return Finished(True, relaunch, TaskInstanceView.from_row(row))

    def _judge(
        self, connection: sa.Connection, attempt: AttemptId, outcome: Outcome
    ) -> tuple[Outcome, Relaunch | None]:
        # Locked until the end is written: a cancellation in between would be forgotten by a relaunch.
        columns = (_T.cancel_requested_at, _T.memory_limit, _T.oom_memory_factor, _T.oom_relaunches)
        query = sa.select(*columns).where(statements.is_attempt()).with_for_update()
        row = connection.execute(query, statements.attempt_parameters(attempt)).first()
        cancelled_at, *memory = row or (None, 0, 1.0, 0)
        if cancelled_at is not None:
            return outcome.evolve(reason=FailureReason.CANCELLED, message=_cancelled_message(outcome)), None
        reason = outcome.reason or FailureReason.NON_ZERO_EXIT
        return outcome.evolve(reason=reason), relaunch_decision(reason, attempt.launch, self._policy, Memory(*memory))

    @staticmethod
    def _end(outcome: Outcome, now: float) -> dict[str, object]:
        return {
            "state": outcome.state.value,
            "reason": outcome.reason.value if outcome.reason else None,
            "message": outcome.message,
            "exit_code": outcome.exit_code,
            "last_event": outcome.last_event,
            "log_tail": list(outcome.log_tail),
            "ended_at": now,
        }

    def _too_late(
        self, connection: sa.Connection, attempt: AttemptId, outcome: Outcome, guard: Guard, now: float
    ) -> Finished:
        try:
            current = self._get(connection, attempt.task_instance_id, attempt.try_number)
        except NotFound:
            return Finished(False)
        same_writer = guard.holder is not None and guard.holder == current.holder
        if same_writer and current.attempt == attempt and current.state is outcome.state and current.is_terminal:
            return Finished(True, None, current)
        append_event(connection, attempt, "late_report", outcome.to_json(), now)
        return Finished(False, None, current)

    # -- launching ----------------------------------------------------------------------------------------------

    def launched(self, reports: Sequence[LaunchReport]) -> frozenset[AttemptId]:
        """Record that an executor started attempts; those of them that are still waiting for that."""
        now = time.time()
        with self._database.transaction() as connection:
            # In one order everywhere: a second delivery of some of them may be recorded at the same time.
            return frozenset(
                report.attempt
                for report in sorted(reports, key=lambda one: (one.attempt.task_instance_id, one.attempt.try_number))
                if connection.execute(statements.launched(), _launched_parameters(report, now)).rowcount
            )

    def request_cancel(self, task_instance_id: str, try_number: int | None = None) -> TaskInstanceView:
        """Ask a try to stop. One that nobody runs yet ends at once; a holder is told at its next call.

        Raises:
            NotFound: no such task instance or try.
        """
        now = time.time()
        with self._database.transaction() as connection:
            view = self._get(connection, task_instance_id, try_number)
            # Of any launch: the try may have been started again since it was read.
            of_try = sa.and_(_T.task_instance_id == task_instance_id, _T.try_number == view.try_number, is_live())
            update = sa.update(table_of(TaskInstance)).where(of_try)
            asked = connection.execute(
                update.where(_T.cancel_requested_at.is_(None)).values(cancel_requested_at=now).returning(_T.launch)
            ).first()
            if asked is not None:
                attempt = view.attempt.evolve(launch=asked.launch)
                append_event(connection, attempt, "cancel_requested", {}, now)
                outcome = Outcome.failed(FailureReason.CANCELLED, "cancelled before it ran")
                if connection.execute(update.where(_T.holder.is_(None)).values(self._end(outcome, now))).rowcount:
                    append_event(connection, attempt, "finished", outcome.to_json(), now)
            return self._get(connection, task_instance_id, view.try_number)


def _claim(
    connection: sa.Connection, free: Free, start: bool, parameters: dict[str, object]
) -> TaskInstanceView | None:
    row = connection.execute(statements.claim(free, start), parameters).mappings().first()
    return None if row is None else TaskInstanceView.from_row(row)


def _launched_parameters(report: LaunchReport, now: float) -> dict[str, object]:
    return {
        **statements.attempt_parameters(report.attempt),
        "p_now": now,
        "p_external_name": report.external_name,
        "p_back_end": report.back_end,
        "p_hostname": storable(report.hostname)[:_HOSTNAME_CHARACTERS],
    }


def _cancelled_message(outcome: Outcome) -> str:
    return f"cancelled ({outcome.message})" if outcome.message else "cancelled"
