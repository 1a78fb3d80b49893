"""``GatewayServer``: the parts put together, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2_grpc  # type: ignore[import-untyped]

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.gateway.callers import Authenticator, Caller, ForeignHolders
from leoflow_celery.gateway.claims import Claims
from leoflow_celery.gateway.health import Health
from leoflow_celery.gateway.heartbeats import Heartbeats
from leoflow_celery.gateway.journal import Journal
from leoflow_celery.gateway.lifecycle import Lifecycle
from leoflow_celery.gateway.log_access import LogAccess
from leoflow_celery.gateway.log_streams import LogStreams
from leoflow_celery.gateway.notify import Notifier, OnFinished, nudge_results
from leoflow_celery.gateway.registry import HolderRegistry
from leoflow_celery.gateway.rpc import Unary, agent_service
from leoflow_celery.gateway.secrets import ChannelPolicy, SecretMethods, SecretReader
from leoflow_celery.gateway.specs import Specs
from leoflow_celery.gateway.threads import Threads
from leoflow_celery.gateway.tls import Certificate
from leoflow_celery.gateway.xcoms import XComMethods
from leoflow_celery.services import Services
from leoflow_celery.settings import Settings

log = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES = 8 * 1024 * 1024
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # Two gateways on one port would each see half of the agents; the second one must fail instead.
    ("grpc.so_reuseport", 0),
    # Agents behind NAT keep idle connections open with pings; a dead agent's connection is noticed within a minute.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


class GatewayServer:
    """The agents' gRPC server, for one event loop. ``start`` once, ``stop`` once."""

    def __init__(self, settings: Settings, on_finished: OnFinished | None = None) -> None:
        """``on_finished(task_instance_id, try_number)`` is called in a thread after an end or relaunch was recorded;
        the standard one tells a results worker.

        Raises:
            ConfigurationError: a setting is missing or cannot work.
        """
        self._settings = settings.gateway
        self._services = Services(settings)
        policy = ChannelPolicy.of(settings.gateway)
        self._secrets = SecretReader.of(settings.gateway)
        authenticate = Authenticator(self._services.tokens)
        self._threads = threads = Threads(settings.gateway.store_threads)
        self._notifier = Notifier(on_finished or nudge_results(self._services), threads.notify)
        self._registry, self._foreign = HolderRegistry(), ForeignHolders()
        store = self._services.store
        self._claims = Claims(store.claims, self._foreign, threads)
        self._health = Health()
        self._journal = Journal(store.logs, threads.logs)
        access = LogAccess(store.claims, self._registry, self._foreign, threads)
        self._streams = LogStreams(access, self._registry, self._journal)
        self._heartbeats = Heartbeats(
            store,
            self._registry,
            self._claims,
            threads,
            lease_seconds=settings.gateway.lease_seconds,
            flush_seconds=settings.gateway.heartbeat_flush_seconds,
            on_database=self._health.database,
        )
        self._service = agent_service(
            authenticate, self._unary(settings, policy), {"StreamLogs": self._streams.stream_logs}
        )
        self._server: grpc.aio.Server | None = None
        self._loops: list[asyncio.Task[None]] = []
        self.port = 0

    def _unary(self, settings: Settings, policy: ChannelPolicy) -> dict[str, Unary]:
        store, threads, gateway = self._services.store, self._threads, settings.gateway
        specs = Specs(store.attempts, self._services.keys, policy, self._secrets, self._notifier, threads)
        xcoms = XComMethods(store, specs, self._claims, threads, settings.xcom)
        secrets = SecretMethods(policy, self._claims, self._secrets)
        lifecycle = Lifecycle(store, self._registry, self._foreign, self._notifier, threads, gateway.lease_seconds)
        return {
            "Register": lifecycle.register,
            "GetTaskSpec": self._identified(specs.get_task_spec),
            "FetchXCom": self._identified(xcoms.fetch),
            "PushXCom": self._identified(xcoms.push),
            "ReportState": self._identified(lifecycle.report_state),
            "Heartbeat": self._heartbeats.heartbeat,
            "GetVariables": self._identified(secrets.get_variables),
            "GetConnections": self._identified(secrets.get_connections),
        }

    def _identified(self, function: Unary) -> Unary:
        """The function, with the holder of agents that send no session."""

        async def call(caller: Caller, request: Any) -> Any:
            return await function(caller if caller.holder else await self._claims.identify(caller), request)

        return call

    @property
    def address(self) -> str:
        """Where the server listens, with the port it got."""
        listen = self._settings.listen
        return listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{self.port}"

    async def start(self) -> int:
        """Listen and serve; the bound port.

        Raises:
            ConfigurationError: the address cannot be listened on, or the TLS files cannot be used.
        """
        self._server = server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers((self._service,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, server)
        self.port = self._bind(server)
        await self._health.begin()
        await self._heartbeats.flush()
        await server.start()
        self._loops = [asyncio.create_task(loop) for loop in (self._heartbeats.run(), self._journal.run())]
        log.info("gateway.listening", extra={"address": self.address})
        return self.port

    def _bind(self, server: grpc.aio.Server) -> int:
        listen, cert, key = self._settings.listen, self._settings.tls_cert, self._settings.tls_key
        try:
            if cert is None or key is None:
                return server.add_insecure_port(listen)
            return server.add_secure_port(listen, Certificate(cert, key).credentials())
        except RuntimeError as error:
            raise ConfigurationError(
                f"LEOFLOW_GATEWAY_LISTEN={listen}: cannot listen there; the address is in use or not ours, "
                "or the TLS files hold no valid certificate and key"
            ) from error

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Refuse new calls, let open ones finish, write what is in memory, and release everything."""
        grace = self._settings.shutdown_grace_seconds if grace_seconds is None else grace_seconds
        await self._health.end()
        if self._server is not None:
            stopping = asyncio.create_task(self._server.stop(grace))
            self._streams.close()
            await stopping
        await self._stop_loops()
        self._journal.close()
        await self._secrets.close()
        await asyncio.to_thread(self._threads.close)
        self._services.close()

    async def abort(self) -> None:
        """Cut the grace of a ``stop`` under way short."""
        if self._server is not None:
            await self._server.stop(None)

    async def _stop_loops(self) -> None:
        if not self._loops:
            return
        beats, journal = self._loops
        self._heartbeats.stop()
        await asyncio.gather(beats, return_exceptions=True)
        await self._journal.drain(self._settings.shutdown_grace_seconds)
        journal.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await journal
