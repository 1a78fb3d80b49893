"""Who holds an attempt now, for writers that hold a claim already: reads, and writes fenced by one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.states import TERMINAL, TaskState
from leoflow_celery.domain.xcom import XComKey, XComValue
from leoflow_celery.errors import Fenced
from leoflow_celery.store.attempts import Beat, BeatVerdicts, batched
from leoflow_celery.store.database import Database, SecondsSince
from leoflow_celery.store.models import TaskInstance, is_live, table_of
from leoflow_celery.store.xcom.base import XComStore

_T = table_of(TaskInstance).c
_CHUNK = 500
_CLAIM = sa.select(_T.launch, _T.state, _T.holder, SecondsSince(_T.lease_until), SecondsSince(_T.ended_at)).where(
    _T.task_instance_id == sa.bindparam("p_ti"), _T.try_number == sa.bindparam("p_try")
)


@dataclass(frozen=True, slots=True)
class Claim:
    """The claim on a try as it stands; ``attempt`` is the current launch. Seconds are by the database's clock.

    ``lease_left_seconds`` is negative when it ran out; ``ended_seconds`` is the time since the end.
    """

    attempt: AttemptId
    state: TaskState
    holder: str | None
    lease_left_seconds: float | None
    ended_seconds: float | None = None


class HolderStore:
    """What the gateway asks on behalf of holders, far more often than they claim."""

    def __init__(self, database: Database, xcom: XComStore) -> None:
        self._database = database
        self._xcom = xcom

    def ping(self) -> None:
        """Ask the cheapest question that needs our tables.

        Raises:
            DatabaseUnavailable: the database did not answer, or has no tables.
        """
        with self._database.reading() as connection:
            connection.execute(sa.select(_T.launch).limit(1)).first()

    def claim(self, task_instance_id: str, try_number: int) -> Claim | None:
        """The claim on a try, None when the try is not recorded."""
        with self._database.reading() as connection:
            row = connection.execute(_CLAIM, {"p_ti": task_instance_id, "p_try": try_number}).first()
        if row is None:
            return None
        launch, state, holder, past_lease, since_end = row
        ended = TaskState(state) in TERMINAL
        return Claim(
            AttemptId(task_instance_id, try_number, launch),
            TaskState(state),
            holder,
            None if past_lease is None else -float(past_lease),
            max(float(since_end or 0), 0.0) if ended else None,
        )

    def hand_over(self, attempt: AttemptId, before: str, after: str) -> bool:
        """Rename the holder of a live attempt; False when it has another one by now. Its lease stays as it is."""
        held = sa.and_(
            _T.task_instance_id == attempt.task_instance_id,
            _T.try_number == attempt.try_number,
            _T.launch == attempt.launch,
            _T.holder == before,
            is_live(),
        )
        with self._database.transaction() as connection:
            return bool(connection.execute(sa.update(table_of(TaskInstance)).where(held).values(holder=after)).rowcount)

    def verdicts(self, beats: Collection[Beat]) -> BeatVerdicts:
        """What ``AttemptStore.heartbeat`` would find, without renewing anything."""
        of_holder = {beat.holder: beat.attempt for beat in beats}
        live: dict[str, float | None] = {}
        if of_holder:
            with self._database.reading() as connection:
                for chunk in batched(of_holder.items(), _CHUNK):
                    query = sa.select(
                        _T.holder, _T.task_instance_id, _T.try_number, _T.launch, _T.cancel_requested_at
                    ).where(
                        _T.task_instance_id.in_([attempt.task_instance_id for _, attempt in chunk]),
                        _T.holder.in_([holder for holder, _ in chunk]),
                        is_live(),
                    )
                    live |= {
                        holder: cancelled_at
                        for holder, ti, try_number, launch, cancelled_at in connection.execute(query)
                        if of_holder.get(holder) == AttemptId(ti, try_number, launch)
                    }
        return BeatVerdicts(
            frozenset(of_holder.keys() - live.keys()),
            frozenset(holder for holder, cancelled_at in live.items() if cancelled_at is not None),
        )

    def put_xcoms(self, attempt: AttemptId, holder: str, items: Sequence[tuple[XComKey, XComValue]]) -> None:
        """Store values of an attempt that the holder holds; the check and the values are one transaction.

        Raises:
            Fenced: the holder lost the attempt, or it has ended.
        """
        held = sa.select(_T.launch).where(
            _T.task_instance_id == attempt.task_instance_id,
            _T.try_number == attempt.try_number,
            _T.launch == attempt.launch,
            _T.holder == holder,
            is_live(),
        )
        if not self._database.is_sqlite:  # SQLite's transaction has the only write lock already
            held = held.with_for_update()
        with self._database.transaction() as connection:
            if connection.execute(held).first() is None:
                raise Fenced(f"attempt {attempt} is not held by the writer any more")
            self._xcom.put(items, connection)
