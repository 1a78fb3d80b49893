"""``leoflow.dispatch``: any publisher of the Celery protocol hands over a task instance as plain JSON.

The Celery id of the dispatch message waits for the try: its result, its chain and its chord go on when the task
instance ends, whatever executor ran it. The argument is a request, or ``{"sealed": <Fernet token of one>}`` from a
publisher that holds the key of scope ``dispatch`` and wants nothing readable on the broker.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from celery.app.task import Context
from celery.exceptions import Ignore
from celery.states import STARTED
from celery.worker.request import Request as CeleryRequest
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from leoflow_celery.client import Client, Handle
from leoflow_celery.client.client import refusals_counted
from leoflow_celery.domain.attempt import AttemptId, is_try_id
from leoflow_celery.domain.canvas import (
    SIGNATURE_FIELDS,
    check_context,
    check_headers,
    permitted_context,
)
from leoflow_celery.domain.request import TaskRequest, check_celery_id, parse_request
from leoflow_celery.domain.routing import DISPATCH_QUEUE, TaskName
from leoflow_celery.errors import AtCapacity, BrokerUnavailable, DecryptionFailed, InvalidRequest, Unavailable
from leoflow_celery.queueing.decoder import Kind
from leoflow_celery.security import Scope
from leoflow_celery.tasks.completion import CONTEXT_KEYS, advance_try, saved_context, store_result
from leoflow_celery.tasks.context import LeoflowTask, leoflow_task, our_app

log = logging.getLogger(__name__)


#: What events, logs and the retried message show of the arguments: a plain request holds env and headers.
_QUIET = {"argsrepr": "('<request>',)", "kwargsrepr": "{}"}


class GuardedBackend:
    """The result backend as Celery sees it around a dispatch message, whose id and signatures a stranger chose.

    Celery writes on its own: FAILURE for arguments that do not fit, RETRY, REVOKED for a message that expired; and a
    failure sends errbacks and writes to the ids of a chain. An id that waits for a try has its result from completion,
    so nothing is written about one here, and signatures that the door refuses are left out.
    """

    def __init__(self, task: DispatchTask, backend: Any) -> None:
        self._task, self._backend = task, backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def store_result(self, task_id: str, *args: Any, **kwargs: Any) -> Any:
        return self._backend.store_result(task_id, *args, **kwargs) if self._is_free(task_id) else None

    def mark_as_started(self, task_id: str, **meta: Any) -> Any:
        return self._backend.mark_as_started(task_id, **meta) if self._is_free(task_id) else None

    def mark_as_retry(self, task_id: str, *args: Any, **kwargs: Any) -> Any:
        return self._backend.mark_as_retry(task_id, *args, **kwargs) if self._is_free(task_id) else None

    def mark_as_done(self, task_id: str, *args: Any, **kwargs: Any) -> None:
        self._mark(self._backend.mark_as_done, task_id, *args, **kwargs)

    def mark_as_failure(self, task_id: str, *args: Any, **kwargs: Any) -> None:
        self._mark(self._backend.mark_as_failure, task_id, *args, **kwargs)

    def mark_as_revoked(self, task_id: str, *args: Any, **kwargs: Any) -> None:
        self._mark(self._backend.mark_as_revoked, task_id, *args, **kwargs)

    def _mark(self, mark: Any, task_id: str, *args: Any, request: Any = None, **kwargs: Any) -> None:
        if self._is_free(task_id):
            mark(task_id, *args, request=request and self._permitted(request), **kwargs)

    def _is_free(self, *celery_ids: str) -> bool:
        """Whether none of these ids waits for a try, or is a try's own. Nobody knows while SQL is away: then no."""
        try:
            is_free = not any(
                is_try_id(str(one)) for one in celery_ids
            ) and not self._task.services.store.completions.owners(celery_ids)
        except Unavailable as error:
            log.warning("dispatch.owner_unknown", extra={"celery_task_id": celery_ids[0], "error": str(error)})
            return False
        if not is_free:
            log.warning("dispatch.result_kept", extra={"celery_task_id": celery_ids[0]})
        return is_free

    def _permitted(self, request: Context) -> Context:
        """A message's context without signatures that may not be sent, or that name the id of a try."""
        context, refusals = permitted_context(_context(request))
        ids = check_context(context)
        if ids and not self._is_free(*ids):
            context |= dict.fromkeys(SIGNATURE_FIELDS)
        for refusal in refusals:
            log.warning("dispatch.refused", extra={"celery_task_id": request.id, "error": str(refusal)})
        return Context({**vars(request), **context})


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
    throws = (InvalidRequest, DecryptionFailed)
    #: Where the message says that it came from is its sender's word; it is sent again to the queue it belongs to.
    retry_kwargs: ClassVar[dict[str, Any]] = {**_QUIET, "queue": DISPATCH_QUEUE}
    Request = f"{__name__}:QuietRequest"

    @property  # type: ignore[misc]
    def backend(self) -> GuardedBackend:  # type: ignore[override]
        """What Celery itself writes results with; completion uses the app's."""
        return GuardedBackend(self, self.app.backend)


