"""Celery's configuration, each value with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leoflow_celery.broker_url import redis_address
from leoflow_celery.domain.routing import (
    DISPATCH_QUEUE,
    MAINTENANCE_QUEUE,
    QUEUE_OF,
    RESULTS_QUEUE,
    USER_QUEUE,
    ExecutorType,
    held_key,
    queue_for_task,
)
from leoflow_celery.settings import Settings

_BACK_END = tuple(f"leoflow_celery.tasks.{name}" for name in ("launch", "reconcile"))
#: Which modules hold the tasks of a queue. Workers of launch queues never import SQL.
INCLUDE_OF_QUEUE: dict[str, tuple[str, ...]] = {
    QUEUE_OF[ExecutorType.KUBERNETES]: _BACK_END,
    QUEUE_OF[ExecutorType.DOCKER]: _BACK_END,
    QUEUE_OF[ExecutorType.SUBPROCESS]: ("leoflow_celery.tasks.launch",),
    QUEUE_OF[ExecutorType.INLINE]: ("leoflow_celery.tasks.inline",),
    DISPATCH_QUEUE: ("leoflow_celery.tasks.dispatch",),
    RESULTS_QUEUE: ("leoflow_celery.tasks.results",),
    MAINTENANCE_QUEUE: tuple(f"leoflow_celery.tasks.{name}" for name in ("maintenance", "reconcile_requests")),
}
#: Threads of a worker unless -c says otherwise. A launch waits for a server, an inline task for somebody else's.
_CONCURRENCY = {QUEUE_OF[ExecutorType.INLINE]: 16, RESULTS_QUEUE: 4, MAINTENANCE_QUEUE: 4, DISPATCH_QUEUE: 4}
_DEFAULT_CONCURRENCY = 8
#: Messages that a worker of pods may hold, per thread: one that is launched, and one whose launch is being reported. Of
#: other launches, which may pull an image for minutes, a message that waits is better off with another worker.
_POD_PREFETCH = 2


def route_task(name: str, *_: object, **__: object) -> dict[str, str]:
    """The Router as Celery routing: our tasks have their queues; a user's that names none goes to none of ours."""
    return {"queue": queue_for_task(name) or USER_QUEUE}


def held_keys(queues: Sequence[str]) -> dict[str, str]:
    """Options of kombu's transport: where a worker of these queues holds its messages."""
    held = held_key(*queues)
    return {"unacked_key": held, "unacked_index_key": f"{held}_index", "unacked_mutex_key": f"{held}_mutex"}


def celery_config(settings: Settings, queues: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration of an app that consumes ``queues`` (none: it only sends).

    Raises:
        ConfigurationError: a file that a URL of the broker names cannot be read.
    """
    broker = settings.broker
    address = redis_address(broker.url)
    results = redis_address(broker.result_url, "LEOFLOW_BROKER_RESULT_URL") if broker.result_url else address
    concurrency = max((_CONCURRENCY.get(queue, _DEFAULT_CONCURRENCY) for queue in queues), default=1)
    return {
        "broker_url": address.url,
        "broker_use_ssl": address.tls or None,
        "result_backend": results.url,
        "redis_backend_use_ssl": results.tls or None,
        "broker_transport_options": {
            "visibility_timeout": broker.visibility_timeout_seconds,
            # Look for messages of dead workers every few seconds, not every hundred.
            "unacked_restore_interval": 3,
            "unacked_restore_throttle": 1,
            **held_keys(queues),
            "global_keyprefix": broker.key_prefix,
            "socket_connect_timeout": broker.connect_timeout_seconds,
            "socket_timeout": broker.socket_timeout_seconds,
            "queue_order_strategy": "round_robin",
        },
        "result_backend_transport_options": {
            "global_keyprefix": broker.key_prefix,
            # Who only asks for results waits by himself, to a timeout of his own; Celery's twenty tries take longer.
            **({} if queues else {"retry_policy": {"max_retries": 1, "interval_start": 0, "interval_step": 0.2}}),
        },
        "redis_socket_connect_timeout": broker.connect_timeout_seconds,
        "redis_socket_timeout": broker.socket_timeout_seconds,
        "result_expires": broker.result_expires_seconds,
        # The client writes its own retry of a failed publish; the default policy hides a dead broker for seconds.
        "task_publish_retry_policy": {"max_retries": 1, "interval_start": 0, "interval_step": 0.2},
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # A Redis that fails over, loads or is full says so by the error of a command: wait and go on.
        "broker_channel_error_retry": True,
        "broker_pool_limit": max(10, concurrency + 2),
        # JSON only: a message must never be able to run code by being read.
        "task_serializer": "json",
        "result_serializer": "json",
        "event_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "task_routes": (route_task,),
        "task_default_queue": DISPATCH_QUEUE,
        # The claim makes a second delivery harmless, so a message is kept until its work is done.
        "task_acks_late": True,
        # A child of ``-P processes`` that is killed is not its message's fault, until it was several times.
        "task_reject_on_worker_lost": True,
        "worker_prefetch_multiplier": _POD_PREFETCH if set(queues) == {QUEUE_OF[ExecutorType.KUBERNETES]} else 1,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_consumer": "leoflow_celery.app.consumer:Consumer",
        "worker_pool": "threads",
        "worker_concurrency": concurrency,
        "worker_send_task_events": True,
        "task_send_sent_event": True,
        "worker_hijack_root_logger": True,
        "worker_redirect_stdouts": False,
        "beat_max_loop_interval": 5,
        "timezone": "UTC",
        "enable_utc": True,
    }
