"""The standard gRPC health service.

``""`` is the process (liveness): it serves until shutdown. The AgentService's own name is readiness: it serves while
SQL answers, so that a load balancer may send agents elsewhere without anybody restarting this process. It asks for no
token, so its requests are decoded here: grpc writes a traceback for each one that cannot be.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2  # type: ignore[import-untyped]

from leoflow_celery.gateway.rpc import InvalidArgument, decoded
from leoflow_celery.protocol.service import SERVICE, serialize

log = logging.getLogger(__name__)
_HEALTH_SERVICE = "grpc.health.v1.Health"
_STATUS = health_pb2.HealthCheckResponse


class Health:
    """Keeps the two statuses."""

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer()
        handlers: dict[str, Any] = {
            "Check": grpc.unary_unary_rpc_method_handler(self._decoding(self.servicer.Check), None, serialize),
            "Watch": grpc.unary_stream_rpc_method_handler(self._decoding(self.servicer.Watch), None, serialize),
        }
        self.service = grpc.method_handlers_generic_handler(_HEALTH_SERVICE, handlers)
        self._ready: bool | None = None
        self._changes: set[asyncio.Task[None]] = set()

    @staticmethod
    def _decoding(function: Any) -> Any:
        async def call(raw: bytes, context: Any) -> Any:
            try:
                request = decoded(health_pb2.HealthCheckRequest, raw)
            except InvalidArgument as error:
                return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            return await function(request, context)

        return call

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
