"""The Celery application: configuration only, no task and no server but the broker.

``create_app("k8s")`` makes the app of a worker for that queue; without a queue it makes one that only sends (beat,
Flower, the client, the gateway). ``celery -A leoflow_celery.app flower`` finds ``app`` here.
"""

from __future__ import annotations

import threading
from typing import Any

import celery
import kombu
from celery import Celery

from leoflow_celery.app.config import INCLUDE_OF_QUEUE, celery_config
from leoflow_celery.errors import ConfigurationError
from leoflow_celery.services import Services
from leoflow_celery.settings import Settings

__all__ = ["LeoflowCelery", "create_app"]

#: What ``transport`` and the parts of a worker are written for. An app that only sends works with others as well.
_WORKER_VERSION = "5.7."


class LeoflowCelery(Celery):
    """A Celery app that knows the settings it was made with; tasks reach them, and its services, through it."""

    amqp_cls = "leoflow_celery.app.transport:AMQP"
    control_cls = "leoflow_celery.app.control:Control"
    settings: Settings

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


def create_app(*queues: str, settings: Settings | None = None) -> LeoflowCelery:
    """An app whose worker consumes ``queues`` (``-Q`` overrides that) and knows their tasks.

    Raises:
        ConfigurationError: a setting is wrong.
    """
    settings = settings or Settings.load()
    amqp = _prepare_transport(queues)
    include = sorted({module for queue in queues for module in INCLUDE_OF_QUEUE[queue]})
    app = LeoflowCelery("leoflow_celery", include=include, set_as_current=bool(queues), amqp=amqp)
    app.settings = settings
    app.conf.update(celery_config(settings, queues))
    if queues:
        from leoflow_celery.app.extras import steps_of

        # Not task_queues: a worker must be able to send to queues that it does not consume.
        app.select_queues(list(queues))
        app.loader.override_backends = dict.fromkeys(("redis", "rediss"), "leoflow_celery.app.consumer:ResultBackend")
        for blueprint, steps in steps_of(queues).items():
            app.steps[blueprint] |= steps
    return app


def _prepare_transport(queues: tuple[str, ...]) -> str | None:
    """Make this process speak to Redis as our workers do; the class of ``app.amqp``, None for ours.

    With another Celery the process sends as that does: whoever shares the environment with it keeps what it expects.
    """
    versions = {"celery": celery.__version__, "kombu": kombu.__version__}  # type: ignore[attr-defined]
    if all(version.startswith(_WORKER_VERSION) for version in versions.values()):
        from leoflow_celery.app import transport

        transport.register()
        return None
    if queues:
        found = ", ".join(f"{name} {version}" for name, version in versions.items())
        raise ConfigurationError(
            f"a worker needs celery 5.7 and kombu 5.7, and this environment has {found}; "
            "pip install 'leoflow-celery[worker]' in an environment of its own"
        )
    return "celery.app.amqp:AMQP"


def __getattr__(name: str) -> LeoflowCelery:
    # Built on first use: importing a package must not read the environment.
    if name in ("app", "celery"):
        app = create_app()
        globals()[name] = app
        return app
    raise AttributeError(name)
