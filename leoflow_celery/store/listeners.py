"""Whether the silence of a holder means anything: who hears its heartbeats must have listened for long enough.

Inline workers write their heartbeats themselves; whether the database was there to take them, the reaper knows, who
looks into it all the time. Agents are heard by gateways, which need the database as well.
"""

from __future__ import annotations

from contextlib import nullcontext

import sqlalchemy as sa

from leoflow_celery.domain.reap import may_judge_silence
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.store.database import Database
from leoflow_celery.store.leases import (
    GATEWAY_GAP_SECONDS,
    GATEWAY_PRESENCE,
    REAPER_PRESENCE,
    LeaseStore,
    present_seconds,
)

#: Reaps missed in a row until the reaper counts as having been away (with it, perhaps, the database).
_REAPER_GAPS = 4


class Listeners:
    """Those who hear heartbeats, as SQL knows them."""

    def __init__(self, database: Database, leases: LeaseStore, reap_interval_seconds: float) -> None:
        self._database, self._leases = database, leases
        self._reaper_gap_seconds = _REAPER_GAPS * reap_interval_seconds

    def keep_reaper_present(self) -> None:
        """The reaper says that it looks, and so that the database answers."""
        self._leases.keep_present(REAPER_PRESENCE, self._reaper_gap_seconds)

    def may_judge(self, executor: str, timeout_seconds: float, connection: sa.Connection | None = None) -> bool:
        """Whether a holder of this executor that was silent for the timeout is to be taken for lost.

        ``connection`` is the caller's transaction, if it has one.
        """
        gaps = {REAPER_PRESENCE: self._reaper_gap_seconds}
        if executor != ExecutorType.INLINE:
            gaps[GATEWAY_PRESENCE] = GATEWAY_GAP_SECONDS
        with self._database.reading() if connection is None else nullcontext(connection) as reader:
            return all(
                may_judge_silence(present_seconds(reader, name, gap), timeout_seconds) for name, gap in gaps.items()
            )
