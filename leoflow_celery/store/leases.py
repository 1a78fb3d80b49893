"""Named leases: single flight across any number of beats and workers."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import sqlalchemy as sa

from leoflow_celery.background import RenewedLease
from leoflow_celery.store.database import Database
from leoflow_celery.store.models import DatabaseTime, Lease, table_of

_TABLE = table_of(Lease)
#: Longer than any lease that is taken.
_LONGEST_SECONDS = 600.0


class LeaseStore:
    """Leases in SQL, by the database's clock. A holder that dies is replaced when its lease runs out."""

    def __init__(self, database: Database) -> None:
        self._database = database
        lease = {"holder": sa.bindparam("p_holder"), "until": DatabaseTime(sa.bindparam("p_ttl", type_=sa.Double()))}
        # A lease of minutes that ends an hour from now was given before the clock was set back.
        is_past = sa.or_(_TABLE.c.until < DatabaseTime(), _TABLE.c.until > DatabaseTime(_LONGEST_SECONDS))
        is_free = sa.or_(is_past, _TABLE.c.holder == sa.bindparam("p_holder"))
        insert = database.insert(_TABLE).values(name=sa.bindparam("p_name"), **lease)
        take = insert.on_conflict_do_update(index_elements=["name"], set_=lease, where=is_free)
        self._take = take.returning(_TABLE.c.name)
        is_held = sa.and_(
            _TABLE.c.name == sa.bindparam("p_name"),
            _TABLE.c.holder == sa.bindparam("p_holder"),
            _TABLE.c.until >= DatabaseTime(),
        )
        self._renew = sa.update(_TABLE).where(is_held).values(until=lease["until"])

    def acquire(self, name: str, holder: str, ttl_seconds: float) -> bool:
        """Take the lease if it is free, expired or already ours."""
        parameters = {"p_name": name, "p_holder": holder, "p_ttl": ttl_seconds}
        with self._database.transaction() as connection:
            return connection.execute(self._take, parameters).first() is not None

    def renew(self, name: str, holder: str, ttl_seconds: float) -> bool:
        """Let a lease start anew; False when it ran out or is somebody else's."""
        parameters = {"p_name": name, "p_holder": holder, "p_ttl": ttl_seconds}
        with self._database.transaction() as connection:
            return connection.execute(self._renew, parameters).rowcount > 0

    def release(self, name: str, holder: str) -> None:
        with self._database.transaction() as connection:
            connection.execute(sa.delete(_TABLE).where(_TABLE.c.name == name, _TABLE.c.holder == holder))

    @contextmanager
    def single_flight(self, name: str, ttl_seconds: float) -> Iterator[RenewedLease]:
        """True inside for the one caller that may work; renewed for as long as the block takes.

        A holder that dies is replaced ``ttl_seconds`` later. One that lost the lease hears it from ``check``.
        """
        holder = uuid.uuid4().hex
        held = self.acquire(name, holder, ttl_seconds)
        try:
            with RenewedLease(
                name, ttl_seconds, partial(self.renew, name, holder, ttl_seconds) if held else None
            ) as lease:
                yield lease
        finally:
            if held:
                self.release(name, holder)
