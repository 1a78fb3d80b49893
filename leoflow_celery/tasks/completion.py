"""Completing Celery ids: the result of a try reaches everybody who waits for it.

A try that ended has rows in ``task_completion``; each is completed as if the Celery task had just returned: the
result is stored, a chord advances, callbacks, errbacks and the rest of a chain go out, and the monitor sees the end.
All of it is repeatable: messages carry ids derived from the completed one, so a crash in between repeats no work that
looks at ids, and the row is marked done only afterwards. Callbacks are sent at least once, always under the same id.

``advance_try`` looks at one try: it completes it when it has ended, and sends its next launch when that is due.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from celery import Celery
from celery.app.task import Context
from celery.canvas import Signature
from celery.states import FAILURE, SUCCESS
from kombu.exceptions import OperationalError
from redis import exceptions as redis_errors

from leoflow_celery import metrics
from leoflow_celery.background import Periodic
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.canvas import permitted_context
from leoflow_celery.domain.outcome import FinalEvent, Outcome
from leoflow_celery.domain.reasons import NOT_LAUNCHED
from leoflow_celery.domain.routing import ExecutorType, TaskName, callback_problems
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import BrokerUnavailable, DecryptionFailed, Unavailable, XComRejected
from leoflow_celery.queueing.dead_letters import DeadLetters, given_up_letter
from leoflow_celery.services import Services
from leoflow_celery.store.completions import GROUP, Waiting
from leoflow_celery.store.views import TaskInstanceView, failure_of, unreadable
from leoflow_celery.tasks.context import LeoflowTask
from leoflow_celery.tasks.monitoring import send_failed, send_succeeded

log = logging.getLogger(__name__)
#: A completion takes milliseconds; a worker that died in a group of them is replaced after this.
LEASE_SECONDS = 10
#: As many callbacks at most are sent again, under the same ids, after a worker that was killed.
_MARKED_TOGETHER = 5
#: What was told is marked so much later, far within the lease.
_MARK_SECONDS = 0.2
#: The parts of a context by which messages are sent.
_SUCCESSORS = ("callbacks", "errbacks", "chain", "chord")
#: What one completion meets as well as the next one.
_AWAY = (
    *(Unavailable, OperationalError, OSError),
    *(redis_errors.ConnectionError, redis_errors.TimeoutError),
    *(redis_errors.ReadOnlyError, redis_errors.OutOfMemoryError),
)
#: The parts of a task's request that completion needs.
CONTEXT_KEYS = ("root_id", "parent_id", "group", "group_index", "chord", "callbacks", "errbacks", "chain")


def saved_context(request: Any, name: str) -> dict[str, Any]:
    """What completion will need of a running task's request, as plain JSON."""
    context = {key: getattr(request, key, None) for key in CONTEXT_KEYS}
    return {"task": name, **json.loads(json.dumps({key: value for key, value in context.items() if value is not None}))}


@dataclass(frozen=True, slots=True)
class Ended:
    """A try that has ended, and its return value; ``monitored``: its worker tells the monitor by itself.

    ``waiting`` are its completions, where they were leased with the end.
    """

    view: TaskInstanceView
    value: Any = None
    monitored: bool = False
    waiting: tuple[Waiting, ...] | None = None


def complete_due(app: Celery, services: Services) -> int:
    """Complete a group of what is due; the number of Celery ids completed."""
    taken_at, waiting = time.monotonic(), services.store.completions.take(LEASE_SECONDS)
    tries = {AttemptId(item.task_instance_id, item.try_number) for item in waiting}
    views = {(view.task_instance_id, view.try_number): view for view in services.store.attempts.ended(tries)}
    read = cache(lambda task_instance_id, try_number: _with_value(services, views[task_instance_id, try_number]))
    return _complete(app, services, waiting, taken_at, lambda item: read(item.task_instance_id, item.try_number))


def complete_try(app: Celery, services: Services, view: TaskInstanceView, ended: Ended | None = None) -> int:
    """Complete whoever waits for one try; ``ended`` spares reading what the caller knows. How many that were."""
    taken_at, count = time.monotonic(), 0
    taken: Sequence[Waiting] | None = ended.waiting if ended else None
    read = cache(lambda: ended or _with_value(services, view))
    while True:
        if taken is None:
            taken_at = time.monotonic()
            taken = services.store.completions.take(LEASE_SECONDS, view.task_instance_id, view.try_number)
        count += _complete(app, services, taken, taken_at, lambda _: read())
        if len(taken) < GROUP:
            return count
        taken = None


def _complete(
    app: Celery,
    services: Services,
    waiting: Sequence[Waiting],
    taken_at: float,
    ended: Callable[[Waiting], Ended],
) -> int:
    """Complete what was taken under one lease, marking it done in small groups: those are told again after a crash.

    What has no more to tell than its result is marked a moment later, together with others.
    """
    completions, count = services.store.completions, 0
    marks = services.part(DoneMarks, lambda: DoneMarks(completions.done))
    done: list[Waiting] = []
    try:
        for item in waiting:
            if time.monotonic() - taken_at > LEASE_SECONDS:
                log.warning("completion.lease_over", extra={"left": len(waiting) - count, "of": len(waiting)})
                break  # another worker goes on with them
            if _completed(app, services, item, ended):
                count += 1
                if _sends_more(item):
                    done.append(item)
                else:
                    marks.put(item)
            if len(done) >= _MARKED_TOGETHER:
                marking, done = done, []
                completions.done(marking)
    finally:
        completions.done(done)
    return count


