"""``GatewayServer``: the parts put together, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import grpc.aio

from leoflow_celery.app.clocks import reading
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.gateway.exchange import Exchange, open_reviewer
from leoflow_celery.gateway.server import Health
from leoflow_celery.gateway.heartbeats import Heartbeats
from leoflow_celery.gateway.log_writer import Journal
from leoflow_celery.gateway.lifecycle import Lifecycle
from leoflow_celery.gateway.logs import LogStreams
from leoflow_celery.gateway.lifecycle import Notifier, OnFinished, nudge_results
from leoflow_celery.gateway.rpc import Unary, agent_service
from leoflow_celery.gateway.secrets import ChannelPolicy, SecretMethods, SecretReader
from leoflow_celery.gateway.sessions import Authenticator, Caller, Claims, ForeignHolders, HolderRegistry
from leoflow_celery.gateway.task_data import Specs
from leoflow_celery.gateway.threads import Threads
from leoflow_celery.gateway.server import Certificate
from leoflow_celery.gateway.task_data import XComMethods
from leoflow_celery.services import Services
from leoflow_celery.settings import Settings

log = logging.getLogger(__name__)

#: How often grpc is asked whether its server still serves.
_LOOK_SECONDS = 0.25
_MAX_MESSAGE_BYTES = 8 * 1024 * 1024
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # Identity only: the limit above is on what arrives, and a kilobyte of it could unpack to a gigabyte before anybody
    # is asked for a token.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # Of one connection; the rest waits at its sender. A proxy may bring the agents of a whole cluster over one.
    ("grpc.max_concurrent_streams", 1_000),
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
        self._clocks = reading(lambda: self._services, "gateway", with_sql=True)
        policy = ChannelPolicy.of(settings.gateway)
        self._secrets = SecretReader.of(settings.gateway)
        authenticate = Authenticator(self._services.tokens)
        self._threads = threads = Threads(settings.gateway.store_threads)
        self._notifier = Notifier(on_finished or nudge_results(self._services), threads.notify)
        self._registry, self._foreign = HolderRegistry(), ForeignHolders()
        store = self._services.store
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
            self._services.tokens,
            self._registry,
            self._claims,
            threads,
            gateway=self._foreign.gateway,
            lease_seconds=gateway.lease_seconds,
            flush_seconds=gateway.heartbeat_flush_seconds,
            ended_access_seconds=gateway.ended_access_seconds,
            on_database=self._health.database,
        )
        self._exchange = Exchange(self._services, threads, open_reviewer(settings))
        self._service = agent_service(
            authenticate,
            self._unary(settings, policy),
            {"StreamLogs": self._streams.stream_logs},
            {"ExchangeToken": self._exchange.authenticate},
        )
        self._server: grpc.aio.Server | None = None
        self._loops: list[asyncio.Task[None]] = []
        self._watch: asyncio.Task[None] | None = None
        self._checking_rights: asyncio.Task[None] | None = None
        self.port = 0

    def _unary(self, settings: Settings, policy: ChannelPolicy) -> dict[str, Unary]:
        store, threads, gateway = self._services.store, self._threads, settings.gateway
        specs = Specs(store.attempts, self._services.keys, policy, self._secrets, self._notifier, threads)
        xcoms = XComMethods(store, specs, self._claims, threads, settings.xcom)
        secrets = SecretMethods(policy, self._claims, self._secrets)
        lifecycle = Lifecycle(
            store,
            self._services.tokens,
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
        self._server = server = self._bound_server(self._settings.listen)
        await self._health.begin()
        await self._heartbeats.flush()
        await server.start()
        self._watch = asyncio.create_task(self._serve_again())
        self._checking_rights = asyncio.create_task(self._exchange.warn_of_missing_rights())
        self._clocks.start()
        self._loops = [asyncio.create_task(loop) for loop in (self._heartbeats.run(), self._journal.run())]
        log.info("gateway.listening", extra={"address": self.address})
        return self.port

    def _bound_server(self, listen: str) -> grpc.aio.Server:
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers((self._service, self._health.service))
        self.port = self._bind(server, listen)
        return server

    async def _serve_again(self) -> None:
        """Serve with a new server when grpc's own loop ended: one call whose path is not UTF-8 is enough for that.

        It is decoded where no handler of ours is (grpcio 1.85, ``AioServer._server_main_loop``). Open calls break, and
        their agents come back. ``tests/integration/gateway/test_strangers.py`` says when grpc can do without this.
        """
        while self._server is not None:
            try:
                if not await self._server.wait_for_termination(_LOOK_SECONDS):
                    return
            except Exception as error:  # noqa: BLE001 - whatever ended its loop
                log.warning("grpc's server ended (%s) and is started again", type(error).__name__)
                await self._server.stop(None)
                try:
                    self._server = self._bound_server(self.address)
                    await self._server.start()
                except ConfigurationError as taken:
                    log.error("%s", taken)  # noqa: TRY400 - one line is what an operator wants
                    await asyncio.sleep(_LOOK_SECONDS)

    def _bind(self, server: grpc.aio.Server, listen: str) -> int:
        cert, key = self._settings.tls_cert, self._settings.tls_key
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
        for task in (self._watch, self._checking_rights):
            if task is not None:
                task.cancel()
        if self._server is not None:
            stopping = asyncio.create_task(self._server.stop(grace))
            self._streams.close()
            await stopping
        await self._stop_loops()
        self._journal.close()
        await self._secrets.close()
        await asyncio.to_thread(self._threads.close)
        self._exchange.close()
        await asyncio.to_thread(self._clocks.stop, wait_seconds=None)
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
