"""Looking at one try: completed when it has ended, its next launch sent when that is due."""

from __future__ import annotations

import logging

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import NOT_LAUNCHED
from leoflow_celery.domain.routing import ExecutorType, TaskName
from leoflow_celery.domain.states import TaskState
from leoflow_celery.errors import BrokerUnavailable, DecryptionFailed
from leoflow_celery.queueing.dead_letters import DeadLetters, given_up_letter
from leoflow_celery.store.views import TaskInstanceView
from leoflow_celery.tasks.completion import Ended, complete_try
from leoflow_celery.tasks.context import LeoflowTask

log = logging.getLogger(__name__)


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


def _send_launch(task: LeoflowTask, view: TaskInstanceView) -> None:
    delay = view.send_after - view.read_at
    # Unless it was written before the database's clock was set back: a delay begins when the try was queued.
    if delay > 0 and view.queued_at <= view.read_at + 1:
        task.publisher.advance_try(view.task_instance_id, view.try_number, countdown_seconds=delay)
        return
    try:
        task.publisher.launch_again(view, task.services.store.relaunch_policy)
    except DecryptionFailed as error:
        # Whoever sends what was left unsent gives it up, see maintenance.
        log.warning("launch.unsealable", extra={"attempt": str(view.attempt), "error": str(error)})
        return
    task.services.store.submissions.mark_sent([view.attempt])
