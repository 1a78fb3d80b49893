"""Somebody who has listened for heartbeats, for tests whose holders fall silent at once."""

from __future__ import annotations

import time

from leoflow_celery.store import Store
from leoflow_celery.store.leases import GATEWAY_PRESENCE, REAPER_PRESENCE


def listened(store: Store, reaper_seconds: float | None = 3_600, gateway_seconds: float | None = 3_600) -> None:
    """Reaper and gateway have been there without a gap for so long, until now; None: not at all."""
    for name, seconds in ((REAPER_PRESENCE, reaper_seconds), (GATEWAY_PRESENCE, gateway_seconds)):
        assert seconds is None or store.leases.acquire(name, repr(time.time() - seconds), 0)
