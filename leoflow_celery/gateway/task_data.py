"""GetTaskSpec, FetchXCom and PushXCom: what the agent runs, what its task is given, and what it gives back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from leoflow_celery import metrics
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import Operator, TaskRequest
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.domain.xcom import JSON_CONTENT_TYPE, RETURN_VALUE, XComKey, XComValue, check_value, is_json
from leoflow_celery.errors import Fenced, LeoflowError, NotFound, StoredRequestInvalid, XComRejected
from leoflow_celery.gateway.lifecycle import CompletionNudge
from leoflow_celery.gateway.rpc import InvalidArgument, NotPermitted, NotPossible
from leoflow_celery.gateway.secret_backends import Kind
from leoflow_celery.gateway.secrets import ChannelPolicy, SecretReader, query_of
from leoflow_celery.gateway.sessions import Caller, Claims, ForeignHolders, Recent
from leoflow_celery.gateway.threads import Threads
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.queueing.messages import open_request
from leoflow_celery.security import KeyRing
from leoflow_celery.settings import XComSettings
from leoflow_celery.store import Store
from leoflow_celery.store.attempts import AttemptStore, FinishCondition
from leoflow_celery.store.views import TaskInstanceView

#: Where pods and containers find the staging volume of their run.
STAGING_DIR = "/staging"
_MOUNTS_STAGING = (ExecutorType.KUBERNETES, ExecutorType.DOCKER)
_RESOLVED_SOURCE = "env"


_NEEDS_OUR_AGENT = (
    "operator: an http_api task that runs in a container needs leoflow_celery's agent, and the agent of this image is "
    "another; let it run inline (executor inline, in a DAG execution_mode inline), or use an image with our agent"
)


class UnknownSecret(LeoflowError):
    """A request names a secret that nobody has."""


def secret_names(request: TaskRequest) -> dict[str, str]:
    """Variable → name of the secrets that the gateway resolves; other sources are the executor's."""
    return {
        secret.name: secret.reference or secret.name for secret in request.secrets if secret.source == _RESOLVED_SOURCE
    }


