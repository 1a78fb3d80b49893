"""``GatewayServer``: the parts put together; and the process around it, with signals, limits and an exit code.

The health service is gRPC's standard one. ``""`` is the process (liveness): it serves until shutdown. The
AgentService's own name is readiness: it serves while SQL answers, so that a load balancer may send agents elsewhere
without anybody restarting this process. It asks for no token, so its requests are decoded here: grpc writes a traceback
for each one that cannot be. Certificates are read again when their files changed: they are renewed without a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import uvloop
from grpc_health.v1 import health, health_pb2  # type: ignore[import-untyped]

from leoflow_celery import metrics
from leoflow_celery.app.clocks import reading
from leoflow_celery.app.logging import log_to_stderr
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.gateway.exchange import Exchange, open_reviewer
from leoflow_celery.gateway.heartbeats import Heartbeats
from leoflow_celery.gateway.lifecycle import CompletionNudge, Lifecycle, OnFinished, nudge_results
from leoflow_celery.gateway.log_writer import HolderLogs
from leoflow_celery.gateway.logs import LogStreams
from leoflow_celery.gateway.rpc import InvalidArgument, Unary, agent_service, bound_logs, decoded
from leoflow_celery.gateway.secrets import ChannelPolicy, SecretMethods, SecretReader
from leoflow_celery.gateway.sessions import Authenticator, Caller, Claims, ForeignHolders, HolderRegistry
from leoflow_celery.gateway.task_data import Specs, XComMethods
from leoflow_celery.gateway.threads import Threads
from leoflow_celery.protocol.service import SERVICE, serialize
from leoflow_celery.services import Services
from leoflow_celery.settings import Settings

log = logging.getLogger(__name__)


class Certificate:
    """A certificate chain and its key, on disk."""

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert, self._key = cert, key
        self._served: tuple[bytes, bytes] = (b"", b"")

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that follow the files.

        Raises:
            ConfigurationError: a file cannot be read, or holds no PEM.
        """
        self._served = self._read()
        # The stubs do not know that None keeps what is served.
        fetcher = cast("Callable[[], grpc.ServerCertificateConfiguration]", self._changed)
        return grpc.dynamic_ssl_server_credentials(_configuration(self._served), fetcher)

    def _read(self) -> tuple[bytes, bytes]:
        pairs = (("LEOFLOW_GATEWAY_TLS_CERT", self._cert), ("LEOFLOW_GATEWAY_TLS_KEY", self._key))
        found = []
        for setting, path in pairs:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise ConfigurationError(f"{setting}={path}: {error.strerror}") from error
            if b"-----BEGIN " not in content:
                raise ConfigurationError(f"{setting}={path} holds no PEM block")
            found.append(content)
        return found[0], found[1]

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        # Called by grpc for every new connection; None keeps what is served.
        try:
            now = self._read()
        except ConfigurationError as error:
            log.warning("the TLS files cannot be read, the certificate read before is served: %s", error)
            return None
        if now == self._served:
            return None
        self._served = now
        return _configuration(now)


def _configuration(pair: tuple[bytes, bytes]) -> grpc.ServerCertificateConfiguration:
    cert, key = pair
    return grpc.ssl_server_certificate_configuration([(key, cert)])


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
        self._nudge = CompletionNudge(on_finished or nudge_results(self._services), threads.notify)
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
        self._holder_logs = HolderLogs(store.logs, threads.logs)
        self._streams = LogStreams(self._claims, self._registry, self._foreign, self._holder_logs)
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
        specs = Specs(store.attempts, self._services.keys, policy, self._secrets, self._nudge, threads)
        xcoms = XComMethods(store, specs, self._claims, self._foreign, threads, settings.xcom)
        secrets = SecretMethods(policy, self._claims, self._secrets, specs.declared)
        lifecycle = Lifecycle(
            store,
            self._services.tokens,
            self._registry,
            self._foreign,
            self._claims,
            self._holder_logs,
            self._nudge,
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
        self._loops = [asyncio.create_task(loop) for loop in (self._heartbeats.run(), self._holder_logs.run())]
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
        self._holder_logs.close()
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
        beats, holder_logs = self._loops
        self._heartbeats.stop()
        await asyncio.gather(beats, return_exceptions=True)
        await self._holder_logs.drain(self._settings.shutdown_grace_seconds)
        holder_logs.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await holder_logs


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, then shut down cleanly; the exit code. A second signal ends the grace.

    Raises:
        ConfigurationError: a setting is missing or cannot work, or the address cannot be listened on.
    """
    log_to_stderr()
    bound_logs()
    raise_open_files_limit()
    end_metrics = metrics.serve(settings.gateway.metrics_port)
    try:
        # grpc.aio goes through the loop six times for each call: a seventh more calls per core with this one.
        return uvloop.run(_serve(settings))
    finally:
        end_metrics()


async def _serve(settings: Settings) -> int:
    server = GatewayServer(settings)
    signals: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_unhandled)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, signal.Signals(number).name)
    await server.start()
    # Whoever started this process on port 0 reads the port here.
    sys.stdout.write(f"gateway listening on {server.address}\n")
    sys.stdout.flush()
    log.info("%s: shutting down", await signals.get())
    stopping = asyncio.create_task(server.stop())
    impatient = asyncio.create_task(signals.get())
    await asyncio.wait({stopping, impatient}, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        await server.abort()
    impatient.cancel()
    await stopping
    return 0


def _unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What a task of nobody raised. What grpc could not decode holds a stranger's bytes, and has had its line."""
    if not isinstance(context.get("exception"), UnicodeDecodeError):
        loop.default_exception_handler(context)


def raise_open_files_limit() -> None:
    """Allow as many open files as the system lets us: each agent costs a socket and a log file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            log.warning("the limit of open files stays %d; more agents than about half of it will be refused", soft)
