"""Who holds an attempt now, for writers that hold a claim already: reads, and writes fenced by one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.states import TERMINAL, TaskState
from leoflow_celery.domain.xcom import XComKey, XComValue
from leoflow_celery.errors import Fenced
from leoflow_celery.store import task_instance_sql
from leoflow_celery.store.attempts import Beat, BeatVerdicts
from leoflow_celery.store.database import Database
from leoflow_celery.store.task_instance_sql import attempt_parameters
from leoflow_celery.store.xcom.base import XComStore


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


class ClaimStore:
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
            connection.execute(task_instance_sql.select_any()).first()

    def claim(self, task_instance_id: str, try_number: int) -> Claim | None:
        """The claim on a try, None when the try is not recorded."""
        parameters = {"p_ti": task_instance_id, "p_try": try_number}
        with self._database.reading() as connection:
            row = connection.execute(task_instance_sql.select_claim(), parameters).first()
        if row is None:
            return None
        *attempt, holder, state, lease_until, ended_at, now = row
        left = None if lease_until is None else lease_until - now
        ended = max(now - (ended_at or now), 0.0) if TaskState(state) in TERMINAL else None
        return Claim(AttemptId(*attempt), TaskState(state), holder, left, ended)

    def hand_over(self, attempt: AttemptId, before: str, after: str) -> bool:
        """Rename the holder of a live attempt; False when it has another one by now. Its lease stays as it is."""
        parameters = {**attempt_parameters(attempt), "p_holder": before, "p_after": after}
        with self._database.transaction() as connection:
            return bool(connection.execute(task_instance_sql.hand_over(), parameters).rowcount)

    def verdicts(self, beats: Collection[Beat]) -> BeatVerdicts:
        """What ``AttemptStore.heartbeat`` would find, without renewing anything."""
        if not beats:
            return BeatVerdicts(frozenset(), frozenset())
        with self._database.reading() as connection:
            return BeatVerdicts.find(connection, task_instance_sql.select_held(), beats)

    def put_xcoms(self, attempt: AttemptId, holder: str, items: Sequence[tuple[XComKey, XComValue]]) -> None:
        """Store values of an attempt that the holder holds; the check and the values are one transaction.

        Raises:
            Fenced: the holder lost the attempt, or it has ended.
        """
        # SQLite's transaction has the only write lock already.
        held = task_instance_sql.lock_claim(locking=not self._database.is_sqlite)
        with self._database.transaction() as connection:
            if connection.execute(held, {**attempt_parameters(attempt), "p_holder": holder}).first() is None:
                raise Fenced(f"attempt {attempt} is not held by the writer any more")
            self._xcom.put(items, connection)