def resolve_secrets(request: TaskRequest, values: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of the secrets that the gateway resolves.

    Raises:
        UnknownSecret: names the secret.
    """
    names = secret_names(request)
    for variable, name in names.items():
        if name not in values:
            raise UnknownSecret(
                f"secret {name!r} (variable {variable!r}) is unknown to tenant {request.tenant_id!r} and DAG "
                f"{request.dag_id!r}; add it to a back end of LEOFLOW_GATEWAY_SECRET_BACKENDS, a file for example "
                "below LEOFLOW_GATEWAY_SECRET_FILES"
            )
    return {variable: values[name] for variable, name in names.items()}


def task_spec(
    request: TaskRequest, executor: str, secrets: Mapping[str, str], first_reschedule_at: float | None = None
) -> pb.TaskSpec:
    """A request as the protocol's TaskSpec."""
    environment = dict(request.env)
    if request.staging_claim and executor in _MOUNTS_STAGING:
        environment.setdefault("LEOFLOW_STAGING_DIR", STAGING_DIR)
    environment.update(secrets)
    spec = pb.TaskSpec(
        tenant_id=request.tenant_id,
        dag_id=request.dag_id,
        dag_version=request.dag_version,
        run_id=request.run_id,
        task_id=request.task_id,
        try_number=request.try_number,
        operator=request.operator.value,
        entrypoint=request.entrypoint,
        environment=environment,
        xcom_input_mapping=request.xcom_input,
        execution_timeout_seconds=request.timeout_seconds,
        call_args_json=json.dumps(request.call_args) if request.call_args else "",
        logical_date=request.logical_date,
        data_interval_start=request.data_interval_start,
        data_interval_end=request.data_interval_end,
        params_json=json.dumps(request.params) if request.params else "",
        first_reschedule_at=_rfc3339(first_reschedule_at),
        max_tries=request.max_tries,
        declared_variables=request.variables or (),
        declared_connections=request.connections or (),
    )
    if request.http_request is not None:
        spec.extra["http_request"] = request.http_request.model_dump_json()
    if request.argv:
        spec.extra["argv"] = list(request.argv)
        spec.extra["stdin"] = request.stdin
    return spec


def _rfc3339(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


@dataclass(frozen=True, slots=True)
class Wiring:
    """What other calls need of a request; the same for all launches of a try."""

    upstream: frozenset[str]
    schema: dict[str, Any] | None
    #: The names that it declared; None: all that its tenant and DAG may see.
    declared: Mapping[Kind, frozenset[str] | None] = field(default_factory=dict)


class Specs:
    """The GetTaskSpec method, and the requests behind it."""

    def __init__(
        self,
        attempts: AttemptStore,
        keys: KeyRing,
        policy: ChannelPolicy,
        secrets: SecretReader,
        nudge: CompletionNudge,
        threads: Threads,
    ) -> None:
        self._attempts, self._keys, self._policy = attempts, keys, policy
        self._secrets, self._nudge, self._threads = secrets, nudge, threads
        self._wirings: Recent[tuple[str, int], Wiring] = Recent(4_096)

    async def get_task_spec(self, caller: Caller, _: pb.GetTaskSpecRequest) -> pb.TaskSpec:
        """The spec, for the holder. A request that can never run, or get its secrets, ends here."""
        try:
            view, request = await self._threads.store(self._read, caller)
        except StoredRequestInvalid as error:
            return await self._give_up(caller, FailureReason.INVALID_SPEC, error)
        if view.attempt != caller.attempt or not caller.holder or view.holder != caller.holder or view.is_terminal:
            metrics.record_fenced("read")
            raise Fenced(f"attempt {caller.attempt} is not held by the caller (any more)")
        if request.operator is Operator.HTTP_API and ForeignHolders.is_one(caller.holder):
            return await self._give_up(caller, FailureReason.INVALID_SPEC, LeoflowError(_NEEDS_OUR_AGENT))
        try:
            return task_spec(request, view.executor, await self._resolved(caller, request), view.first_reschedule_at)
        except UnknownSecret as error:
            return await self._give_up(caller, FailureReason.UNKNOWN_SECRET, error)
        except NotPossible as error:
            return await self._give_up(caller, FailureReason.FORBIDDEN, error)

    async def wiring(self, caller: Caller) -> Wiring:
        """The inputs a caller declared, and the schema of its value."""
        key = (caller.attempt.task_instance_id, caller.attempt.try_number)
        if (known := self._wirings.get(key)) is not None:
            return known
        _, request = await self._threads.store(self._read, caller)
        names = {Kind.VARIABLE: request.variables, Kind.CONNECTION: request.connections}
        declared = {kind: None if known is None else frozenset(known) for kind, known in names.items()}
        wiring = Wiring(frozenset(request.xcom_input.values()), request.xcom_schema, declared)
        self._wirings.set(key, wiring)
        return wiring

    async def declared(self, caller: Caller, kind: Kind) -> frozenset[str] | None:
        """The names that the caller's request declared, or None when it did not."""
        return (await self.wiring(caller)).declared.get(kind)

    def _read(self, caller: Caller) -> tuple[TaskInstanceView, TaskRequest]:
        view = self._attempts.get(caller.attempt.task_instance_id, caller.attempt.try_number)
        return view, open_request(self._keys, view.sealed_request)

    async def _resolved(self, caller: Caller, request: TaskRequest) -> dict[str, str]:
        names = frozenset(secret_names(request).values())
        if not names:
            return {}
        self._policy.check("secrets of a task")
        return resolve_secrets(request, await self._secrets.get(query_of(caller.identity, Kind.SECRET, names)))

    async def _give_up(self, caller: Caller, reason: FailureReason, error: LeoflowError) -> pb.TaskSpec:
        outcome = Outcome.failed(reason, str(error))
        condition = FinishCondition(holder=caller.holder)
        finished = await self._threads.store(self._attempts.finish, caller.attempt, outcome, condition)
        if finished.recorded:
            self._nudge.finished(caller.attempt)
        raise NotPossible(str(error)) from error


_MAX_KEY_BYTES = 512
_MAX_CONTENT_TYPE_CHARACTERS = 255


#: The one key of the object that ``leoflow_runtime`` leaves as the return value of a task that skipped itself, when its
#: agent gives it no other place to say so.
_SKIP_NOTE = b"leoflow_skipped"
_MAX_SKIP_NOTE_BYTES = 16 * 1024


class XComMethods:
    """Values in and out, for the holder of an attempt."""

    def __init__(
        self,
        store: Store,
        specs: Specs,
        claims: Claims,
        foreign: ForeignHolders,
        threads: Threads,
        settings: XComSettings,
    ) -> None:
        self._store, self._specs, self._claims, self._foreign = store, specs, claims, foreign
        self._threads, self._settings = threads, settings

    async def fetch(self, caller: Caller, request: pb.FetchXComRequest) -> pb.FetchXComResponse:
        """A value of a task that the caller declared as an input."""
        await self._claims.require(caller)
        upstream = request.upstream_task_id
        if upstream not in (await self._specs.wiring(caller)).upstream:
            raise NotPermitted(f"task {upstream!r} is not declared as an input; add it to xcom_input to read its XComs")
        key = _key(caller, request.key, upstream)
        value = await self._threads.store(self._store.xcom.get, key)
        if value is None:
            raise NotFound(f"task {upstream!r} has no XCom {key.key!r} in this run")
        metrics.record_xcom_pull(caller.identity.dag_id)
        response = pb.FetchXComResponse(value=value.value, content_type=value.content_type, size_bytes=len(value.value))
        response.created_at.FromNanoseconds(int(value.created_at * 1e9))
        return response

    async def push(self, caller: Caller, request: pb.PushXComRequest) -> pb.PushXComResponse:
        """Store a value, or say why not."""
        key = _key(caller, request.key)
        content_type = request.content_type or JSON_CONTENT_TYPE
        if len(content_type) > _MAX_CONTENT_TYPE_CHARACTERS or "\x00" in content_type:
            raise InvalidArgument(f"content_type must have at most {_MAX_CONTENT_TYPE_CHARACTERS} characters, no NUL")
        says_its_end = key.key == RETURN_VALUE and self._foreign.is_one(caller.holder)
        if says_its_end and (why := skip_note(request.value)) is not None:
            await self._claims.require(caller)
            self._foreign.skipped.set(caller.holder, why)
            return pb.PushXComResponse(accepted=True, ttl_seconds=self._settings.ttl_seconds)
        schema = (await self._specs.wiring(caller)).schema if key.key == RETURN_VALUE else None
        try:
            # What waits for its turn is in memory.
            if len(request.value) > self._settings.max_bytes:
                self._check(key, request.value, content_type, None)
            # One after the other for each tenant, and before SQL is asked for anything.
            await self._threads.check(caller.identity.tenant_id, self._check, key, request.value, content_type, schema)
            await self._threads.store(self._put, caller, key, request.value, content_type)
        except XComRejected as rejected:
            await self._claims.require(caller)
            metrics.record_xcom_rejected(rejected.reason)
            if says_its_end:
                self._foreign.refused_values.set(caller.holder, rejected.reason)
            return pb.PushXComResponse(accepted=False, rejection_reason=rejected.reason)
        except Fenced:
            metrics.record_fenced("xcom")
            raise
        metrics.record_xcom_push(caller.identity.dag_id, len(request.value))
        return pb.PushXComResponse(accepted=True, ttl_seconds=self._settings.ttl_seconds)

    def _check(self, key: XComKey, value: bytes, content_type: str, schema: dict[str, Any] | None) -> None:
        if key.key == RETURN_VALUE and not is_json(content_type):
            raise XComRejected("invalid_xcom", f"a return value is {JSON_CONTENT_TYPE}, not {content_type!r}")
        check_value(value, content_type, schema, self._settings.max_bytes)

    def _put(self, caller: Caller, key: XComKey, value: bytes, content_type: str) -> None:
        item = (key, XComValue(value, content_type))
        self._store.claims.put_xcoms(caller.attempt, caller.holder, [item])


def skip_note(value: bytes) -> str | None:
    """Why a task skipped itself, where the value is the note that ``leoflow_runtime`` leaves for agents of others."""
    if len(value) > _MAX_SKIP_NOTE_BYTES or _SKIP_NOTE not in value:
        return None
    try:
        note = json.loads(value)
    except ValueError:
        return None
    why = note.get(_SKIP_NOTE.decode()) if isinstance(note, dict) and len(note) == 1 else None
    return why if isinstance(why, str) else None


def _key(caller: Caller, key: str, task_id: str = "") -> XComKey:
    if len(key.encode(errors="surrogatepass")) > _MAX_KEY_BYTES or ":" in key or "\x00" in key:
        raise InvalidArgument(f"XCom key {key[:80]!r} must have at most {_MAX_KEY_BYTES} bytes of UTF-8, no ':' or NUL")
    return caller.identity.xcom_key(key, task_id)
