"""Named leases: single flight across any number of beats and workers, and presence of those who listen."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from leoflow_celery.store.database import Database
from leoflow_celery.store.models import Lease, table_of

_TABLE = table_of(Lease)
#: Present while any gateway hears heartbeats and can write them.
GATEWAY_PRESENCE = "presence.gateway"
#: Present while the reaper can look.
REAPER_PRESENCE = "presence.reaper"
GATEWAY_GAP_SECONDS = 15
#: Present while a worker holds the back end; the executor and, where there are several, the host follow.
BACK_END_PRESENCE = "presence.backend."
#: Four announcements.
PRESENCE_GAP_SECONDS = 60


class LeaseStore:
    """Leases in SQL. A holder that dies is replaced when its lease runs out."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def acquire(self, name: str, holder: str, ttl_seconds: float) -> bool:
        """Take the lease if it is free, expired or already ours."""
        now = time.time()
        insert = self._database.insert(_TABLE).values(name=name, holder=holder, until=now + ttl_seconds)
        take = insert.on_conflict_do_update(
            index_elements=["name"],
            set_={"holder": holder, "until": now + ttl_seconds},
            where=sa.or_(_TABLE.c.until < now, _TABLE.c.holder == holder),
        )
        with self._database.transaction() as connection:
            return connection.execute(take.returning(_TABLE.c.name)).first() is not None

    def release(self, name: str, holder: str) -> None:
        with self._database.transaction() as connection:
            connection.execute(sa.delete(_TABLE).where(_TABLE.c.name == name, _TABLE.c.holder == holder))

    def forget(self, prefix: str, older_than_seconds: float) -> None:
        """Remove leases whose names start with ``prefix`` and that ran out so long ago: nobody will take them again."""
        old = sa.and_(
            _TABLE.c.name.startswith(prefix, autoescape=True), _TABLE.c.until < time.time() - older_than_seconds
        )
        with self._database.transaction() as connection:
            connection.execute(sa.delete(_TABLE).where(old))

    @contextmanager
    def single_flight(self, name: str, ttl_seconds: float) -> Iterator[bool]:
        """True inside for the one caller that may work; the lease ends with the block or with its time."""
        holder = uuid.uuid4().hex
        held = self.acquire(name, holder, ttl_seconds)
        try:
            yield held
        finally:
            if held:
                self.release(name, holder)

    def keep_present(self, name: str, gap_seconds: float) -> None:
        """Say "still here". An absence of more than ``gap_seconds`` starts the presence anew."""
        now = time.time()
        since = sa.case((_TABLE.c.until < now - gap_seconds, repr(now)), else_=_TABLE.c.holder)
        insert = self._database.insert(_TABLE).values(name=name, holder=repr(now), until=now)
        with self._database.transaction() as connection:
            connection.execute(
                insert.on_conflict_do_update(index_elements=["name"], set_={"holder": since, "until": now})
            )

    def present_seconds(self, name: str, gap_seconds: float) -> float | None:
        """For how long somebody has been present without a gap until now; None when nobody is."""
        with self._database.reading() as connection:
            return present_seconds(connection, name, gap_seconds)

    def present(self, prefix: str, gap_seconds: float) -> list[str]:
        """Who of those whose names start with ``prefix`` has been present within the gap; without the prefix."""
        with self._database.reading() as connection:
            return present(connection, prefix, gap_seconds)


def present_seconds(connection: sa.Connection, name: str, gap_seconds: float) -> float | None:
    """``LeaseStore.present_seconds`` inside the caller's transaction."""
    now = time.time()
    query = sa.select(_TABLE.c.holder).where(_TABLE.c.name == name, _TABLE.c.until >= now - gap_seconds)
    since = connection.execute(query).scalar()
    return None if since is None else now - float(since)


def present(connection: sa.Connection, prefix: str, gap_seconds: float) -> list[str]:
    """``LeaseStore.present`` inside the caller's transaction."""
    query = sa.select(_TABLE.c.name).where(
        _TABLE.c.name.startswith(prefix, autoescape=True), _TABLE.c.until >= time.time() - gap_seconds
    )
    return sorted(name.removeprefix(prefix) for name in connection.execute(query).scalars())