@leoflow_task(TaskName.DISPATCH, DispatchTask, autoretry_for=(Unavailable, AtCapacity, RedisError, OperationalError))
def dispatch(self: DispatchTask, *args: Any, **kwargs: Any) -> None:
    """Record and send a request, the one argument; the message's own id ends with the try.

    Raises:
        InvalidRequest: the message's result; nothing was recorded. Its errbacks, chain and chord hear it as well.
    """
    with refusals_counted():
        checked, waits = _checked(self, _argument(self, args, kwargs))
    attempt = _submit(self, checked).attempt
    _await(self, attempt, waits)
    advance_try(self, attempt.task_instance_id, attempt.try_number)
    raise Ignore


def _argument(task: DispatchTask, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 1 and not kwargs:
        return args[0]
    if not args and kwargs.keys() == {"request"}:
        return kwargs["request"]
    why = f"args: {TaskName.DISPATCH} takes one argument, the request, and got {len(args) + len(kwargs)}"
    task.keep_as_dead_letter(why, Kind.ARGUMENTS)
    raise InvalidRequest(why, "args")


def _submit(task: DispatchTask, request: TaskRequest) -> Handle:
    try:
        return Client(app=our_app(task.app)).submit(request)
    except BrokerUnavailable as error:
        log.warning("dispatch.send_delayed", extra={"celery_task_id": task.request.id, "error": str(error)})
        raise


def _checked(task: DispatchTask, request: Any) -> tuple[TaskRequest, bool]:
    """The request of a message that may be recorded, and whether its id waits for that try already.

    Raises:
        InvalidRequest: names the part of the message or the field of the request.
        DecryptionFailed: sealed with a key this process does not have.
    """
    check_celery_id(str(task.request.id))
    check_headers(task.request.headers or {})
    ids = check_context(_context(task.request))
    if isinstance(request, dict) and set(request) == {"sealed"}:
        request = task.services.keys.sealer(Scope.DISPATCH).open(str(request["sealed"]))
    parsed, completions = parse_request(request), task.services.store.completions
    waits = completions.waits(str(task.request.id), parsed.task_instance_id, parsed.try_number)
    # One that waits already was checked before; the next task of its chain may be registered by now.
    for celery_id in completions.owners(ids) if ids and not waits else ():
        raise InvalidRequest(f"{ids[celery_id]}: {celery_id!r} is the Celery id of another try", ids[celery_id])
    return parsed, waits


def _context(request: Context) -> dict[str, Any]:
    return {key: getattr(request, key, None) for key in (*CONTEXT_KEYS, "shadow", "origin", "reply_to")}


def _await(task: DispatchTask, attempt: AttemptId, waits: bool) -> None:
    """Let the message's own id wait for the try; STARTED comes before anybody can complete it.

    Another delivery of the same message may have let it wait meanwhile, and STARTED was written over the result, by
    this one or by one that was killed before it came here: the result is written again. So is that of another try that
    took the id at this very moment.

    Raises:
        InvalidRequest: the id belongs to another try since a moment ago.
    """
    completions, celery_id = task.services.store.completions, str(task.request.id)
    if not waits:
        try:
            meta = {"hostname": task.services.hostname}
            task.app.backend.store_result(celery_id, meta, STARTED, request=task.request)
        except Exception as error:  # noqa: BLE001 - a state for onlookers; the task goes on without it
            log.warning("started.not_marked", extra={"celery_task_id": celery_id, "error": repr(error)})
    try:
        context = saved_context(task.request, task.name)
        if completions.register(celery_id, attempt.task_instance_id, attempt.try_number, context):
            return
    except InvalidRequest:
        _write_again(task, celery_id)
        raise
    _write_again(task, celery_id)


def _write_again(task: DispatchTask, celery_id: str) -> None:
    for owner in task.services.store.completions.owners([celery_id]).values():
        view = task.services.store.attempts.get(*owner)
        if view.is_terminal:
            store_result(task.app, task.services, view, celery_id)
