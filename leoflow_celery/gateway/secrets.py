"""GetVariables and GetConnections: whether this channel may carry secrets, and who is asked for them.

The configured back ends stand in a row, and the first that knows a name wins. They may be slow, hang or be asked in a
loop, so they run in threads of their own, a bounded number at a time and for each tenant.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import threading
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from weakref import WeakValueDictionary

from leoflow_celery import metrics
from leoflow_celery.domain.fields import is_storable, is_variable_name
from leoflow_celery.errors import ConfigurationError, Unavailable
from leoflow_celery.gateway.rpc import NotPossible
from leoflow_celery.gateway.secret_backends import (
    BackendFailed,
    CommandBackend,
    EnvironmentBackend,
    FileBackend,
    Kind,
    Query,
    SecretBackend,
    warn_once,
)
from leoflow_celery.gateway.sessions import Caller, Claims
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.security import AgentIdentity
from leoflow_celery.settings import GatewaySettings, environment_with_prefix

log = logging.getLogger(__name__)

#: Where packages register back ends of their own: a callable without arguments that returns a ``SecretBackend``.
ENTRY_POINTS = "leoflow_celery.secret_backends"
#: Of all names and values in one answer. A gRPC message takes 8 MiB.
MAX_ANSWER_BYTES = 4 * 1024 * 1024
#: Questions of one tenant that may run or wait at a time.
MAX_QUESTIONS_OF_A_TENANT = 1_024
_SECONDS_BETWEEN_LOG_LINES = 5.0
_CLOSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ChannelPolicy:
    """Secrets travel on TLS and unix sockets; on plain text only when an operator said so."""

    secure: bool
    allow_insecure: bool

    @classmethod
    def of(cls, settings: GatewaySettings) -> ChannelPolicy:
        """The policy of the configured listener.

        Raises:
            ConfigurationError: only one of certificate and key is set.
        """
        if (settings.tls_cert is None) != (settings.tls_key is None):
            raise ConfigurationError("set both LEOFLOW_GATEWAY_TLS_CERT and LEOFLOW_GATEWAY_TLS_KEY, or none of them")
        secure = settings.tls_cert is not None or settings.listen.startswith("unix:")
        return cls(secure, settings.allow_insecure_secrets)

    def check(self, what: str) -> None:
        """Refuse to send secrets in plain text.

        Raises:
            NotPossible: names the settings that would allow it.
        """
        if not (self.secure or self.allow_insecure):
            raise NotPossible(
                f"{what} are not sent on a plain-text channel; give the gateway LEOFLOW_GATEWAY_TLS_CERT and "
                "LEOFLOW_GATEWAY_TLS_KEY, or allow it with LEOFLOW_GATEWAY_ALLOW_INSECURE_SECRETS=true"
            )


#: Which names a caller's request declared; None: it declared none, and gets what its tenant and DAG may see.
DeclaredNames = Callable[[Caller, Kind], Awaitable[frozenset[str] | None]]


class SecretMethods:
    """The two methods that hand out what the caller's tenant and DAG may see."""

    def __init__(self, policy: ChannelPolicy, claims: Claims, secrets: SecretReader, declared: DeclaredNames) -> None:
        self._policy, self._claims, self._secrets, self._declared = policy, claims, secrets, declared

    async def get_variables(self, caller: Caller, _: pb.GetVariablesRequest) -> pb.GetVariablesResponse:
        return pb.GetVariablesResponse(variables=await self._values(caller, Kind.VARIABLE))

    async def get_connections(self, caller: Caller, _: pb.GetConnectionsRequest) -> pb.GetConnectionsResponse:
        return pb.GetConnectionsResponse(connection_uris=await self._values(caller, Kind.CONNECTION))

    async def _values(self, caller: Caller, kind: Kind) -> dict[str, str]:
        self._policy.check(kind.directory)
        await self._claims.require(caller)
        names = await self._declared(caller, kind)
        return {} if names == frozenset() else await self._secrets.get(query_of(caller.identity, kind, names))


def query_of(identity: AgentIdentity, kind: Kind, names: frozenset[str] | None = None) -> Query:
    """A question in the name of an authenticated task: its token says which tenant and DAG it is of."""
    return Query(kind, identity.tenant_id, identity.dag_id, identity.run_id, identity.task_id, names)


# The back ends in a row


