"""StreamLogs: lines come in from whoever may write, the number of the last one on disk goes out.

A stream may be opened before its agent registers, so the answer to whether it may write can be: wait.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import grpc.aio

from leoflow_celery import metrics
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.errors import Fenced, GatewayUnavailable, Unavailable
from leoflow_celery.gateway.log_writer import HolderLog, HolderLogs
from leoflow_celery.gateway.rpc import InvalidArgument, decoded
from leoflow_celery.gateway.sessions import (
    Caller,
    Claims,
    ForeignHolders,
    HolderRegistry,
    Standing,
    Stop,
    over,
)
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.store.attempts import Beat

#: How long a stream waits for its agent's Register, and how often it looks whether another gateway had it.
_PATIENCE_SECONDS = 60.0
_LOOK_SECONDS = 1.0
#: SQL is not asked of a holder that it named so lately.
_TRUSTED_SECONDS = 2.0
#: Of one attempt, open or waiting: an agent has one, and a few that it lost. Each costs memory, a file and SQL.
_MAX_STREAMS = 16
#: Who may write: the last holder also after the end, because its last lines are the ones that matter.
_MAY_WRITE = (Standing.HOLDER, Standing.ENDED)
#: Who is no holder yet, and may become one by the Register that is on its way.
_MAY_WAIT = (Standing.UNCLAIMED, Standing.REPLACEABLE)


class OpenStream:
    """One StreamLogs call while it lasts."""

    def __init__(self, beat: Beat, entry: HolderLog, wake: asyncio.Event) -> None:
        self.beat = beat
        self._entry, self._wake = entry, wake
        self._stopped: Stop | None = None
        self._closing = False

    def stop(self, why: Stop) -> None:
        """End the call with ABORTED: the agent then asks with a heartbeat. A fenced holder's lines land no more."""
        self._stopped = why
        if why is Stop.FENCED:
            self._entry.fence()
        self._wake.set()

    def close(self) -> None:
        """End the call once everything taken is on disk: the gateway shuts down."""
        self._closing = True
        self._wake.set()

    async def serve(self, context: Any, holder_logs: HolderLogs) -> None:
        """Read and acknowledge until either side ends the call."""
        reader = asyncio.create_task(self._read(context, holder_logs))
        reader.add_done_callback(lambda _: self._wake.set())
        try:
            await self._acknowledge(context, reader)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, context: Any, holder_logs: HolderLogs) -> None:
        while (raw := await context.read()) is not grpc.aio.EOF:
            holder_logs.take(self._entry, decoded(pb.LogLine, raw))
            await self._entry.room.wait()

    async def _acknowledge(self, context: Any, reader: asyncio.Task[None]) -> None:
        entry = self._entry
        while True:
            await self._wake.wait()
            self._wake.clear()
            if entry.error is not None:
                raise GatewayUnavailable(f"the log cannot be written: {entry.error.strerror}")
            if self._closing:
                reader.cancel()
            if reader.done() and not reader.cancelled() and isinstance(error := reader.exception(), InvalidArgument):
                raise error
            finished = reader.done() and entry.idle
            if entry.written:
                await context.write(pb.LogAck(acknowledged_through_line=entry.written))
            if self._stopped is not None:
                raise Fenced(f"attempt {self.beat.attempt}: the holder of this log stream was {self._stopped}")
            if finished and self._closing:
                raise GatewayUnavailable("the gateway is shutting down")
            if finished:
                return


class LogStreams:
    """The StreamLogs method."""

    def __init__(
        self, claims: Claims, registry: HolderRegistry, foreign: ForeignHolders, holder_logs: HolderLogs
    ) -> None:
        self._claims, self._registry, self._foreign, self._holder_logs = claims, registry, foreign, holder_logs
        self._open: set[OpenStream] = set()
        self._counts: Counter[AttemptId] = Counter()

    async def stream_logs(self, caller: Caller, context: Any) -> None:
        """Serve one stream; refused with ABORTED for whoever does not hold the attempt."""
        attempt = caller.attempt
        if self._counts[attempt] >= _MAX_STREAMS:
            raise GatewayUnavailable(f"attempt {attempt} has {_MAX_STREAMS} log streams open; close one")
        self._counts[attempt] += 1
        try:
            await self._serve(caller, context)
        finally:
            self._counts[attempt] -= 1
            if not self._counts[attempt]:
                del self._counts[attempt]

    async def _serve(self, caller: Caller, context: Any) -> None:
        caller = await self._holder(caller)
        wake = asyncio.Event()
        is_foreign = self._foreign.is_one(caller.holder)
        entry = self._holder_logs.open(caller.holder, caller.log_key, caller.attempt, wake, numbered=not is_foreign)
        stream = OpenStream(Beat(caller.attempt, caller.holder), entry, wake)
        self._open.add(stream)
        try:
            with self._registry.streaming(stream):
                await stream.serve(context, self._holder_logs)
        except asyncio.CancelledError:
            if is_foreign:
                self._foreign.lose(caller.holder)
            raise
        finally:
            self._open.discard(stream)
            self._holder_logs.release(entry, wake)

    async def _holder(self, caller: Caller) -> Caller:
        """The caller with its holder, once it may write.

        Raises:
            Fenced: somebody else holds the attempt, it ended a while ago, or nobody registered in time.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            holder = caller.holder or self._foreign.known(caller)
            if self._registry.is_granted(holder, _TRUSTED_SECONDS):
                return caller.held_by(holder)
            before = self._registry.grants(caller.attempt)
            try:
                known = await self._claims.identify(caller)
                found = await self._claims.standing(known)
            except Unavailable:
                found = Standing.UNCLAIMED
            if found is Standing.OVER:
                raise over(caller)
            if self._registry.grants(caller.attempt) != before:
                continue  # somebody registered here while SQL was asked
            if found in _MAY_WRITE:
                return known
            if found not in _MAY_WAIT:
                break
            await self._registry.wait_for_register(caller.attempt, _LOOK_SECONDS)
        metrics.record_fenced("log")
        raise Fenced(f"attempt {caller.attempt} is not held by the writer of this log stream")

    def close(self) -> None:
        """Ask every open stream to end."""
        for stream in tuple(self._open):
            stream.close()
