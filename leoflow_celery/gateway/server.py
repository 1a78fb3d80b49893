"""``GatewayServer``: the parts put together, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import grpc.aio

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.gateway.exchange import Exchange, open_reviewer
from leoflow_celery.gateway.health import Health
from leoflow_celery.gateway.heartbeats import Heartbeats
from leoflow_celery.gateway.journal import Journal
from leoflow_celery.gateway.lifecycle import Lifecycle
from leoflow_celery.gateway.log_streams import LogStreams
from leoflow_celery.gateway.notify import Notifier, OnFinished, nudge_results
from leoflow_celery.gateway.rpc import Unary, agent_service
from leoflow_celery.gateway.secrets import ChannelPolicy, SecretMethods
from leoflow_celery.gateway.sessions import Authenticator, Caller, Claims, ForeignHolders, HolderRegistry
from leoflow_celery.gateway.specs import Specs
from leoflow_celery.gateway.threads import Threads
from leoflow_celery.gateway.tls import Certificate
from leoflow_celery.gateway.values import open_provider
from leoflow_celery.gateway.xcoms import XComMethods
from leoflow_celery.runtime import Runtime
from leoflow_celery.settings import Settings

log = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES = 8 * 1024 * 1024
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # Identity only: the limit above is on what arrives, and a kilobyte of it could unpack to a gigabyte before anybody
    # is asked for a token.
    ("grpc.compression_enabled_algorithms_bitset", 1),
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
        self._runtime = Runtime(settings)
        policy = ChannelPolicy.of(settings.gateway)
        authenticate = Authenticator(self._runtime.tokens)
        self._threads = threads = Threads(settings.gateway.store_threads)
        self._notifier = Notifier(on_finished or nudge_results(self._runtime), threads.notify)
        self._registry, self._foreign = HolderRegistry(), ForeignHolders()
        store = self._runtime.store
        gateway = settings.gateway
        self._claims = Claims(
            store,
            self._foreign,
            self._registry,
            threads,
            lease_seconds=gateway.lease_seconds,
            ended_access_seconds=gateway.ended_access_seconds,
        )
        self._health = Health()
        self._journal = Journal(store.logs, threads.logs)
        self._streams = LogStreams(self._claims, self._registry, self._foreign, self._journal)
        self._heartbeats = Heartbeats(
            store,
            self._runtime.tokens,
            self._registry,
            self._claims,
            threads,
            gateway=self._foreign.gateway,
            lease_seconds=gateway.lease_seconds,
            flush_seconds=gateway.heartbeat_flush_seconds,
            ended_access_seconds=gateway.ended_access_seconds,
            on_database=self._health.database,
        )
        self._exchange = Exchange(self._runtime, threads, open_reviewer(settings))
        self._service = agent_service(
            authenticate,
            self._unary(settings, policy),
            {"StreamLogs": self._streams.stream_logs},
            {"ExchangeToken": self._exchange.authenticate},
        )
        self._server: grpc.aio.Server | None = None
        self._loops: list[asyncio.Task[None]] = []
        self._checking_rights: asyncio.Task[None] | None = None
        self.port = 0

    def _unary(self, settings: Settings, policy: ChannelPolicy) -> dict[str, Unary]:
        store, threads, gateway = self._runtime.store, self._threads, settings.gateway
        task_secrets = open_provider(gateway.secrets_path, "LEOFLOW_GATEWAY_SECRETS_PATH")
        specs = Specs(store.attempts, self._runtime.sealer, policy, task_secrets, self._notifier, threads)
        xcoms = XComMethods(store, specs, self._claims, threads, settings.xcom)
        secrets = SecretMethods(gateway, policy, self._claims, threads)
        lifecycle = Lifecycle(
            store,
            self._runtime.tokens,
            self._registry,
            self._foreign,
            self._claims,
            self._journal,
            self._notifier,
            threads,
            gateway.lease_seconds,
        )
        return {
            "Register": lifecycle.register,
            "GetTaskSpec": self._identified(specs.get_task_spec),
            "FetchXCom": self._identified(xcoms.fetch),
            "PushXCom": self._identified(xcoms.push),
            "ReportState": self._identified(lifecycle.report_state),
            "Heartbeat": self._heartbeats.heartbeat,
            "GetVariables": self._identified(secrets.get_variables),
            "GetConnections": self._identified(secrets.get_connections),
            "ExchangeToken": self._exchange.exchange_token,
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
        server.add_generic_rpc_handlers((self._service, self._health.service))
        self.port = self._bind(server)
        await self._health.begin()
        await self._heartbeats.flush()
        await server.start()
        self._checking_rights = asyncio.create_task(self._exchange.warn_of_missing_rights())
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
        if self._checking_rights is not None:
            self._checking_rights.cancel()
        if self._server is not None:
            stopping = asyncio.create_task(self._server.stop(grace))
            self._streams.close()
            await stopping
        await self._stop_loops()
        self._journal.close()
        await asyncio.to_thread(self._threads.close)
        self._exchange.close()
        self._runtime.close()

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
