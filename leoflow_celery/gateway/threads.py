"""The thread pools behind the event loop: SQL, heartbeats, log files, notifications and a cluster wait apart.

Whatever blocks in one of them (a locked database, a slow disk, a broker that is away) does not block the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

LOG_THREADS = 4
#: So many calls to a cluster at a time; the rest waits.
REVIEW_THREADS = 8
_NOTIFY_THREADS = 2


class Threads:
    """One pool per kind of waiting."""

    def __init__(self, store_threads: int) -> None:
        self._store = ThreadPoolExecutor(store_threads, "gateway-store")
        self.beats = ThreadPoolExecutor(1, "gateway-beats")
        self.logs = ThreadPoolExecutor(LOG_THREADS, "gateway-logs")
        self.notify = ThreadPoolExecutor(_NOTIFY_THREADS, "gateway-notify")
        self._reviews = ThreadPoolExecutor(REVIEW_THREADS, "gateway-reviews")

    async def store(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a call that talks to SQL or reads a file."""
        work = self._store.submit(function, *args, **kwargs)
        return await asyncio.wrap_future(work)

    async def review(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a call that talks to a cluster."""
        return await asyncio.wrap_future(self._reviews.submit(function, *args, **kwargs))

    def close(self) -> None:
        """End the pools: what waits in them is dropped, what runs is waited for."""
        pools = (self._store, self.beats, self.logs, self.notify, self._reviews)
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown(wait=True)
