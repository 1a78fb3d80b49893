"""What ``leoflow doctor`` looks at. Each check ends in one sentence that names the setting and the fix."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leoflow_celery.cli.setup import CHECKS
from leoflow_celery.errors import ConfigurationError, LeoflowError
from leoflow_celery.settings import Settings

_ANSWER_SECONDS = 3
_OLDEST_REDIS = (6, 2)
_LISTEN_SECONDS = 0.2
#: What the names of keys and channels begin with that are there only while it looks.
_SCRATCH = "leoflow-doctor"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    check: str
    ok: bool
    sentence: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


#: A deleted pod waits for a reconcile for seconds; so long only where none runs.
_HELD_SECONDS = 300.0
_HELD_SHOWN = 5
#: More is worth a look: nothing here depends on it, but logs, tokens and people do.
_CLOCK_SECONDS = 5.0


def examine(settings: Settings, ca: Path | None = None, only: Sequence[str] = CHECKS) -> list[Finding]:
    """Run the checks named; one that cannot be made because another failed says so.

    Raises:
        ConfigurationError: there is no check of a name.
    """
    unknown = [name for name in only if name not in CHECKS]
    if unknown:
        raise ConfigurationError(f"--only {unknown[0]}: no such check; there are {', '.join(CHECKS)}")
    checks: dict[str, Callable[[], Finding]] = {
        "keys": lambda: check_keys(settings),
        "secrets": lambda: check_secrets(settings),
        "database": lambda: check_database(settings),
        "broker": lambda: check_broker(settings),
        "gateway": lambda: check_gateway(settings, ca),
    }
    findings = [_guarded(name, check) for name, check in checks.items() if name in only]
    if "workers" in only:
        findings.append(_workers(settings, findings))
    if "backends" in only:
        findings.append(_back_ends(settings, findings))
    if "clocks" in only:
        findings.append(_clocks(settings, findings))
    if "exchange" in only and (settings.kubernetes.exchanges_tokens or len(only) < len(CHECKS)):
        findings.append(_guarded("exchange", lambda: check_exchange(settings)))
    holds = settings.kubernetes.hold_pods and settings.dispatch.executor_type == "kubernetes"
    if "pods" in only and (holds or len(only) < len(CHECKS)):
        findings.append(_guarded("pods", lambda: check_held_pods(settings)))
    return findings


def _workers(settings: Settings, before: list[Finding]) -> Finding:
    if any(finding.check == "broker" and not finding.ok for finding in before):
        return Finding("workers", False, "not asked: they answer through the broker")
    return _guarded("workers", lambda: check_workers(settings))


def _back_ends(settings: Settings, before: list[Finding]) -> Finding:
    if any(finding.check == "database" and not finding.ok for finding in before):
        return Finding("backends", False, "not asked: the database knows who announced itself")
    return _guarded("backends", lambda: check_back_ends(settings))


def _clocks(settings: Settings, before: list[Finding]) -> Finding:
    if any(finding.check in ("broker", "database") and not finding.ok for finding in before):
        return Finding("clocks", False, "not compared: the database or the broker does not answer")
    return _guarded("clocks", lambda: check_clocks(settings))


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except LeoflowError as error:
        return Finding(name, False, str(error))


def check_keys(settings: Settings) -> Finding:
    """Both keys are set and usable."""
    from leoflow_celery.security import KeyRing, TokenIssuer

    security = settings.security
    KeyRing(security.seal_keys.get_secret_value())
    TokenIssuer(security.jwt_secret.get_secret_value(), security.agent_token_ttl_seconds)
    return Finding("keys", True, "LEOFLOW_JWT_SECRET and LEOFLOW_SEAL_KEYS are set and usable")


def check_secrets(settings: Settings) -> Finding:
    """Every back end of variables, connections and secrets answers for the standard tenant. Only numbers are shown."""
    import asyncio

    from leoflow_celery.gateway.secret_backends import STANDARD_TENANT, FileBackend, Kind, Query
    from leoflow_celery.gateway.secrets import Backends, SecretReader, open_backends

    gateway = settings.gateway
    backends = open_backends(gateway)
    #: A DAG and a secret that nobody has: a back end that works leaves them out.
    nobody = "leoflow-doctor"
    queries = [Query(kind, STANDARD_TENANT, nobody) for kind in (Kind.VARIABLE, Kind.CONNECTION)]
    queries.append(Query(Kind.SECRET, STANDARD_TENANT, nobody, names=frozenset({nobody})))

    async def ask(name: str) -> list[int]:
        one = Backends({name: backends.by_name[name]})
        reader = SecretReader(one, gateway.secret_threads, gateway.secret_timeout_seconds)
        try:
            return [len(await reader.get(query)) for query in queries]
        finally:
            await reader.close()

    counts = {name: asyncio.run(ask(name)) for name in backends.by_name}
    files = backends.by_name.get("files")
    if isinstance(files, FileBackend) and (problems := files.problems()):
        return Finding("secrets", False, f"{problems[0]}" + (f" ({len(problems)} such)" if len(problems) > 1 else ""))
    said = [
        f"{name} has {variables} variables and {connections} connections"
        for name, (variables, connections, _) in counts.items()
    ]
    text = (
        f"for tenant {STANDARD_TENANT!r} {', '.join(said)}"
        if said
        else "no back end of variables, connections and secrets is set up"
    )
    return Finding("secrets", True, text)


def check_database(settings: Settings) -> Finding:
    """The database answers and its schema is this package's."""
    from leoflow_celery.store.database import Database
    from leoflow_celery.store.migrate import revisions

    database = Database(settings.database)
    try:
        file = database.url.database if database.is_sqlite else None
        if file and not Path(file).exists():  # asking SQLite would create it
            return Finding(
                "database", False, f"{file} does not exist; set LEOFLOW_DATABASE_URL or run 'leoflow db upgrade'"
            )
        current, newest = revisions(database)
    finally:
        database.close()
    if current != newest:
        state = "has no tables" if current is None else f"is at revision {current}, this package needs {newest}"
        return Finding("database", False, f"{database.address} {state}; run 'leoflow db upgrade'")
    return Finding("database", True, f"{database.address} answers and is at revision {newest}")


