"""From a running Celery task to the services of its app."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Celery, Task, shared_task
from celery.exceptions import Ignore, Reject

from leoflow_celery.app import LeoflowCelery
from leoflow_celery.app.extras import record_expired
from leoflow_celery.clock import due_in
from leoflow_celery.domain.routing import ExecutorType, TaskName, is_monitored
from leoflow_celery.errors import ConfigurationError, DecryptionFailed, MessageExpired
from leoflow_celery.queueing.dead_letters import DeadLetters, envelope_of, keep_refused
from leoflow_celery.queueing.decoder import Kind
from leoflow_celery.queueing.holding import NOT_ITS_FAULT
from leoflow_celery.queueing.messages import EXECUTOR_OF, M, open_message
from leoflow_celery.queueing.publisher import Publisher
from leoflow_celery.services import Services


def our_app(app: Celery) -> LeoflowCelery:
    """The app that a task of ours runs in.

    Raises:
        ConfigurationError: it is somebody else's, which has no settings and no services.
    """
    if not isinstance(app, LeoflowCelery):
        raise ConfigurationError(
            f"the Celery app {app.main!r} runs a task of leoflow_celery and has no settings for it; "
            "make the app of that worker with leoflow_celery.app.create_app"
        )
    return app


def services_of(app: Celery) -> Services:
    """The services of the app that a task of ours runs in.

    Raises:
        ConfigurationError: it is somebody else's.
    """
    return our_app(app).services


class LeoflowTask(Task[Any, Any]):
    """The base of our tasks: its services, and retries that wait for servers to come back.

    A server that is away is no reason to lose a message: the task is sent again, for ever, with growing, jittered
    delays.
    """

    abstract = True
    acks_late = True
    ignore_result = True
    max_retries = None
    retry_backoff = 1
    retry_backoff_max = 60
    retry_jitter = True

    @property
    def services(self) -> Services:
        return services_of(self.app)

    @property
    def publisher(self) -> Publisher:
        """Sends our messages."""
        return Publisher(self.app, self.services)

    def opened(self, kind: type[M], sealed: str, scope: str) -> M:
        """The content of this task's message, sealed with the key of ``scope``.

        Raises:
            Ignore: it cannot be opened, and is a dead letter now; or it has expired.
        """
        try:
            return open_message(self.services.keys, scope, kind, sealed)
        except DecryptionFailed as error:
            raise self.refused(str(error)) from error
        except MessageExpired as error:
            record_expired(self._queue, self.name, str(self.request.id))
            raise Ignore(str(error)) from error

    @property
    def _queue(self) -> str:
        """Where this task's message was."""
        return str((self.request.delivery_info or {}).get("routing_key") or TaskName(self.name).queue)

    def heard(self, kind: type[M], sealed: str, speaker: str) -> tuple[ExecutorType, M]:
        """What the launch workers of an executor say; ``speaker`` names the key that it is sealed with.

        Raises:
            Ignore: no launch worker said it; that is a dead letter now.
        """
        executor = EXECUTOR_OF.get(speaker) if isinstance(speaker, str) else None
        if executor is None:
            raise self.refused("no launch worker may say this")
        return executor, self.opened(kind, sealed, speaker)

    def refused(self, why: str) -> Ignore:
        """The exception to leave with when this task's message is believed by nobody: a dead letter, and no result.

        Not ``Reject``, which takes the message from the broker as well: Celery logs a traceback of it, and whoever
        sends such messages chooses how many.
        """
        self.keep_as_dead_letter(why, Kind.NOT_BELIEVED)
        return Ignore(why)

    def keep_as_dead_letter(self, why: str, kind: Kind) -> None:
        """Keep this task's message, count and log it."""
        queue = self._queue
        letters = DeadLetters(self.services.settings, self.services.queues.client)
        raw = envelope_of(self.name, queue, self.request)
        keep_refused(letters, queue, why, self.name, kind=kind, raw=raw, celery_id=str(self.request.id))

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Celery's retry, which drops the message when the broker does not take the next one; ours goes back to it.

        When it is due goes by the broker's clock; the door of the worker that takes it knows (see ``decoder``).
        """
        if kwargs.get("eta") is None:
            countdown = kwargs.pop("countdown", None)
            kwargs["eta"] = due_in(self.default_retry_delay if countdown is None else countdown)
        try:
            return super().retry(*args, **kwargs)
        except Reject as rejected:
            raise Reject(rejected.args[0], requeue=NOT_ITS_FAULT) from rejected


def leoflow_task(name: str, base: type[LeoflowTask] = LeoflowTask, **options: Any) -> Callable[[Any], Any]:
    """``shared_task`` for a bound function of ours; ``autoretry_for`` and other options are Celery's."""
    options = {"send_events": is_monitored(name), **options}
    register: Callable[[Any], Any] = shared_task(name=name, bind=True, base=base, **options)
    return register
