"""Sending our messages: one place knows which task, which queue and which key each of them has.

The message of an agent's executor carries request and token in its seal: its worker has no SQL. The message of an
inline task carries the attempt only: its worker reads the row it claims. What monitors may see stands beside the seal.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from celery import Celery
from kombu.exceptions import KombuError, OperationalError
from redis.exceptions import RedisError

from leoflow_celery.background import patiently
from leoflow_celery.clock import due_in
from leoflow_celery.domain.attempt import AttemptId, attempt_name
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.quantity import format_bytes
from leoflow_celery.domain.relaunch import RelaunchPolicy, with_memory_limit
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import EXPIRY_SECONDS, QUEUE_OF, RECONCILED, ExecutorType, TaskName
from leoflow_celery.errors import BrokerUnavailable, DecryptionFailed
from leoflow_celery.queueing.depths import safe_url
from leoflow_celery.queueing.messages import (
    SCOPE_OF,
    AdvanceTry,
    AttemptEnded,
    Cancel,
    CollectStaging,
    Launch,
    LaunchInline,
    Message,
    Present,
    Reconcile,
    StagingDeleted,
    Stop,
    open_request,
    seal_message,
)
from leoflow_celery.security import KeyRing, Scope, TokenIssuer
from leoflow_celery.settings import Settings

if TYPE_CHECKING:
    from leoflow_celery.store.views import TaskInstanceView  # SQL: launch workers have none

log = logging.getLogger(__name__)
#: A message and its event.
_COMMANDS_PER_LAUNCH = 2
#: Before any launch: who is not heard of is not reconciled, and a stop behind ten thousand launches comes too late.
_FIRST = 0
#: How long what a launch worker has to tell waits for the broker: longer than a restart of it.
_DELIVERY_SECONDS = 300


@dataclass(frozen=True, slots=True)
class LaunchOrder:
    """What the message of one launch is made of; ``queue`` is the executor's own when empty."""

    request: TaskRequest
    executor: ExecutorType
    attempt: AttemptId
    celery_task_id: str
    queue: str = ""


class Parts(Protocol):
    """What a publisher needs of its process."""

    @property
    def settings(self) -> Settings: ...

    @property
    def keys(self) -> KeyRing: ...

    @property
    def tokens(self) -> TokenIssuer: ...