def _sends_more(item: Waiting) -> bool:
    """Whether completing it sent messages, or may have: those are not to be sent again without need."""
    return bool(item.result_callback) or any(item.context.get(name) for name in _SUCCESSORS)


class DoneMarks:
    """Marks done what has its result, in groups, from a thread of its own.

    A worker that dies before loses marks: another one writes the same results again, when the lease has run out. Only
    for what sends nothing but its result.
    """

    def __init__(self, mark: Callable[[Sequence[Waiting]], None]) -> None:
        self._mark = mark
        self._told: deque[Waiting] = deque()
        self._turns = Periodic(
            self.flush, _MARK_SECONDS, name="leoflow-done", failed="completion.not_marked", at_once=False
        )

    def put(self, told: Waiting) -> None:
        """It has its result."""
        self._told.append(told)
        self._turns.start()

    def flush(self) -> None:
        """Mark what was told until now; what cannot be marked is tried again.

        Raises:
            Whatever the store raises.
        """
        told = [self._told.popleft() for _ in range(len(self._told))]
        try:
            if told:
                self._mark(told)
        except Exception:
            self._told.extendleft(reversed(told))
            raise

    def close(self) -> None:
        """Mark what is left."""
        self._turns.stop(wait_seconds=None)
        self._turns.turn()


def _completed(app: Celery, services: Services, item: Waiting, ended: Callable[[Waiting], Ended]) -> bool:
    try:
        complete(app, item, ended(item))
    except Exception as error:
        if _is_away(error):
            raise
        # One that cannot be completed (a callback that is no signature, say) must not keep the others waiting.
        delay = services.store.completions.failed(item)
        log.exception("completion.failed", extra={"celery_task_id": item.celery_task_id, "again_in_seconds": delay})
        return False
    return True


def _is_away(error: Exception) -> bool:
    """Whether a server is away, for whatever comes next as well; another error is this completion's own."""
    # kombu calls everything so, also what Redis says to one message or key.
    cause = error.__cause__ if isinstance(error, OperationalError) and error.__cause__ else error
    return isinstance(cause, _AWAY)


def _with_value(services: Services, view: TaskInstanceView) -> Ended:
    """A try that has ended, with its value. One that nobody can read is told as a failure: who waits must hear it."""
    if view.state is not TaskState.SUCCESS:
        return Ended(view)
    try:
        return Ended(view, services.store.return_value(view))
    except XComRejected as error:
        log.warning("completion.unreadable_value", extra={"attempt": str(view.attempt), "error": str(error)})
        return Ended(unreadable(view, error))


def complete(app: Celery, item: Waiting, ended: Ended) -> None:
    """Give one Celery id the result of its try."""
    item, view, value = _permitted(item), ended.view, ended.value
    context = Context({**item.context, **_own_context(item)})
    if view.state in (TaskState.SUCCESS, TaskState.SKIPPED):
        app.backend.mark_as_done(item.celery_task_id, value, request=context)
        _send_successors(app, item, value)
        if not (ended.monitored and item.celery_task_id == view.celery_task_id):
            send_succeeded(app, view, item.celery_task_id, value)
    else:
        error = failure_of(view)
        app.backend.mark_as_failure(item.celery_task_id, error, traceback=None, request=context)
        send_failed(app, view, item.celery_task_id, error)
    if item.result_callback:
        _send_result_callback(app, item, view)
    if item.celery_task_id == view.celery_task_id:
        _measure(view)


def _permitted(item: Waiting) -> Waiting:
    """Without what may not be sent, which an older version may have recorded: its result is stored all the same."""
    context, refusals = permitted_context(item.context)
    callback = item.result_callback
    problems = callback_problems(callback.get("task", ""), callback.get("queue")) if callback else {}
    for problem in (*map(str, refusals), *(f"{field}: {text}" for field, text in problems.items())):
        log.warning("completion.refused", extra={"celery_task_id": item.celery_task_id, "error": problem})
    return replace(item, context=context, result_callback=None if problems else callback)


def _measure(view: TaskInstanceView) -> None:
    metrics.record_transition(TaskState.RUNNING if view.started_at else TaskState.QUEUED, view.state, view.dag_id)
    if view.started_at and view.ended_at:
        metrics.record_duration(view.dag_id, view.task_id, view.operator, view.ended_at - view.started_at)
    if view.state is TaskState.FAILED:
        metrics.record_failure(str(view.reason))
    if view.try_number > 1:
        metrics.record_retry(view.dag_id, view.task_id)


