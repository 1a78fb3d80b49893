"""Who has been present for how long, for tests whose holders fall silent at once and whose back ends come and go."""

from __future__ import annotations

import sqlalchemy as sa

from leoflow_celery.store import Store
from leoflow_celery.store.models import DatabaseTime, Presence, table_of
from leoflow_celery.store.presence import Kind

_TABLE = table_of(Presence)


def set_presence(store: Store, kind: Kind, name: str = "", *, since_seconds: float, seen_seconds: float = 0.0) -> None:
    """It has been present for ``since_seconds`` and was seen ``seen_seconds`` ago."""
    store.presence.keep_present(kind, name)
    times = {"since": DatabaseTime(-float(since_seconds)), "seen_at": DatabaseTime(-float(seen_seconds))}
    with store.database.transaction() as connection:
        is_one = sa.and_(_TABLE.c.kind == kind.value, _TABLE.c.name == name)
        assert connection.execute(sa.update(_TABLE).where(is_one).values(**times)).rowcount == 1


def listened(store: Store, reaper_seconds: float | None = 3_600, gateway_seconds: float | None = 3_600) -> None:
    """Reaper and gateway have been there without a gap for so long, until now; None: not at all."""
    for kind, seconds in ((Kind.REAPER, reaper_seconds), (Kind.GATEWAY, gateway_seconds)):
        if seconds is not None:
            set_presence(store, kind, since_seconds=seconds)