class Publisher:
    """Sends the messages of one process."""

    def __init__(self, app: Celery, parts: Parts) -> None:
        self._app, self._parts = app, parts

    # -- to launch workers ----------------------------------------------------------------------------------------

    def launch(self, *orders: LaunchOrder) -> None:
        """Send the messages that launch attempts, in few round trips; again is harmless.

        Raises:
            BrokerUnavailable: the broker did not take all of them.
        """
        if len(orders) > 1 and self._are_sent_together(orders):
            return
        for order in orders:
            self._launch(order)

    def _are_sent_together(self, orders: Sequence[LaunchOrder]) -> bool:
        """False when nobody knows which of them the broker has.

        A connection may have been closed since its last use, which sending them one by one notices and mends.
        """
        try:
            with self._app.producer_pool.acquire(block=True) as producer:
                if not hasattr(producer, "batch"):
                    return False  # the producer of another Celery
                connection: Any = producer.connection
                connection.ensure_connection(max_retries=1, interval_start=0)
                with producer.batch(len(orders) * _COMMANDS_PER_LAUNCH):
                    for order in orders:
                        self._launch(order, producer=producer, retry=False)
        except (BrokerUnavailable, KombuError, RedisError, OSError) as error:
            log.info("launch.sent_one_by_one", extra={"error": repr(error)})
            return False
        return True

    def _launch(self, order: LaunchOrder, **options: Any) -> None:
        request, attempt, executor = order.request, order.attempt, order.executor
        message: Message = LaunchInline(attempt)
        if executor is not ExecutorType.INLINE:
            message = Launch(attempt, self._ready(request, attempt))
        self._send(
            TaskName.of("execute", executor),
            {"sealed": seal_message(self._parts.keys, SCOPE_OF[executor], message)},
            queue=order.queue or QUEUE_OF[executor],
            task_id=order.celery_task_id,
            priority=request.priority,
            shown={
                "attempt": f"{request.operator} {request.dag_id}.{request.task_id} {attempt}",
                "image": request.image,
            },
            **options,
        )

    def _ready(self, request: TaskRequest, attempt: AttemptId) -> TaskRequest:
        token = request.agent_token if attempt.launch == 1 else ""
        token = token or self._parts.tokens.mint(request, attempt)
        address = request.control_plane_addr or self._parts.settings.agent.control_plane_addr
        return request.evolve(agent_token=token, control_plane_addr=address)

    def launch_again(self, view: TaskInstanceView, policy: RelaunchPolicy) -> None:
        """Send the message of a recorded try's current launch; ``policy`` says how its memory has grown.

        Raises:
            BrokerUnavailable: the broker did not take it.
            DecryptionFailed: the row was sealed with a key this process does not have.
        """
        request = open_request(self._parts.keys, view.sealed_request)
        if view.oom_relaunches:
            request = with_memory_limit(request, format_bytes(view.memory.current(policy)))
        executor = ExecutorType(view.executor)
        self.launch(LaunchOrder(request, executor, view.attempt, view.celery_task_id, view.queue))

    def stop(self, view: TaskInstanceView) -> None:
        """Ask the server that runs a cancelled attempt to stop it now; nothing when no server is known.

        Raises:
            BrokerUnavailable: the broker did not take it; the reconcile will stop it later.
        """
        executor = ExecutorType(view.executor)
        if executor not in RECONCILED or view.sent_at is None:
            return
        back_end = BackEnd.parse(view.back_end) if view.back_end else BackEnd(executor)
        if executor is ExecutorType.DOCKER and not back_end.host:
            return  # still in its queue, or started a moment ago: the reconcile finds it
        name = attempt_name(view.attempt, view.dag_id, view.task_id)
        self._tell(back_end, "stop", Stop(name, self._grace_seconds(view, executor)))

    def _grace_seconds(self, view: TaskInstanceView, executor: ExecutorType) -> float:
        settings = self._parts.settings
        group = settings.kubernetes if executor is ExecutorType.KUBERNETES else settings.docker
        wish = requested_grace(self._parts.keys, view)
        return group.termination_grace_seconds if wish is None else wish

    def reconcile(self, back_end: BackEnd, message: Reconcile, good_for_seconds: float) -> None:
        """Ask a back end to compare what exists with what SQL expects.

        Raises:
            BrokerUnavailable: the broker did not take it.
        """
        self._tell(back_end, "reconcile", message, good_for_seconds, expires=EXPIRY_SECONDS)

    def collect_staging(self, back_end: BackEnd, message: CollectStaging, good_for_seconds: float) -> None:
        """Ask a back end to delete staging volumes.

        Raises:
            BrokerUnavailable: the broker did not take it.
        """
        self._tell(back_end, "staging", message, good_for_seconds, expires=EXPIRY_SECONDS)

    def _tell(
        self, back_end: BackEnd, kind: str, message: Message, good_for_seconds: float | None = None, **options: Any
    ) -> None:
        executor = back_end.executor
        self._send(
            TaskName.of(kind, executor),
            {"sealed": seal_message(self._parts.keys, SCOPE_OF[executor], message, good_for_seconds)},
            queue=back_end.queue,
            priority=_FIRST,
            shown={"to": str(back_end)},
            **options,
        )

    # -- to the control plane -------------------------------------------------------------------------------------

    def advance_try(self, task_instance_id: str, try_number: int, countdown_seconds: float | None = None) -> None:
        """Ask the control plane to look at a try now: complete it, or send its next launch.

        Raises:
            BrokerUnavailable: the broker did not take it; the sweep will look later.
        """
        message = AdvanceTry(task_instance_id, try_number)
        shown = {"try": f"{task_instance_id}/{try_number}"}
        eta = None if countdown_seconds is None else due_in(countdown_seconds)
        self._report(TaskName.ADVANCE_TRY, Scope.CONTROL, message, shown, eta=eta)

    def cancel(self, celery_id: str) -> None:
        """Ask the control plane to cancel the try that a Celery id belongs to.

        Raises:
            BrokerUnavailable: the broker did not take it.
            ConfigurationError: this process holds no key for that.
        """
        self._report(TaskName.CANCEL_TRY, Scope.CANCEL, Cancel(celery_id), {"cancels": celery_id}, priority=_FIRST)

    def attempt_ended(self, executor: ExecutorType, message: AttemptEnded) -> None:
        """Tell how an attempt ended; waits for a broker that is away.

        Raises:
            BrokerUnavailable: it was away for minutes.
        """
        shown = {"attempt": str(message.attempt)}
        self._report_patiently(TaskName.RECORD_END, SCOPE_OF[executor], message, shown)

    def staging_deleted(self, message: StagingDeleted) -> None:
        """Tell which staging volumes are gone; waits for a broker that is away.

        Raises:
            BrokerUnavailable: it was away for minutes.
        """
        shown = {"back_end": str(message.back_end), "claims": sorted(message.claims)}
        self._report_patiently(TaskName.RECORD_STAGING, SCOPE_OF[message.back_end.executor], message, shown)

    def present(self, message: Present, good_for_seconds: float) -> None:
        """Tell that a worker holds a back end now; tried once, since the next word follows soon.

        Raises:
            BrokerUnavailable: the broker did not take it.
        """
        scope, shown = SCOPE_OF[message.back_end.executor], {"back_end": str(message.back_end)}
        payload = self._said(scope, message, good_for_seconds)
        name, expires = TaskName.RECORD_PRESENCE, EXPIRY_SECONDS
        self._send(name, payload, queue=name.queue, shown=shown, priority=_FIRST, expires=expires)

    @patiently(log, _DELIVERY_SECONDS)
    def _report_patiently(self, task: TaskName, scope: Scope, message: Message, shown: dict[str, Any]) -> None:
        self._report(task, scope, message, shown)

    def _report(self, task: TaskName, scope: Scope, message: Message, shown: dict[str, Any], **options: Any) -> None:
        self._send(task, self._said(scope, message), queue=task.queue, shown=shown, **options)

    def _said(self, scope: Scope, message: Message, good_for_seconds: float | None = None) -> dict[str, Any]:
        sealed = seal_message(self._parts.keys, scope, message, good_for_seconds)
        return {"speaker": scope.value, "sealed": sealed}

    # -- all of them ----------------------------------------------------------------------------------------------

    def _send(self, task: TaskName, payload: dict[str, Any], *, shown: dict[str, Any], **options: Any) -> None:
        """Publish one message; ``shown`` is what monitors, logs and events show of it.

        Its result comes from SQL, not from the task that takes it. A subscription per message would need the result
        backend to answer, and make a dead broker hang the publisher for 20 s.
        """
        try:
            self._app.send_task(
                task.value, kwargs=payload, ignore_result=True, argsrepr="()", kwargsrepr=str(shown), **options
            )
        except (OperationalError, RedisError, OSError) as error:
            address = safe_url(self._parts.settings.broker.url)
            raise BrokerUnavailable(f"broker {address} did not answer: {error}") from error


def requested_grace(keys: KeyRing, view: TaskInstanceView) -> float | None:
    """How long a try asks for between SIGTERM and SIGKILL, in seconds; None when it does not, or nobody can read it."""
    try:
        return open_request(keys, view.sealed_request).execution.termination_grace_seconds
    except DecryptionFailed:
        return None
