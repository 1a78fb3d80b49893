"""Who is there: back ends that take work, and those who hear the heartbeats of holders.

A holder's silence means something only when its listeners have been there for long enough. Inline workers write their
heartbeats themselves; whether the database was there to take them, the reaper knows, who looks into it all the time.
Agents are heard by gateways, which need the database as well.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection
from contextlib import nullcontext
from enum import StrEnum

import sqlalchemy as sa

from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.reap import may_judge_silence
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.store.database import Database
from leoflow_celery.store.models import CLOCK_STEP_SECONDS, DatabaseTime, Presence, database_now, table_of

log = logging.getLogger(__name__)
_TABLE = table_of(Presence)
#: A back end that was not heard of for four announcements is away.
BACK_END_GAP_SECONDS = 60.0
_GATEWAY_GAP_SECONDS = 15.0
_FORGOTTEN_SECONDS = 3_600.0
#: Reaps missed in a row until the reaper counts as having been away (with it, perhaps, the database).
_REAPER_GAPS = 4
_SEEN = sa.select(_TABLE.c.kind, _TABLE.c.name, _TABLE.c.since, _TABLE.c.seen_at, DatabaseTime().label("now"))


class Kind(StrEnum):
    """What is present."""

    #: A worker holds the back end that ``name`` says.
    BACK_END = "back_end"
    #: A gateway hears heartbeats and can write them: without a name any of them, else the one of this id.
    GATEWAY = "gateway"
    #: The reaper can look.
    REAPER = "reaper"
    #: The database's clock runs evenly.
    CLOCK = "clock"


class PresenceStore:
    """Presence in SQL, by the database's clock."""

    def __init__(self, database: Database, reap_interval_seconds: float) -> None:
        self._database = database
        self._gaps = {
            Kind.BACK_END: BACK_END_GAP_SECONDS,
            Kind.GATEWAY: _GATEWAY_GAP_SECONDS,
            Kind.REAPER: _REAPER_GAPS * reap_interval_seconds,
        }
        #: The database's clock and our own monotonic one, when they were last compared.
        self._compared: tuple[float, float] | None = None
        now, ago = DatabaseTime(), DatabaseTime(sa.bindparam("p_gap", type_=sa.Double()))
        # Last seen in the future: the database's clock was set back.
        ahead = DatabaseTime(sa.bindparam("p_ahead", type_=sa.Double()))
        since = sa.case((sa.or_(_TABLE.c.seen_at < ago, _TABLE.c.seen_at > ahead), now), else_=_TABLE.c.since)
        names: dict[str, object] = {name: sa.bindparam(f"p_{name}") for name in ("kind", "name")}
        self._keep = (
            database.insert(_TABLE)
            .values(**names, since=now, seen_at=now)
            .on_conflict_do_update(index_elements=["kind", "name"], set_={"since": since, "seen_at": now})
        )
        self._begin = (
            database.insert(_TABLE)
            .values(kind=Kind.CLOCK.value, name="", since=now, seen_at=now)
            .on_conflict_do_update(index_elements=["kind", "name"], set_={"since": now, "seen_at": now})
        )

    def keep_present(self, kind: Kind, name: str = "") -> None:
        """Say "still here". After an absence longer than the kind's gap the presence starts anew."""
        gap = self._gaps[kind]
        parameters = {"p_kind": kind.value, "p_name": name, "p_gap": -gap, "p_ahead": gap}
        with self._database.transaction() as connection:
            connection.execute(self._keep, parameters)

    def leave(self, kind: Kind, name: str) -> None:
        """Say "gone", and forget whoever of the kind was not heard of for an hour."""
        long_ago = _TABLE.c.seen_at < DatabaseTime(-_FORGOTTEN_SECONDS)
        gone = sa.and_(_TABLE.c.kind == kind.value, sa.or_(_TABLE.c.name == name, long_ago))
        with self._database.transaction() as connection:
            connection.execute(sa.delete(_TABLE).where(gone))

    def even_seconds(self) -> float:
        """For how long the database's clock has run evenly, as far as anybody who called this has seen.

        A clock that was set, by a correction or because another server took over, makes every time that was written
        before it older or younger by the step: an age that reaches back beyond it says nothing.
        """
        since = sa.select(_TABLE.c.since, DatabaseTime()).where(_TABLE.c.kind == Kind.CLOCK.value)
        with self._database.transaction() as connection:
            now, monotonic = database_now(connection), time.monotonic()
            if self._compared is not None and abs(step := _step(self._compared, now, monotonic)) > CLOCK_STEP_SECONDS:
                log.warning("database.clock_was_set", extra={"seconds": round(step, 3)})
                connection.execute(self._begin)
            self._compared = (now, monotonic)
            found = connection.execute(since).first()
        return math.inf if found is None else max(found[1] - found[0], 0.0)

    def gateways(self) -> dict[str, float]:
        """The gateways that are present and for how many seconds; "" is any of them, without a gap between two."""
        return {name: seconds for (_, name), seconds in self._present([Kind.GATEWAY], None).items()}

    def back_ends(self, executor: ExecutorType | None = None, connection: sa.Connection | None = None) -> list[BackEnd]:
        """The back ends that are present: of one executor, or all. ``connection`` is the caller's transaction."""
        names = sorted(name for _, name in self._present([Kind.BACK_END], connection))
        return [one for one in map(BackEnd.parse, names) if executor in (None, one.executor)]

    def may_judge(self, executor: str, timeout_seconds: float, connection: sa.Connection | None = None) -> bool:
        """Whether a holder of this executor that was silent for the timeout is to be taken for lost.

        ``connection`` is the caller's transaction, if it has one.
        """
        listeners = [Kind.REAPER] if executor == ExecutorType.INLINE else [Kind.REAPER, Kind.GATEWAY]
        listening = self._present(listeners, connection)
        return all(may_judge_silence(listening.get((kind, "")), timeout_seconds) for kind in listeners)

    def _present(self, kinds: Collection[Kind], connection: sa.Connection | None) -> dict[tuple[Kind, str], float]:
        """Who of these kinds is present, and for how many seconds without a gap until now."""
        query = _SEEN.where(_TABLE.c.kind.in_(kinds))
        with self._database.reading() if connection is None else nullcontext(connection) as reader:
            return {
                (Kind(kind), name): now - since
                for kind, name, since, seen_at, now in reader.execute(query)
                if abs(now - seen_at) <= self._gaps[Kind(kind)]
            }


def _step(before: tuple[float, float], now: float, monotonic: float) -> float:
    """By how much more the database's clock went on than ours, which nobody sets."""
    return (now - before[0]) - (monotonic - before[1])