def check_broker(settings: Settings) -> Finding:
    """What a worker needs of the broker and the result backend works, each both ways and over the URL that it uses."""
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    from leoflow_celery.app import create_app
    from leoflow_celery.queueing.depths import safe_url
    from leoflow_celery.queueing.permissions import refusal, refused_commands

    address, variable = safe_url(settings.broker.url), "LEOFLOW_BROKER_URL"
    app = create_app(settings=settings)
    doing = "connecting"
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=_ANSWER_SECONDS)
            with suppress(RedisError, OSError):  # what follows says which server did not answer
                if refused := refused_commands(settings.broker, needed_queues(settings)):
                    return Finding("broker", False, refusal(settings.broker, refused))
            doing = "a message through a queue (LPUSH, BRPOP)"
            _hear_message(connection)
            doing = "a message to everybody (PUBLISH, PSUBSCRIBE)"
            _hear_broadcast(app, connection)
        if settings.broker.result_url:
            address, variable = safe_url(settings.broker.result_url), "LEOFLOW_BROKER_RESULT_URL"
        doing = "a result (SETEX, GET, PUBLISH, SUBSCRIBE)"
        _hear_result(app)
    except (OperationalError, RedisError, OSError) as error:
        said = "did not answer" if doing == "connecting" else f"{doing} failed"
        return Finding("broker", False, f"{address}: {said} ({error}); start the broker or correct {variable}")
    finally:
        app.close()
    if missing := _what_workers_miss(settings):
        return Finding("broker", False, f"{address} {missing}")
    return Finding("broker", True, f"{address} answers{_dead_letters(settings)}")


def _what_workers_miss(settings: Settings) -> str:
    """What keeps workers from taking messages."""
    from redis.exceptions import RedisError

    from leoflow_celery.queueing.depths import redis_client
    from leoflow_celery.queueing.holding import TAKE, Holder

    with redis_client(settings.broker) as client:
        try:
            said = client.execute_command("HELLO")  # INFO is a command of administrators
            said = said if isinstance(said, dict) else dict(zip(said[::2], said[1::2], strict=True))
            version = said[b"version"].decode()
            if tuple(map(int, version.split(".")[:2])) < _OLDEST_REDIS:
                return f"is Redis {version}; workers need Redis 6.2, Valkey or newer: upgrade it"
            keys = [f"{settings.broker.key_prefix}{key}" for key in ("unacked", "unacked_index")]
            client.eval(TAKE, *Holder().ask(0).arguments(keys, 1, []))
        except RedisError as error:
            return (
                f"does not let workers take messages ({error}); it has to be writable, and its user needs EVAL, "
                "EVALSHA and CLIENT TRACKING (docs/operations.md)"
            )
    return ""


