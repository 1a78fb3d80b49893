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
    """The claim on a try as it stands; ``attempt`` is the current launch."""

    attempt: AttemptId
    state: TaskState
    holder: str | None
    lease_until: float | None

    def belongs_to(self, attempt: AttemptId, holder: str) -> bool:
        """Whether this is the holder of this launch, ended or not."""
        return self.attempt == attempt and self.holder == holder

    def is_live_for(self, attempt: AttemptId, holder: str) -> bool:
        """Whether the holder may still change something."""
        return self.belongs_to(attempt, holder) and self.state not in TERMINAL


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
        *attempt, holder, state, lease_until = row
        return Claim(AttemptId(*attempt), TaskState(state), holder, lease_until)

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
                raise Fenced(f"attempt {attempt} is not held by {holder} any more")
            self._xcom.put(items, connection)
