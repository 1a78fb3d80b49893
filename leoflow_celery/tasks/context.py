"""From a running Celery task to the runtime of its process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from celery import Celery, Task, shared_task
from celery.app import app_or_default
from celery.exceptions import Reject
from celery.signals import worker_process_init, worker_ready, worker_shutdown

from leoflow_celery import metrics
from leoflow_celery.app import LeoflowCelery
from leoflow_celery.domain.routing import ExecutorType, TaskName, is_monitored
from leoflow_celery.errors import DecryptionFailed
from leoflow_celery.queueing.messages import EXECUTOR_OF, M, open_message
from leoflow_celery.queueing.publisher import Publisher
from leoflow_celery.runtime import Runtime
from leoflow_celery.settings import Settings
from leoflow_celery.tasks.monitoring import close_senders

log = logging.getLogger(__name__)
_lock = threading.Lock()
_runtimes: dict[int, Runtime] = {}


def runtime_of(app: Celery) -> Runtime:
    """The runtime of this process and app, built on first use and again after a fork."""
    key = id(app)
    found = _runtimes.get(key)
    if found is not None and not found.is_stale:
        return found
    with _lock:
        found = _runtimes.get(key)
        if found is None or found.is_stale:
            settings = app.settings if isinstance(app, LeoflowCelery) else Settings.load()
            found = _runtimes[key] = Runtime(settings)
    return found


def close_runtimes(**_: Any) -> None:
    """Release everything; connected to the worker's shutdown signal."""
    close_senders()
    with _lock:
        for runtime in _runtimes.values():
            if not runtime.is_stale:
                runtime.close()
        _runtimes.clear()


def serve_metrics(sender: Any = None, **_: Any) -> None:
    """Open the worker's Prometheus endpoint when LEOFLOW_METRICS_PORT names a port."""
    app = getattr(sender, "app", None)
    if isinstance(app, LeoflowCelery):
        metrics.configure(app.settings.metrics)
        if app.settings.metrics.port:
            metrics.serve(app.settings.metrics.port)


def configure_metrics(**_: Any) -> None:
    """In each process of a pool of processes, which are there before their worker is ready."""
    app = app_or_default()
    if isinstance(app, LeoflowCelery):
        metrics.configure(app.settings.metrics)


worker_shutdown.connect(close_runtimes)
worker_ready.connect(serve_metrics)
worker_process_init.connect(configure_metrics)


class LeoflowTask(Task[Any, Any]):
    """The base of our tasks: its runtime, and retries that wait for servers to come back.

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
    def runtime(self) -> Runtime:
        return runtime_of(self.app)

    @property
    def publisher(self) -> Publisher:
        """Sends our messages."""
        return Publisher(self.app, self.runtime)

    def opened(self, kind: type[M], sealed: str, scope: str) -> M:
        """The content of this task's message, sealed with the key of ``scope``.

        Raises:
            Reject: it cannot be opened; that was counted and logged.
        """
        try:
            return open_message(self.runtime.keys, scope, kind, sealed)
        except DecryptionFailed as error:
            raise self.refused(str(error)) from error

    def heard(self, kind: type[M], sealed: str, speaker: str) -> tuple[ExecutorType, M]:
        """What the launch workers of an executor say; ``speaker`` names the key that it is sealed with.

        Raises:
            Reject: no launch worker said it; that was counted and logged.
        """
        executor = EXECUTOR_OF.get(speaker)
        if executor is None:
            raise self.refused("no launch worker may say this")
        return executor, self.opened(kind, sealed, speaker)

    def refused(self, why: str) -> Reject:
        """The error to leave with when this task's message is believed by nobody."""
        metrics.record_refused(TaskName(self.name).queue, "not_believed")
        log.warning("message.refused", extra={"task": self.name, "celery_task_id": self.request.id, "why": why})
        return Reject(why, requeue=False)

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Celery's retry, which drops the message when the broker does not take the next one; ours goes back to it."""
        try:
            return super().retry(*args, **kwargs)
        except Reject as rejected:
            raise Reject(rejected.args[0], requeue=True) from rejected


def leoflow_task(name: str, base: type[LeoflowTask] = LeoflowTask, **options: Any) -> Callable[[Any], Any]:
    """``shared_task`` for a bound function of ours; ``autoretry_for`` and other options are Celery's."""
    options = {"send_events": is_monitored(name), **options}
    register: Callable[[Any], Any] = shared_task(name=name, bind=True, base=base, **options)
    return register
