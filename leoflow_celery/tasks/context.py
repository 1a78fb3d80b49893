"""What a running Celery task stands on: its app's services, its process's executor, the lease of a maintenance task.

What an executor reports goes to the control plane, what it notices to the metrics. Of the tasks that beat sends, one
worker at a time does each, whoever sent it how often.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from celery import Celery, Task, shared_task
from celery.exceptions import Ignore, Reject

from leoflow_celery import metrics
from leoflow_celery.app import LeoflowCelery
from leoflow_celery.app.extras import record_expired
from leoflow_celery.background import RenewedLease
from leoflow_celery.clock import due_in
from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.routing import RECONCILED, ExecutorType, TaskName, is_monitored
from leoflow_celery.errors import ConfigurationError, DecryptionFailed, LeaseLost, LeoflowError, MessageExpired
from leoflow_celery.executors.base import Executor, FailureReporter, Observer
from leoflow_celery.queueing.dead_letters import DeadLetters, envelope_of, keep_refused
from leoflow_celery.queueing.decoder import Kind
from leoflow_celery.queueing.holding import NOT_ITS_FAULT
from leoflow_celery.queueing.messages import EXECUTOR_OF, AttemptEnded, M, open_message
from leoflow_celery.queueing.publisher import Publisher
from leoflow_celery.services import Services

log = logging.getLogger(__name__)


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


class ClusterMetrics(Observer):
    """What is noticed of the Kubernetes API; of other servers there is no metric."""

    def api_call(self, operation: str, result: str) -> None:
        metrics.record_kubernetes_call(operation, result)

    def pending(self, seconds: float) -> None:
        metrics.record_pod_pending(seconds)

    def running(self, count: int) -> None:
        metrics.set_pods_running(count)


def executor_of(app: Celery, executor_type: ExecutorType) -> Executor:
    """The one executor of a type in this process.

    Raises:
        ConfigurationError: this version has no such back end, or what it needs is not installed.
    """
    observer = ClusterMetrics if executor_type is ExecutorType.KUBERNETES else Observer
    return services_of(app).executor(executor_type, lambda: reporter(app, executor_type), observer)


def host_of(app: Celery, executor_type: ExecutorType) -> str:
    """The host whose back end this process holds; empty where an executor has one back end, or nobody knows yet."""
    if executor_type not in RECONCILED:
        return ""
    try:
        return str(getattr(executor_of(app, executor_type), "host", ""))
    except LeoflowError:
        return ""


def reporter(app: Celery, executor_type: ExecutorType) -> FailureReporter:
    """The FailureReporter of an executor: safe to call from any thread, any number of times."""

    def report(attempt: AttemptId, outcome: Outcome, return_value: str | None = None) -> None:
        ended = AttemptEnded(attempt, outcome, return_value=return_value, host=host_of(app, executor_type))
        Publisher(app, services_of(app)).attempt_ended(executor_type, ended)

    return report


#: A worker that died in one of these tasks is replaced after it. A living one renews its lease.
_LEASE_SECONDS = 10

Body = Callable[[LeoflowTask, RenewedLease], int]


def maintenance_task(task: TaskName) -> Callable[[Body], Any]:
    """Register a body as a task of beat's, run by one worker at a time; it returns what it did.

    The body asks its lease again and again whether it may go on.
    """
    name = task.rpartition(".")[2]

    def register(body: Body) -> Any:
        @wraps(body)
        def single_flight(self: LeoflowTask) -> None:
            with self.services.store.leases.single_flight(f"maintenance.{name}", _LEASE_SECONDS) as lease:
                if not lease:
                    return
                try:
                    count = body(self, lease)
                except LeaseLost as error:
                    log.warning("maintenance.stopped", extra={"task": name, "error": str(error)})
                    return
                if count:
                    log.info("maintenance.acted", extra={"task": name, "count": count})

        return leoflow_task(task)(single_flight)

    return register
