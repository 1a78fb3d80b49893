"""Turning a recorded try into the Celery message that launches it.

The message of an agent's executor carries ids in clear and one sealed blob (request and token): its worker has no
SQL. The message of an inline task carries ids only: its worker reads the row it claims.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from celery import Celery
from kombu.exceptions import KombuError, OperationalError
from pydantic import ValidationError
from redis.exceptions import RedisError

from leoflow_celery.domain.attempt import AttemptId, attempt_name
from leoflow_celery.domain.backend import BackEnd
from leoflow_celery.domain.memory import with_memory_limit
from leoflow_celery.domain.quantity import format_bytes
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import QUEUE_OF, RECONCILED, RESULTS_QUEUE, STOP_PREFIX, ExecutorType, task_name
from leoflow_celery.errors import BrokerUnavailable, Unsealable
from leoflow_celery.runtime.queues import safe_url
from leoflow_celery.services import Services
from leoflow_celery.store.views import TaskInstanceView

log = logging.getLogger(__name__)
SETTLE_TASK = "leoflow.results.settle"
#: A message and its event.
_COMMANDS_PER_LAUNCH = 2


@dataclass(frozen=True, slots=True)
class LaunchMessage:
    """What the message of one launch is made of; ``queue`` is the executor's own when empty."""

    request: TaskRequest
    executor: ExecutorType
    attempt: AttemptId
    celery_task_id: str
    queue: str = ""


class MessageSender:
    """Publishes launch messages and nudges."""

    def __init__(self, app: Celery, services: Services) -> None:
        self._app = app
        self._services = services

    def launch(self, *messages: LaunchMessage) -> None:
        """Send the messages that launch attempts, in few round trips; again is harmless.

        Raises:
            BrokerUnavailable: the broker did not take all of them.
        """
        if len(messages) > 1 and self._are_sent_together(messages):
            return
        for message in messages:
            self._launch(message)

    def _are_sent_together(self, messages: Sequence[LaunchMessage]) -> bool:
        """False when nobody knows which of them the broker has.

        A connection may have been closed since its last use, which sending them one by one notices and mends.
        """
        try:
            with self._app.producer_pool.acquire(block=True) as producer:
                connection: Any = producer.connection
                connection.ensure_connection(max_retries=1, interval_start=0)
                with producer.batch(len(messages) * _COMMANDS_PER_LAUNCH):  # type: ignore[attr-defined]
                    for message in messages:
                        self._launch(message, producer=producer, retry=False)
        except (BrokerUnavailable, KombuError, RedisError, OSError) as error:
            log.info("launch.sent_one_by_one", extra={"error": repr(error)})
            return False
        return True

    def _launch(self, message: LaunchMessage, **options: Any) -> None:
        request, executor, attempt = message.request, message.executor, message.attempt
        summary = f"{request.operator} {request.dag_id}.{request.task_id} {attempt}"
        payload: dict[str, Any] = {"attempt": attempt.to_json()}
        if executor is not ExecutorType.INLINE:
            payload["operator"] = request.operator.value
            payload["image"] = request.image
            payload["sealed"] = self._sealed(request, attempt)
        self.send(
            task_name(executor),
            payload,
            queue=message.queue or QUEUE_OF[executor],
            task_id=message.celery_task_id,
            priority=request.priority,
            # The result comes from SQL, not from this task; a subscription per message would need the result backend
            # to answer, and make a dead broker hang the publisher for 20 s.
            ignore_result=True,
            argsrepr="()",
            kwargsrepr=f"{{'attempt': '{summary}', 'image': '{request.image}'}}",
            **options,
        )

    def _sealed(self, request: TaskRequest, attempt: AttemptId) -> str:
        token = request.agent_token if attempt.launch == 1 else ""
        token = token or self._services.tokens.mint(request, attempt)
        address = request.control_plane_addr or self._services.settings.agent.control_plane_addr
        ready = request.evolve(agent_token=token, control_plane_addr=address)
        return self._services.sealer.seal({"request": ready.model_dump(mode="json", exclude_defaults=True)})

    def launch_again(self, view: TaskInstanceView) -> None:
        """Send the message of a recorded try's current launch.

        Raises:
            BrokerUnavailable: the broker did not take it.
            Unsealable: the row was sealed with a key this process does not have.
        """
        request = self._with_grown_memory(open_request(self._services, view.sealed_request), view)
        executor = ExecutorType(view.executor)
        self.launch(LaunchMessage(request, executor, view.attempt, view.celery_task_id, view.queue))

    def _with_grown_memory(self, request: TaskRequest, view: TaskInstanceView) -> TaskRequest:
        if not view.oom_relaunches:
            return request
        memory = format_bytes(view.memory.current(self._services.store.relaunch_policy))
        return with_memory_limit(request, memory)

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
        self.send(
            f"{STOP_PREFIX}{executor}",
            {
                "name": attempt_name(view.attempt, view.dag_id, view.task_id),
                "grace_seconds": self._grace_seconds(view, executor),
            },
            queue=back_end.queue,
            priority=0,  # before any launch
            ignore_result=True,
        )

    def _grace_seconds(self, view: TaskInstanceView, executor: ExecutorType) -> float:
        settings = self._services.settings
        group = settings.kubernetes if executor is ExecutorType.KUBERNETES else settings.docker
        wish = requested_grace(self._services, view)
        return group.termination_grace_seconds if wish is None else wish

    def settle(self, task_instance_id: str, try_number: int, countdown_seconds: float | None = None) -> None:
        """Ask a results worker to look at a try now: complete it, or send its next launch.

        Raises:
            BrokerUnavailable: the broker did not take it; the sweep will look later.
        """
        self.send(
            SETTLE_TASK,
            {"task_instance_id": task_instance_id, "try_number": try_number},
            queue=RESULTS_QUEUE,
            countdown=countdown_seconds,
            ignore_result=True,
        )

    def send(self, name: str, kwargs: dict[str, Any], **options: Any) -> None:
        """Publish one message.

        Raises:
            BrokerUnavailable: names the broker without its password.
        """
        try:
            self._app.send_task(name, kwargs=kwargs, **options)
        except (OperationalError, RedisError, OSError) as error:
            address = safe_url(self._services.settings.broker.url)
            raise BrokerUnavailable(f"broker {address} did not answer: {error}") from error


def seal_request(services: Services, request: TaskRequest) -> str:
    """A request as it rests in SQL."""
    return services.sealer.seal({"request": request.model_dump(mode="json", exclude_defaults=True)})


def open_request(services: Services, sealed: str) -> TaskRequest:
    """The request again.

    Raises:
        Unsealable: sealed with a key this process does not have, or by a version whose requests it does not know.
    """
    try:
        return TaskRequest.model_validate(services.sealer.open(sealed)["request"])
    except (KeyError, ValidationError) as error:
        raise Unsealable("a sealed request is none of this version; upgrade the process that reads it") from error


def requested_grace(services: Services, view: TaskInstanceView) -> float | None:
    """How long a try asks for between SIGTERM and SIGKILL, in seconds; None when it does not, or nobody can read it."""
    try:
        return open_request(services, view.sealed_request).execution.termination_grace_seconds
    except Unsealable:
        return None
