"""The Celery application: configuration only, no task and no server but the broker.

``create_app("k8s")`` makes the app of a worker for that queue; without a queue it makes one that only sends (beat,
Flower, the client, the gateway). ``celery -A leoflow_celery.app flower`` finds ``app`` here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Celery

from leoflow_celery.app import transport
from leoflow_celery.app.alive import touch_with_heartbeats
from leoflow_celery.app.config import INCLUDE_OF_QUEUE, celery_config
from leoflow_celery.app.logging import show_fields
from leoflow_celery.settings import Settings

__all__ = ["LeoflowCelery", "create_app"]


class LeoflowCelery(Celery):
    """A Celery app that knows the settings it was made with; tasks reach them through it."""

    amqp_cls = "leoflow_celery.app.consumer:AMQP"
    #: What a worker's messages come through, by name: it is of a layer above.
    door_cls = "leoflow_celery.queueing.dead_letters:Door"
    settings: Settings

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        #: Called when a worker has ended its tasks, before it leaves the broker.
        self.before_leaving: list[Callable[[], None]] = []


def create_app(*queues: str, settings: Settings | None = None) -> LeoflowCelery:
    """An app whose worker consumes ``queues`` (``-Q`` overrides that) and knows their tasks.

    Raises:
        ConfigurationError: a setting is wrong.
    """
    settings = settings or Settings.load()
    transport.register()
    include = sorted({module for queue in queues for module in INCLUDE_OF_QUEUE[queue]})
    app = LeoflowCelery("leoflow_celery", include=include, set_as_current=bool(queues))
    app.settings = settings
    app.conf.update(celery_config(settings, queues))
    if queues:
        # Not task_queues: a worker must be able to send to queues that it does not consume.
        app.select_queues(list(queues))
        touch_with_heartbeats(settings.health.file)
        show_fields()
    return app


def __getattr__(name: str) -> LeoflowCelery:
    # Built on first use: importing a package must not read the environment.
    if name in ("app", "celery"):
        app = create_app()
        globals()[name] = app
        return app
    raise AttributeError(name)