class Backends:
    """The configured back ends in their order. Whatever one does, answers are usable and errors say no value."""

    def __init__(self, backends: Mapping[str, SecretBackend]) -> None:
        self.by_name = dict(backends)
        self._said_at: dict[str, float] = {}

    def get(self, query: Query) -> dict[str, str]:
        """What the query's task may see, and of what it asked for.

        Raises:
            Unavailable: a back end cannot tell now. A later one is not asked instead: its value may be another.
            NotPossible: the values are too large for one answer.
        """
        found: dict[str, str] = {}
        for name, backend in self.by_name.items():
            wanted = query if query.names is None else query.evolve(names=query.names.difference(found))
            if wanted.names is not None and not wanted.names:
                break
            for key, value in self._asked(name, backend, wanted).items():
                found.setdefault(key, value)
        size = sum(len(key.encode()) + len(value.encode()) for key, value in found.items())
        if size > MAX_ANSWER_BYTES:
            raise NotPossible(
                f"the {query.kind.directory} of tenant {query.tenant_id!r} have {size} bytes, more than the "
                f"{MAX_ANSWER_BYTES} that fit in one answer; remove some, or move large ones to the DAGs that need them"
            )
        return found

    def _asked(self, name: str, backend: SecretBackend, query: Query) -> dict[str, str]:
        try:
            return usable(backend.get(query), query, name)
        except BaseException as error:  # noqa: BLE001 - a back end of others may raise anything, SystemExit too
            metrics.record_secret_failure(name)
            known = isinstance(error, BackendFailed)
            self._say(name, query, str(error) if known else _anonymous(error))
            text = str(error) if known else "the gateway's log has its cause"
            # Not as the cause: somebody may log it, and a foreign error's text may quote a value.
            raise Unavailable(f"secret back end {name!r} cannot tell now: {text}") from None

    def _say(self, name: str, query: Query, cause: str) -> None:
        now = time.monotonic()
        if now - self._said_at.get(name, -_SECONDS_BETWEEN_LOG_LINES) >= _SECONDS_BETWEEN_LOG_LINES:
            self._said_at[name] = now
            ids = {"tenant_id": query.tenant_id, "dag_id": query.dag_id, "task_id": query.task_id}
            log.warning(
                "secrets.backend_failed", extra={"backend": name, "kind": query.kind.value, "cause": cause, **ids}
            )

    def close(self) -> None:
        """End what back ends run. One that has no ``close`` has nothing to end."""
        for name, backend in self.by_name.items():
            if callable(close := getattr(backend, "close", None)):
                try:
                    close()
                except Exception as error:  # noqa: BLE001 - code of others
                    log.warning("secrets.not_closed", extra={"backend": name, "cause": _anonymous(error)})


def usable(values: object, query: Query, backend: str) -> dict[str, str]:
    """The values asked for that a process can be given; one bad name would keep every task from its start.

    Raises:
        BackendFailed: the answer is not a mapping of texts.
    """
    if not isinstance(values, Mapping) or not all(isinstance(text, str) for pair in values.items() for text in pair):
        raise BackendFailed("its answer is not a mapping of names to texts")
    asked = values if query.names is None else {name: values[name] for name in query.names if name in values}
    kept = {name: value for name, value in asked.items() if is_variable_name(name) and is_storable(value)}
    for name in asked.keys() - kept.keys():
        head, equals, _ = name.partition("=")  # what follows may well be the value
        place = f"{backend}: {query.kind.value} {head[:100] + equals!r} of tenant {query.tenant_id!r}"
        warn_once(place, "is left out: a name with '=' or a text with NUL cannot be a variable")
    return kept


