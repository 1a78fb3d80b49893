"""Heartbeats: answered from memory, written to SQL together, and the look for holders that must stop.

A call of a holder that is known here costs no SQL; the first one of another holder asks once whether it is one. Once
per interval one thread renews the claims of everybody who called, looks at the holders whose log streams are open, and
the findings are what the next calls answer. A database that is away loses no beat: they are written when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection
from typing import Any

from leoflow_celery import metrics
from leoflow_celery.clock import broker_clock
from leoflow_celery.errors import Unavailable
from leoflow_celery.gateway.sessions import Caller, Claims, HolderRegistry, Standing, Stop
from leoflow_celery.gateway.threads import Threads
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.security import TokenIssuer
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import Beat, BeatVerdicts
from leoflow_celery.store.presence import Kind

log = logging.getLogger(__name__)

#: SQL that takes longer than this counts as away.
_STUCK_SECONDS = 5.0
#: How often the reaper is told that heartbeats are heard here.
_PRESENCE_SECONDS = 3.0


class Heartbeats:
    """The Heartbeat method and the loop behind it."""

    def __init__(
        self,
        store: Store,
        tokens: TokenIssuer,
        registry: HolderRegistry,
        claims: Claims,
        threads: Threads,
        *,
        gateway: str,
        lease_seconds: float,
        flush_seconds: float,
        ended_access_seconds: float,
        on_database: Callable[[bool], object] = lambda _: None,
    ) -> None:
        """``gateway`` is this process's id; ``on_database`` is told after every flush whether SQL answered."""
        self._store, self._tokens, self._registry, self._claims = store, tokens, registry, claims
        self._threads, self._gateway = threads, gateway
        self._lease_seconds, self._flush_seconds = lease_seconds, flush_seconds
        self._ended_access_seconds = ended_access_seconds
        self._on_database = on_database
        self._pending: dict[str, Beat] = {}
        self._said_present = float("-inf")
        self._stopping = asyncio.Event()

    async def heartbeat(self, caller: Caller, _request: pb.HeartbeatRequest) -> pb.HeartbeatResponse:
        """Take a beat. Custom metrics are dropped: user code has better places for them."""
        try:
            caller = caller if caller.holder else await self._claims.identify(caller)
            why = await self._why_stopped(caller)
        except Unavailable:
            why = None
        if caller.holder and (why is None or why is Stop.CANCELLED):
            self._pending[caller.holder] = Beat(caller.attempt, caller.holder)
        elif why is Stop.FENCED:
            metrics.record_fenced("heartbeat")
        answer = pb.HeartbeatResponse(should_terminate=why is not None)
        answer.server_time.FromNanoseconds(time.time_ns())
        is_due = caller.renews and caller.identity.renew_at <= broker_clock.time()
        if is_due and self._registry.is_granted(caller.holder):
            answer.renewed_token = self._tokens.renew(caller.identity, caller.holder)
        return answer

    async def _why_stopped(self, caller: Caller) -> Stop | None:
        """Why the caller must stop, None when it need not.

        Raises:
            Fenced: the attempt ended long ago.
        """
        if self._registry.is_granted(caller.holder, self._lease_seconds):
            return self._registry.why_stopped(caller.holder)
        stopped = self._registry.why_stopped(caller.holder)
        found = await self._claims.refuse_after_the_end(caller)
        if found is not Standing.HOLDER:
            return Stop.ENDED if found is Standing.ENDED else Stop.FENCED
        self._registry.revive(caller.holder, stopped)
        return self._registry.why_stopped(caller.holder)

    async def run(self) -> None:
        """Flush every interval, and once more after ``stop`` was called."""
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self._flush_seconds)
            await self.flush()
        with contextlib.suppress(Unavailable):  # else its absence says it
            await self._threads.store(self._store.presence.leave, Kind.GATEWAY, self._gateway)

    def stop(self) -> None:
        self._stopping.set()

    async def flush(self) -> None:
        """Write the beats taken so far and act on what was found. Never raises."""
        beats, self._pending = self._pending, {}
        self._registry.end_late_streams(time.monotonic() - self._ended_access_seconds)
        metrics.set_agents_connected(self._registry.stream_count)
        watched = [beat for beat in self._registry.watched() if beat.holder not in beats]
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads.beats, self._look, tuple(beats.values()), watched)
        try:
            await self._report_when_stuck(work)
            verdicts = await work
        except Unavailable as error:
            log.warning("heartbeats wait for the database: %s", error, extra={"beats": len(beats)})
            self._keep(beats)
        except Exception:
            log.exception("heartbeats could not be written", extra={"beats": len(beats)})
            self._keep(beats)
        else:
            self._registry.database_is_away = False
            self._on_database(True)
            self._act(verdicts)
            lost = frozenset().union(*(verdict.fenced for verdict in verdicts))
            self._registry.confirm(*(holder for holder in beats if holder not in lost))

    def _look(self, beats: Collection[Beat], watched: Collection[Beat]) -> tuple[BeatVerdicts, ...]:
        # After the beats: who finds a gateway present may trust that earlier beats are written.
        found = [self._store.attempts.heartbeat(beats, self._lease_seconds)] if beats else []
        if watched:
            found.append(self._store.claims.verdicts(watched))
        if not found:
            self._store.claims.ping()
        if time.monotonic() - self._said_present > _PRESENCE_SECONDS:
            if self._said_present < 0:
                self._store.presence.leave(Kind.GATEWAY, self._gateway)
            self._store.presence.keep_present(Kind.GATEWAY)
            self._store.presence.keep_present(Kind.GATEWAY, self._gateway)
            self._said_present = time.monotonic()
        return tuple(found)

    async def _report_when_stuck(self, work: asyncio.Future[Any]) -> None:
        done, _ = await asyncio.wait({work}, timeout=_STUCK_SECONDS)
        if not done:
            self._registry.database_is_away = True
            self._on_database(False)

    def _keep(self, beats: dict[str, Beat]) -> None:
        self._registry.database_is_away = True
        self._on_database(False)
        self._pending = beats | self._pending

    def _act(self, verdicts: tuple[BeatVerdicts, ...]) -> None:
        for verdict in verdicts:
            for holder in verdict.fenced:
                self._registry.stop(holder, Stop.FENCED)
            for holder in verdict.cancelled:
                self._registry.stop(holder, Stop.CANCELLED)