def _hear_message(connection: Any) -> None:
    """Send a message through a queue as workers do and take it again.

    Raises:
        TimeoutError: it did not come.
        OperationalError, RedisError, OSError: the broker refused a command, or is away.
    """
    import kombu

    name = f"{_SCRATCH}.{uuid.uuid4().hex}"
    queue = kombu.Queue(name, kombu.Exchange(name), routing_key=name, durable=False, auto_delete=True)
    producer = connection.Producer(serializer="json")

    def send() -> None:
        producer.publish(name, name, exchange=name, retry=False)

    _hear(connection, queue, lambda body: body == name, send)


def _hear_broadcast(app: Any, connection: Any) -> None:
    """Send a command to nobody as everybody hears it, and hear it as a worker does.

    Raises:
        The same as ``_hear_message``.
    """
    import kombu

    name = f"{_SCRATCH}.{uuid.uuid4().hex}"
    exchange = app.control.mailbox.exchange
    queue = kombu.Queue(name, exchange, durable=False, auto_delete=True)

    def is_ours(body: Any) -> bool:
        return isinstance(body, dict) and body.get("destination") == [name]

    _hear(connection, queue, is_ours, lambda: app.control.broadcast("ping", destination=[name], connection=connection))


def _hear(connection: Any, queue: Any, is_ours: Callable[[Any], bool], send: Callable[[], Any]) -> None:
    heard: list[bool] = []

    def hear(body: Any, message: Any) -> None:
        message.ack()
        heard.append(is_ours(body))

    deadline = time.monotonic() + _ANSWER_SECONDS
    with connection.Consumer([queue], callbacks=[hear], accept=["json"]) as consumer:
        try:
            while not any(heard):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nothing came back within {_ANSWER_SECONDS} s")
                send()  # again and again: nobody says when a listener has begun to listen
                with suppress(TimeoutError):
                    connection.drain_events(timeout=_LISTEN_SECONDS)
        finally:
            with suppress(Exception):  # what went wrong before says more
                consumer.queues[0].delete()


def _hear_result(app: Any) -> None:
    """Store a result as workers do, hear of it as those who wait for it do, read it and forget it.

    Raises:
        TimeoutError: nobody was told.
        RedisError, OSError: the back end refused a command, or is away.
    """
    from celery.states import SUCCESS

    backend, celery_id = app.backend, f"{_SCRATCH}.{uuid.uuid4().hex}"
    with backend.client.pubsub() as listening:
        listening.subscribe(backend.get_key_for_task(celery_id))
        _wait_for_news(listening, "subscribe")
        backend.store_result(celery_id, None, SUCCESS)
        _wait_for_news(listening, "message")
    state = backend.get_state(celery_id)
    backend.forget(celery_id)
    if state != SUCCESS:
        raise TimeoutError(f"the result that was stored is not there: its state is {state}")


def _wait_for_news(listening: Any, kind: str) -> None:
    deadline = time.monotonic() + _ANSWER_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        news = listening.get_message(timeout=left)
        if news is not None and news["type"] == kind:
            return
    raise TimeoutError(f"no {kind} came within {_ANSWER_SECONDS} s")


def _dead_letters(settings: Settings) -> str:
    """What a system that works may still have left behind."""
    from leoflow_celery.queueing.dead_letters import DeadLetters

    letters = DeadLetters(settings)
    try:
        number = letters.count()
    finally:
        letters.close()
    return f"; dead letters: {number}, look at 'leoflow dead-letters list'" if number else "; there are no dead letters"