def _anonymous(error: BaseException) -> str:
    """What and where, without the text, which may quote a value."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}" if frames else type(error).__name__


def open_backends(settings: GatewaySettings) -> Backends:
    """The back ends that the settings name, in their order.

    Raises:
        ConfigurationError: a back end does not exist or cannot be made, or is set up and not named.
    """
    names = settings.secret_backends
    if len(set(names)) != len(names):
        raise ConfigurationError("LEOFLOW_GATEWAY_SECRET_BACKENDS names a back end twice; name each once")
    paths = {
        "LEOFLOW_GATEWAY_SECRET_FILES": settings.secret_files,
        "LEOFLOW_GATEWAY_VARIABLES_PATH": settings.variables_path,
        "LEOFLOW_GATEWAY_CONNECTIONS_PATH": settings.connections_path,
        "LEOFLOW_GATEWAY_SECRETS_PATH": settings.secrets_path,
    }
    _check_named("files", names, [variable for variable, path in paths.items() if path is not None])
    _check_named("command", names, ["LEOFLOW_GATEWAY_SECRET_COMMAND"] if settings.secret_command else [])
    built_in: dict[str, Callable[[], SecretBackend]] = {
        "files": lambda: FileBackend(settings),
        "environment": lambda: EnvironmentBackend(environment_with_prefix(settings.secret_environment_prefix)),
        "command": lambda: CommandBackend(settings),
    }
    # Most systems have none: what is not asked costs no thread.
    asked = [name for name in names if name != "files" or any(paths.values())]
    return Backends({name: built_in[name]() if name in built_in else _load(name, built_in) for name in asked})


def _check_named(backend: str, names: Sequence[str], variables: Sequence[str]) -> None:
    if variables and backend not in names:
        raise ConfigurationError(
            f"{variables[0]} is set, and LEOFLOW_GATEWAY_SECRET_BACKENDS={','.join(names)} does not name {backend!r}, "
            "which reads it; add the name, or unset the variable"
        )


def _load(name: str, built_in: Iterable[str]) -> SecretBackend:
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if name not in points.names:
        known = ", ".join((*built_in, *sorted(points.names)))
        raise ConfigurationError(
            f"LEOFLOW_GATEWAY_SECRET_BACKENDS: there is no back end {name!r}; there are {known} (packages register "
            f"more in the entry point group {ENTRY_POINTS})"
        )
    where = f"LEOFLOW_GATEWAY_SECRET_BACKENDS: the back end {name!r} ({points[name].value})"
    try:
        backend: SecretBackend = points[name].load()()
    except Exception as error:  # noqa: BLE001 - code of others
        text = str(error) if isinstance(error, ImportError) else _anonymous(error)
        raise ConfigurationError(f"{where} cannot be made: {text}") from None
    if not callable(getattr(backend, "get", None)):
        raise ConfigurationError(f"{where} has no method get(query)")
    return backend


# From the event loop to the threads


class SecretReader:
    """Asks the back ends without making anybody else wait. For one event loop.

    Equal questions are asked once. A tenant has at most half of the threads and a bounded number of questions; a
    question that hangs keeps its thread, and everyone who asks it is told to come again.
    """

    def __init__(self, backends: Backends, threads: int, timeout_seconds: float) -> None:
        self._backends, self._timeout = backends, timeout_seconds
        self._all = asyncio.Semaphore(threads)
        self._share = max(1, threads // 2)
        self._of_tenant: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._questions: Counter[str] = Counter()
        self._flights: dict[Query, asyncio.Task[dict[str, str]]] = {}
        self._running: set[threading.Thread] = set()

    @classmethod
    def of(cls, settings: GatewaySettings) -> SecretReader:
        """The reader over the configured back ends.

        Raises:
            ConfigurationError: see ``open_backends``.
        """
        return cls(open_backends(settings), settings.secret_threads, settings.secret_timeout_seconds)

    async def get(self, query: Query) -> dict[str, str]:
        """What the back ends say.

        Raises:
            Unavailable: one of them failed or took too long, or the tenant asks too much at a time.
            NotPossible: the values are too large for one answer.
        """
        if not self._backends.by_name:
            return {}
        flight = self._flights.get(query) or self._begin(query)
        try:
            async with asyncio.timeout(self._timeout):
                return dict(await asyncio.shield(flight))
        except TimeoutError:
            raise Unavailable(f"no secret back end answered within {self._timeout:g} s; ask again") from None

    def _begin(self, query: Query) -> asyncio.Task[dict[str, str]]:
        tenant = query.tenant_id
        if self._questions[tenant] >= MAX_QUESTIONS_OF_A_TENANT:
            raise Unavailable(f"tenant {tenant!r} asks for more than {MAX_QUESTIONS_OF_A_TENANT} things at a time")
        self._questions[tenant] += 1
        flight = self._flights[query] = asyncio.create_task(self._ask(query, time.monotonic() + self._timeout))

        def ended(_: object) -> None:
            del self._flights[query]
            self._questions[tenant] -= 1
            if not self._questions[tenant]:
                del self._questions[tenant]
            if not flight.cancelled():
                flight.exception()  # whoever asked may have gone

        flight.add_done_callback(ended)
        return flight

    async def _ask(self, query: Query, deadline: float) -> dict[str, str]:
        share = self._of_tenant.setdefault(query.tenant_id, asyncio.Semaphore(self._share))
        async with share, self._all:
            if time.monotonic() > deadline:  # whoever asked was told to come again
                raise Unavailable("the secret back ends are busy; ask again")
            return await self._in_thread(query)

    def _in_thread(self, query: Query) -> asyncio.Future[dict[str, str]]:
        # Daemon threads, not a pool: the interpreter waits for a pool's threads at its end, also for one that hangs.
        loop = asyncio.get_running_loop()
        future: asyncio.Future[dict[str, str]] = loop.create_future()

        def tell(values: dict[str, str] | None, error: Exception | None) -> None:
            self._running.discard(thread)
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(values or {})

        def run() -> None:
            values, failure = None, None
            try:
                values = self._backends.get(query)
            except Exception as error:  # noqa: BLE001 - told to whoever asked
                failure = error
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(tell, values, failure)

        thread = threading.Thread(target=run, name="gateway-secrets", daemon=True)
        self._running.add(thread)
        thread.start()
        return future

    async def close(self) -> None:
        """End what runs; a thread that hangs in a back end is left behind, and ends with the process."""
        closing = threading.Thread(target=self._backends.close, name="gateway-secrets-close", daemon=True)
        closing.start()
        for flight in tuple(self._flights.values()):
            flight.cancel()
        deadline = time.monotonic() + _CLOSE_SECONDS
        threads = (closing, *self._running)
        for thread in threads:
            await asyncio.to_thread(thread.join, max(0.0, deadline - time.monotonic()))
        if left := sum(thread.is_alive() for thread in threads):
            log.warning("secrets.threads_left", extra={"count": left})