def _own_context(item: Waiting) -> dict[str, Any]:
    errbacks = [_identified(item, errback, n) for n, errback in enumerate(item.context.get("errbacks") or [])]
    chain = list(item.context.get("chain") or [])
    # Celery reads delivery_info on its way to errbacks and takes it for a dict.
    return {"id": item.celery_task_id, "chain": chain, "errbacks": errbacks, "delivery_info": {}}


def _identified(item: Waiting, errback: Any, index: int) -> Any:
    """An errback with the id that Celery will send it under."""
    if not isinstance(errback, dict):
        return errback  # no signature: Celery says so
    task_id = _derived_id(item.celery_task_id, "link_error", index)
    return {**errback, "options": {"task_id": task_id, **(errback.get("options") or {})}}


def store_result(app: Celery, services: Services, view: TaskInstanceView, celery_task_id: str = "") -> None:
    """Write only the result of one Celery id, of the try's own unless another is named: no callback, no event."""
    ended, celery_task_id = _with_value(services, view), celery_task_id or view.celery_task_id
    if ended.view.state in (TaskState.SUCCESS, TaskState.SKIPPED):
        app.backend.store_result(celery_task_id, ended.value, SUCCESS)
    else:
        app.backend.store_result(celery_task_id, failure_of(ended.view), FAILURE)


def _send_successors(app: Celery, item: Waiting, value: Any) -> None:
    context = item.context
    family: dict[str, Any] = {
        "parent_id": item.celery_task_id,
        "root_id": context.get("root_id") or item.celery_task_id,
    }
    for index, callback in enumerate(context.get("callbacks") or []):
        signature = Signature.from_dict(callback, app=app)
        task_id = signature.options.get("task_id") or _derived_id(item.celery_task_id, "link", index)
        signature.apply_async((value,), task_id=task_id, **family)
    chain = list(context.get("chain") or [])
    if chain:
        signature = Signature.from_dict(chain.pop(), app=app)
        task_id = signature.options.get("task_id") or _derived_id(item.celery_task_id, "chain", len(chain))
        signature.apply_async((value,), task_id=task_id, chain=chain, **family)


def _send_result_callback(app: Celery, item: Waiting, view: TaskInstanceView) -> None:
    callback = item.result_callback or {}
    event = FinalEvent(
        view.attempt,
        view.tenant_id,
        view.dag_id,
        view.run_id,
        view.task_id,
        view.outcome,
        item.celery_task_id,
        view.hostname,
        view.started_at,
        view.ended_at,
    )
    options = {"queue": callback["queue"]} if callback.get("queue") else {}
    task_id = _derived_id(item.celery_task_id, "result_callback", 0)
    app.send_task(callback["task"], args=[event.to_json()], task_id=task_id, **options)


def _derived_id(celery_task_id: str, kind: str, index: int) -> str:
    return str(uuid.uuid5(uuid.UUID(int=0), f"{celery_task_id}/{kind}/{index}"))


def keep_given_up(task: LeoflowTask, view: TaskInstanceView, outcome: Outcome) -> None:
    """A dead letter for a try that ended without having been launched, which an operator can send again."""
    if outcome.reason not in NOT_LAUNCHED:
        return
    name, cause = TaskName.of("execute", ExecutorType(view.executor)), f"{outcome.reason}: {outcome.message}"
    letter = given_up_letter(view.attempt, view.queue, name, view.celery_task_id, cause)
    try:
        DeadLetters(task.services.settings, task.services.queues.client).keep(letter)
    except BrokerUnavailable as error:  # the try says what became of it
        log.warning("dead_letter.not_kept", extra={"attempt": str(view.attempt), "error": str(error)})


def advance_try(task: LeoflowTask, task_instance_id: str, try_number: int) -> None:
    """Do for a try what its state asks for now; safe to do any number of times."""
    advance_view(task, task.services.store.attempts.get(task_instance_id, try_number))


def advance_view(task: LeoflowTask, view: TaskInstanceView, ended: Ended | None = None) -> None:
    """The same for a try that was just read; ``ended`` spares reading its value again."""
    if view.is_terminal:
        complete_try(task.app, task.services, view, ended)
    elif view.state is TaskState.QUEUED and view.sent_at is None and not view.needs_host:
        _send_launch(task, view)


#: A launch that is due later than that waits in SQL alone.
_SWEPT_SECONDS = 60.0


def _send_launch(task: LeoflowTask, view: TaskInstanceView) -> None:
    delay = view.send_after - view.read_at
    # Unless it was written before the database's clock was set back: a delay begins when the try was queued.
    if delay > 0 and view.queued_at <= view.read_at + 1:
        if delay > _SWEPT_SECONDS:
            return  # the sweep of what was not sent finds it in its time; a message would wait in a worker meanwhile
        task.publisher.advance_try(view.task_instance_id, view.try_number, countdown_seconds=delay)
        return
    try:
        task.publisher.launch_again(view, task.services.store.relaunch_policy)
    except DecryptionFailed as error:
        # Whoever sends what was left unsent gives it up, see maintenance.
        log.warning("launch.unsealable", extra={"attempt": str(view.attempt), "error": str(error)})
        return
    task.services.store.submissions.mark_sent([view.attempt])
