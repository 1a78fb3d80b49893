"""Heartbeats of many holders in few statements."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.store.database import CHUNK_ROWS, Database, batched
from leoflow_celery.store.models import TaskInstance, is_live, table_of

_T = table_of(TaskInstance).c


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


def record_heartbeats(database: Database, beats: Collection[Beat], lease_seconds: float) -> BeatVerdicts:
    """Renew many claims in one transaction and say which holders must stop."""
    if not beats:
        return BeatVerdicts(frozenset(), frozenset())
    now = time.time()
    of_holder = {beat.holder: beat.attempt for beat in beats}
    live: dict[str, float | None] = {}
    with database.transaction() as connection:
        # In one order everywhere: two gateways may flush the beats of an agent that moved between them.
        for chunk in batched(sorted(of_holder.items(), key=lambda item: item[1].task_instance_id), CHUNK_ROWS):
            live |= {
                holder: cancelled_at
                for holder, cancelled_at, *attempt in connection.execute(_renewal(chunk, now, lease_seconds))
                if of_holder.get(holder) == AttemptId(*attempt)
            }
    return BeatVerdicts(
        frozenset(of_holder.keys() - live.keys()),
        frozenset(holder for holder, cancelled_at in live.items() if cancelled_at is not None),
    )


def _renewal(chunk: list[tuple[str, AttemptId]], now: float, lease_seconds: float) -> sa.Executable:
    return (
        sa.update(table_of(TaskInstance))
        .where(
            _T.task_instance_id.in_([attempt.task_instance_id for _, attempt in chunk]),
            _T.holder.in_([holder for holder, _ in chunk]),
            is_live(),
        )
        .values(last_heartbeat_at=now, lease_until=now + lease_seconds)
        .returning(_T.holder, _T.cancel_requested_at, _T.task_instance_id, _T.try_number, _T.launch)
    )