def check_gateway(settings: Settings, ca: Path | None = None) -> Finding:
    """The gateway serves at the address that agents are told."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

    address = settings.agent.control_plane_addr
    with _channel(settings, address, ca) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_ANSWER_SECONDS, wait_for_ready=False
            )
        except grpc.RpcError as error:
            why = error.code().name.lower()
            text = f"{address} did not answer ({why}); start 'leoflow gateway' or correct LEOFLOW_CONTROL_PLANE_ADDR"
            return Finding("gateway", False, text)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        return Finding("gateway", False, f"{address} answers that it is {name}; look at the gateway's log")
    return Finding("gateway", True, f"{address} serves" + ("" if _uses_tls(settings, ca) else " (without TLS)"))


def _uses_tls(settings: Settings, ca: Path | None) -> bool:
    return ca is not None or settings.gateway.tls_cert is not None


def _channel(settings: Settings, address: str, ca: Path | None) -> Any:
    import grpc

    if not _uses_tls(settings, ca):
        return grpc.insecure_channel(address)
    # Without --ca the certificate itself is the trust root, which is right for a self-signed one.
    path = ca or settings.gateway.tls_cert
    try:
        roots = path.read_bytes() if path else None
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error.strerror}; correct --ca or LEOFLOW_GATEWAY_TLS_CERT"
        ) from error
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(roots))


def check_workers(settings: Settings) -> Finding:
    """Every queue that a standard system uses has a consumer."""
    from leoflow_celery.app import create_app

    app = create_app(settings=settings)
    try:
        answers = app.control.inspect(timeout=_ANSWER_SECONDS).active_queues() or {}
    finally:
        app.close()
    consumed = {queue["name"] for queues in answers.values() for queue in queues}
    missing = [queue for queue in needed_queues(settings) if queue not in consumed]
    if missing:
        starts = dict.fromkeys(
            f"'celery -A leoflow_celery.workers.{_WORKER_OF.get(queue, queue)} worker'" for queue in missing
        )
        text = f"no worker consumes {', '.join(missing)}: what is sent there waits; start {' and '.join(starts)}"
        return Finding("workers", False, text)
    return Finding("workers", True, f"{len(answers)} answer and consume {', '.join(sorted(consumed))}")


def check_back_ends(settings: Settings) -> Finding:
    """A worker of the standard executor reaches its server: only then it announces itself."""
    from leoflow_celery.domain.routing import QUEUE_OF, RECONCILED, ExecutorType
    from leoflow_celery.store import Store
    from leoflow_celery.store.presence import BACK_END_GAP_SECONDS

    standard = ExecutorType(settings.dispatch.executor_type)
    store = Store(settings)
    try:
        back_ends = store.presence.back_ends()
    finally:
        store.close()
    seconds = round(BACK_END_GAP_SECONDS)
    if standard in RECONCILED and standard not in {one.executor for one in back_ends}:
        module = _WORKER_OF.get(QUEUE_OF[standard], QUEUE_OF[standard])
        text = (
            f"no {standard} worker has announced itself for {seconds} s: none runs, or it does not reach "
            f"its {_SERVER_OF[standard]}; start 'celery -A leoflow_celery.workers.{module} worker', or look for "
            "backend.not_announced in its log"
        )
        return Finding("backends", False, text)
    if not back_ends:
        return Finding("backends", True, f"none is needed: the {standard} executor runs tasks in its own worker")
    names = ", ".join(map(str, back_ends))
    return Finding("backends", True, f"{names} announced within the last {seconds} s")


def check_clocks(settings: Settings) -> Finding:
    """How far the clocks of this host, of the servers and of every process are apart."""
    from leoflow_celery.app.clocks import broker_now, offsets
    from leoflow_celery.clock import ServerClock
    from leoflow_celery.services import Services

    services, database, broker = Services(settings), ServerClock(), ServerClock()
    try:
        database.read(services.store.now)
        # "own" cancels out: what is left is how far the servers are apart.
        here = {"database": database.offset_seconds or 0.0}
        if broker_now(services) is not None:
            broker.read(lambda: broker_now(services) or 0.0)
            here["broker"] = broker.offset_seconds or 0.0
        said = offsets(services)
    finally:
        services.close()
    measured = {f"this host against the {server}": seconds for server, seconds in here.items()}
    if "broker" in here:
        measured["the broker against the database"] = here["database"] - here["broker"]
    measured |= {f"{one.process} against the broker": one.broker for one in said}
    measured |= {f"{one.process} against the database": one.database for one in said if one.database is not None}
    wrong = {name: seconds for name, seconds in measured.items() if abs(seconds) > _CLOCK_SECONDS}
    if wrong:
        texts = ", ".join(f"{name} {seconds:+.1f} s" for name, seconds in wrong.items())
        return Finding("clocks", False, f"{texts} (limit {_CLOCK_SECONDS:.0f} s); let NTP set these hosts' clocks")
    largest = max(map(abs, measured.values()))
    return Finding("clocks", True, f"{len(said)} processes and this host differ by {largest:.1f} s at the most")


def check_exchange(settings: Settings) -> Finding:
    """The cluster lets us ask whose tokens agents present, when their pods hold none."""
    from leoflow_celery.gateway.exchange import open_reviewer

    try:
        reviewer = open_reviewer(settings)
    except ConfigurationError as error:
        text = f"not asked: this process does not reach the cluster ({error}); ask where the gateway runs"
        return Finding("exchange", True, text)
    if reviewer is None:
        return Finding("exchange", True, "not needed: LEOFLOW_KUBERNETES_AGENT_TOKEN is not 'exchange'")
    try:
        missing = reviewer.missing_rights()
    finally:
        reviewer.close()
    if missing:
        text = f"the API server does not let this process {' or '.join(missing)}, as the gateway has to; grant it"
        return Finding("exchange", False, text)
    return Finding("exchange", True, f"tokens of pods in namespace {reviewer.namespace} can be exchanged from here")


def check_held_pods(settings: Settings) -> Finding:
    """Pods are held until their end is recorded, and no deleted one is because no reconcile lets it go."""
    from leoflow_celery.executors.kubernetes.client import KubernetesApi
    from leoflow_celery.executors.kubernetes.errors import ApiError
    from leoflow_celery.executors.kubernetes.labels import MANAGED_SELECTOR, of_system
    from leoflow_celery.executors.kubernetes.parse_pod import observe

    try:
        api = KubernetesApi.from_settings(settings.kubernetes)
    except ConfigurationError as error:
        text = f"not asked: this process does not reach the cluster ({error}); ask where the k8s worker runs"
        return Finding("pods", True, text)
    try:
        selector = of_system(MANAGED_SELECTOR, settings.kubernetes.system)
        pages = api.list_pages(api.pods_path(), operation="list_pods", label_selector=selector)
        held = [pod for page in pages for pod in map(observe, page["items"]) if pod.held]
        now = api.clock.time()
        may = api.may_release_pods()
    except ApiError as error:
        if error.status != 403:
            raise
        return Finding(
            "pods", True, f"not asked: this process may not list pods ({error}); ask where the k8s worker runs"
        )
    finally:
        api.close()
    if settings.kubernetes.hold_pods and not may:
        text = (
            f"no pod of namespace {api.namespace} is held until its end is recorded, and a drained node may run a task "
            "twice: grant 'patch' on pods to the k8s worker (deploy/kubernetes/tasks/role.yaml), or set "
            "LEOFLOW_KUBERNETES_HOLD_PODS=false"
        )
        return Finding("pods", False, text)
    deleted = [(pod.name, pod.deletion_due_at) for pod in held if pod.deletion_due_at is not None]
    stuck = sorted(name for name, due_at in deleted if now - due_at > _HELD_SECONDS)
    if not stuck:
        return Finding(
            "pods", True, f"{len(held)} pods of namespace {api.namespace} are held until their end is recorded"
        )
    names = ", ".join(stuck[:_HELD_SHOWN]) + (", …" if len(stuck) > _HELD_SHOWN else "")
    text = (
        f"{len(stuck)} deleted pods of namespace {api.namespace} wait for a reconcile ({names}): run the control plane "
        "and a worker of queue k8s that may patch pods, or take the finalizer off by hand "
        "(docs/kubernetes.md, 'Held pods')"
    )
    return Finding("pods", False, text)


#: What a worker of these executors talks to.
_SERVER_OF = {"kubernetes": "API server", "docker": "Engine"}
#: The module below ``workers`` that consumes a queue, where the names differ.
_WORKER_OF = {"dispatch": "control", "results": "control", "maintenance": "control"}


def needed_queues(settings: Settings) -> list[str]:
    """The standard executor's queue, inline HTTP, and the control plane's own."""
    from leoflow_celery.domain.routing import (
        DISPATCH_QUEUE,
        MAINTENANCE_QUEUE,
        QUEUE_OF,
        RESULTS_QUEUE,
        ExecutorType,
    )

    standard = QUEUE_OF[ExecutorType(settings.dispatch.executor_type)]
    return [standard, QUEUE_OF[ExecutorType.INLINE], DISPATCH_QUEUE, RESULTS_QUEUE, MAINTENANCE_QUEUE]
