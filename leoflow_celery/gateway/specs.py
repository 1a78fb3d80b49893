"""GetTaskSpec: the sealed request becomes what the agent runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leoflow_celery import metrics
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import ExecutorType
from leoflow_celery.errors import Fenced, LeoflowError, StoredRequestInvalid
from leoflow_celery.gateway.lifecycle import Notifier
from leoflow_celery.gateway.rpc import NotPossible
from leoflow_celery.gateway.secrets import ChannelPolicy, SecretReader, query_of
from leoflow_celery.gateway.sessions import Caller, Recent
from leoflow_celery.gateway.threads import Threads
from leoflow_celery.gateway.secret_backends import Kind
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.queueing.messages import open_request
from leoflow_celery.security import KeyRing
from leoflow_celery.store.attempts import AttemptStore, FinishCondition
from leoflow_celery.store.views import TaskInstanceView

#: Where pods and containers find the staging volume of their run.
STAGING_DIR = "/staging"
_MOUNTS_STAGING = (ExecutorType.KUBERNETES, ExecutorType.DOCKER)
_RESOLVED_SOURCE = "env"


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


def task_spec(request: TaskRequest, executor: str, secrets: Mapping[str, str]) -> pb.TaskSpec:
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
    )
    if request.http_request is not None:
        spec.extra["http_request"] = request.http_request.model_dump_json()
    if request.argv:
        spec.extra["argv"] = list(request.argv)
        spec.extra["stdin"] = request.stdin
    return spec


@dataclass(frozen=True, slots=True)
class Wiring:
    """What XCom calls need of a request; the same for all launches of a try."""

    upstream: frozenset[str]
    schema: dict[str, Any] | None


class Specs:
    """The GetTaskSpec method, and the requests behind it."""

    def __init__(
        self,
        attempts: AttemptStore,
        keys: KeyRing,
        policy: ChannelPolicy,
        secrets: SecretReader,
        notifier: Notifier,
        threads: Threads,
    ) -> None:
        self._attempts, self._keys, self._policy = attempts, keys, policy
        self._secrets, self._notifier, self._threads = secrets, notifier, threads
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
        try:
            return task_spec(request, view.executor, await self._resolved(caller, request))
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
        wiring = Wiring(frozenset(request.xcom_input.values()), request.xcom_schema)
        self._wirings.set(key, wiring)
        return wiring

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
            self._notifier.finished(caller.attempt)
        raise NotPossible(str(error)) from error
