"""The thread pools behind the event loop: SQL, heartbeats, log files, notifications and a cluster wait apart.

Whatever blocks in one of them (a locked database, a slow disk, a broker that is away) does not block the others.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

from leoflow_celery.domain.schema import PROCESSES
from leoflow_celery.errors import GatewayUnavailable

P = ParamSpec("P")
R = TypeVar("R")

LOG_THREADS = 4
#: So many calls to a cluster at a time; the rest waits.
REVIEW_THREADS = 8
_NOTIFY_THREADS = 2
#: Checks of one tenant's values that run and that wait. Each of them holds a value.
_CHECKS_AT_A_TIME, _CHECKS_WAITING = max(1, PROCESSES // 2), 32


class Turns:
    """So many at a time for each key, so many that wait, and the next one is told to come again.

    One tenant's or one attempt's work is a queue of its own, and nobody else stands in it. For one event loop.
    """

    def __init__(self, at_a_time: int, waiting: int, what: str) -> None:
        """``what`` they are, for the refusal: "calls of one attempt"."""
        self._at_a_time, self._most, self._what = at_a_time, at_a_time + waiting, what
        self._here: Counter[Hashable] = Counter()
        self._gates: WeakValueDictionary[Hashable, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, key: Hashable) -> AsyncIterator[None]:
        """Wait for a turn, and have it until the end of the block.

        Raises:
            GatewayUnavailable: too many wait already.
        """
        if self._here[key] >= self._most:
            raise GatewayUnavailable(f"more than {self._most} {self._what} at a time; wait for their answers")
        self._here[key] += 1
        try:
            gate = self._gates.setdefault(key, asyncio.Semaphore(self._at_a_time))
            async with gate:
                yield
        finally:
            self._here[key] -= 1
            if not self._here[key]:
                del self._here[key]


class Threads:
    """One pool per kind of waiting."""

    def __init__(self, store_threads: int) -> None:
        self._store = ThreadPoolExecutor(store_threads, "gateway-store")
        self.beats = ThreadPoolExecutor(1, "gateway-beats")
        self.logs = ThreadPoolExecutor(LOG_THREADS, "gateway-logs")
        self.notify = ThreadPoolExecutor(_NOTIFY_THREADS, "gateway-notify")
        self._reviews = ThreadPoolExecutor(REVIEW_THREADS, "gateway-reviews")
        self._checks = ThreadPoolExecutor(PROCESSES, "gateway-checks")
        self._check_turns = Turns(_CHECKS_AT_A_TIME, _CHECKS_WAITING, "values of one tenant")

    async def store(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a call that talks to SQL or reads a file."""
        work = self._store.submit(function, *args, **kwargs)
        return await asyncio.wrap_future(work)

    async def review(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a call that talks to a cluster."""
        return await asyncio.wrap_future(self._reviews.submit(function, *args, **kwargs))

    async def check(self, tenant_id: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a call that looks at what a task sent, however long that takes; a tenant waits for its own only.

        Raises:
            GatewayUnavailable: too many of the tenant's wait already.
        """
        async with self._check_turns.turn(tenant_id):
            return await asyncio.wrap_future(self._checks.submit(function, *args, **kwargs))

    def close(self) -> None:
        """End the pools: what waits in them is dropped, what runs is waited for."""
        pools = (self._store, self.beats, self.logs, self.notify, self._reviews, self._checks)
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown(wait=True)
