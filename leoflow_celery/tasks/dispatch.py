"""``leoflow.dispatch``: any publisher of the Celery protocol hands over a task instance as plain JSON.

The Celery id of the dispatch message waits for the try: its result, its chain and its chord go on when the task
instance ends, whatever executor ran it. The argument is a request, or ``{"sealed": <Fernet token of one>}`` from a
publisher that shares the sealing key and wants nothing readable on the broker.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from celery.exceptions import Ignore
from celery.states import STARTED
from celery.worker.request import Request as CeleryRequest
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from leoflow_celery.client import Client, Handle
from leoflow_celery.client.measuring import refusals_counted
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.request import check_celery_id
from leoflow_celery.domain.routing import DISPATCH_TASK
from leoflow_celery.errors import AtCapacity, BrokerUnavailable, InvalidRequest, Unavailable, Unsealable
from leoflow_celery.tasks.completion import saved_context, store_result
from leoflow_celery.tasks.context import LeoflowTask, leoflow_task
from leoflow_celery.tasks.settling import settle_try

log = logging.getLogger(__name__)


#: What events, logs and the retried message show of the arguments: a plain request holds env and headers.
_QUIET = {"argsrepr": "('<request>',)", "kwargsrepr": "{}"}


class QuietRequest(CeleryRequest):
    """A worker's view of a dispatch message that shows no argument, whoever sent it and whoever asks."""

    argsrepr = _QUIET["argsrepr"]
    kwargsrepr = _QUIET["kwargsrepr"]

    def info(self, safe: bool = False) -> Any:  # noqa: ARG002 - ``celery inspect`` asks for the unsafe one
        return {**super().info(safe=True), "args": self.argsrepr, "kwargs": self.kwargsrepr}

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.humaninfo()}>"


class DispatchTask(LeoflowTask):
    """The task behind ``leoflow.dispatch``."""

    abstract = True
    ignore_result = False
    #: The sender's errors: he hears them, and the log need not tell where in our code they were found.
    throws = (InvalidRequest, Unsealable)
    retry_kwargs: ClassVar[dict[str, Any]] = _QUIET
    Request = f"{__name__}:QuietRequest"


@leoflow_task(DISPATCH_TASK, DispatchTask, autoretry_for=(Unavailable, AtCapacity, RedisError, OperationalError))
def dispatch(self: DispatchTask, request: dict[str, Any]) -> None:
    """Record and send a request; the message's own id ends with the try.

    Raises:
        InvalidRequest: the message's result; nothing was recorded.
    """
    attempt = _submit(self, request).attempt
    _await(self, attempt)
    settle_try(self, attempt.task_instance_id, attempt.try_number)
    raise Ignore


def _submit(task: DispatchTask, request: Any) -> Handle:
    request = _opened(task, request)
    try:
        return Client(task.runtime.settings, task.app, task.runtime).submit(request)
    except BrokerUnavailable as error:
        log.warning("dispatch.send_delayed", extra={"celery_task_id": task.request.id, "error": str(error)})
        raise


def _await(task: DispatchTask, attempt: AttemptId) -> None:
    """Let the message's own id wait for the try; STARTED comes before anybody can complete it.

    Another delivery of the same message may have let it wait meanwhile, and STARTED was written over the result, by
    this one or by one that was killed before it came here: the result is written again.
    """
    completions, celery_id = task.runtime.store.completions, str(task.request.id)
    if not completions.is_registered(celery_id):
        try:
            task.update_state(state=STARTED, meta={"hostname": task.runtime.hostname})
        except Exception as error:  # noqa: BLE001 - a state for onlookers; the task goes on without it
            log.warning("started.not_marked", extra={"celery_task_id": celery_id, "error": repr(error)})
    context = saved_context(task.request, task.name)
    if not completions.register(celery_id, attempt.task_instance_id, attempt.try_number, context):
        view = task.runtime.store.attempts.get(attempt.task_instance_id, attempt.try_number)
        if view.is_terminal:
            store_result(task.app, task.runtime, view, celery_id)


def _opened(task: DispatchTask, request: Any) -> Any:
    """The request that a message carries; refused at once when its id could never be recorded as waiting for it."""
    with refusals_counted():
        check_celery_id(str(task.request.id))
        if isinstance(request, dict) and set(request) == {"sealed"}:
            return task.runtime.sealer.open(str(request["sealed"]))
    return request
