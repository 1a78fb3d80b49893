"""The standard gRPC health service.

``""`` is the process (liveness): it serves until shutdown. The AgentService's own name is readiness: it serves while
SQL answers, so that a load balancer may send agents elsewhere without anybody restarting this process.
"""

from __future__ import annotations

import asyncio
import logging

from grpc_health.v1 import health, health_pb2  # type: ignore[import-untyped]

from leoflow_celery.protocol.service import SERVICE

log = logging.getLogger(__name__)
_STATUS = health_pb2.HealthCheckResponse


class Health:
    """Keeps the two statuses."""

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()
        self._ready: bool | None = None
        self._changes: set[asyncio.Task[None]] = set()

    async def begin(self) -> None:
        """Not ready before SQL has answered once."""
        await self.servicer.set(SERVICE, _STATUS.NOT_SERVING)

    def database(self, answered: bool) -> None:
        """SQL answered, or did not."""
        if answered == self._ready:
            return
        self._ready = answered
        log.info("the database answers" if answered else "not ready: the database does not answer")
        change = asyncio.create_task(self.servicer.set(SERVICE, _STATUS.SERVING if answered else _STATUS.NOT_SERVING))
        self._changes.add(change)
        change.add_done_callback(self._changes.discard)

    async def end(self) -> None:
        """NOT_SERVING from now on, whatever happens."""
        await self.servicer.enter_graceful_shutdown()
