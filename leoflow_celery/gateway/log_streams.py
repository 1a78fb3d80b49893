"""StreamLogs: lines come in, the number of the last one on disk goes out."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from leoflow_celery.errors import Fenced, GatewayUnavailable
from leoflow_celery.gateway.callers import FOREIGN_PREFIX, Caller
from leoflow_celery.gateway.journal import HolderLog, Journal
from leoflow_celery.gateway.log_access import LogAccess
from leoflow_celery.gateway.registry import HolderRegistry, Stop
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.store.attempts import Beat
from leoflow_celery.store.logs import LogKey


class OpenStream:
    """One StreamLogs call while it lasts."""

    def __init__(self, beat: Beat, entry: HolderLog, wake: asyncio.Event) -> None:
        self.beat = beat
        self._entry, self._wake = entry, wake
        self._stopped: Stop | None = None
        self._closing = False

    def stop(self, why: Stop) -> None:
        """End the call with ABORTED: the agent then asks with a heartbeat."""
        self._stopped = why
        self._wake.set()

    def close(self) -> None:
        """End the call once everything taken is on disk: the gateway shuts down."""
        self._closing = True
        self._wake.set()

    async def serve(self, context: Any, journal: Journal) -> None:
        """Read and acknowledge until either side ends the call."""
        reader = asyncio.create_task(self._read(context, journal))
        reader.add_done_callback(lambda _: self._wake.set())
        try:
            await self._acknowledge(context, reader)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, context: Any, journal: Journal) -> None:
        while (line := await context.read()) is not grpc.aio.EOF:
            journal.take(self._entry, line)
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
            over = reader.done() and entry.idle
            if entry.written:
                await context.write(pb.LogAck(acknowledged_through_line=entry.written))
            if self._stopped is not None:
                raise Fenced(f"attempt {self.beat.attempt}: the holder of this log stream was {self._stopped}")
            if over and self._closing:
                raise GatewayUnavailable("the gateway is shutting down")
            if over:
                return


class LogStreams:
    """The StreamLogs method."""

    def __init__(self, access: LogAccess, registry: HolderRegistry, journal: Journal) -> None:
        self._access, self._registry, self._journal = access, registry, journal
        self._open: set[OpenStream] = set()

    async def stream_logs(self, caller: Caller, context: Any) -> None:
        """Serve one stream; refused with ABORTED for whoever does not hold the attempt."""
        holder = await self._access.wait(caller)
        identity = caller.identity
        key = LogKey(
            identity.tenant_id, identity.dag_id, identity.run_id, identity.task_id, identity.attempt.try_number
        )
        wake = asyncio.Event()
        entry = self._journal.open(holder, key, wake, numbered=not holder.startswith(FOREIGN_PREFIX))
        stream = OpenStream(Beat(caller.attempt, holder), entry, wake)
        self._open.add(stream)
        try:
            with self._registry.streaming(stream):
                await stream.serve(context, self._journal)
        finally:
            self._open.discard(stream)
            self._journal.release(entry, wake)

    def close(self) -> None:
        """Ask every open stream to end."""
        for stream in tuple(self._open):
            stream.close()
