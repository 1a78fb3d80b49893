"""The Celery application: configuration only, no task and no server but the broker.

``create_app("k8s")`` makes the app of a worker for that queue; without a queue it makes one that only sends (beat,
Flower, the client, the gateway). ``celery -A leoflow_celery.app flower`` finds ``app`` here.
"""

from __future__ import annotations

import threading
from typing import Any

from celery import Celery

from leoflow_celery.app import transport
from leoflow_celery.app.config import INCLUDE_OF_QUEUE, celery_config
from leoflow_celery.app.extras import steps_of
from leoflow_celery.app.flower import prepare_flower
from leoflow_celery.services import Services
from leoflow_celery.settings import Settings

__all__ = ["LeoflowCelery", "create_app"]


class LeoflowCelery(Celery):
    """A Celery app that knows the settings it was made with; tasks reach them, and its services, through it."""

    amqp_cls = "leoflow_celery.app.transport:AMQP"
    control_cls = "leoflow_celery.app.control:Control"
    settings: Settings
    #: What its workers are called without ``-n``.
    worker_name: str = ""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._services: Services | None = None
        self._services_lock = threading.Lock()

    @property
    def services(self) -> Services:
        """What this process needs to work: built on first use, and again after a fork or a close."""
        found = self._services
        if found is not None and not found.is_stale:
            return found
        with self._services_lock:
            if self._services is None or self._services.is_stale:
                self._services = Services(self.settings)
            return self._services

    def close_services(self) -> None:
        """Release them. Those of a parent process are not ours to close."""
        with self._services_lock:
            found, self._services = self._services, None
        if found is not None and not found.is_stale:
            found.close()

    def close(self) -> None:
        self.close_services()
        super().close()


def create_app(*queues: str, settings: Settings | None = None, worker_name: str = "") -> LeoflowCelery:
    """An app whose worker consumes ``queues`` (``-Q`` overrides that) and knows their tasks.

    A worker that ``-n`` gives no name is ``<worker_name>@<host>``; the first queue's name unless given.

    Raises:
        ConfigurationError: a setting is wrong.
    """
    settings = settings or Settings.load()
    transport.register()
    include = sorted({module for queue in queues for module in INCLUDE_OF_QUEUE[queue]})
    app = LeoflowCelery("leoflow_celery", include=include, set_as_current=bool(queues))
    app.settings = settings
    app.worker_name = worker_name or next(iter(queues), "")
    app.conf.update(celery_config(settings, queues))
    if queues:
        # Not task_queues: a worker must be able to send to queues that it does not consume.
        app.select_queues(list(queues))
        for blueprint, steps in steps_of(queues).items():
            app.steps[blueprint] |= steps
    return app


def __getattr__(name: str) -> LeoflowCelery:
    # Built on first use: importing a package must not read the environment.
    if name in ("app", "celery"):
        app = create_app()
        prepare_flower(app)
        globals()[name] = app
        return app
    raise AttributeError(name)
