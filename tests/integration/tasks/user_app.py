"""Somebody's own Celery application: it shares the broker with the system and imports nothing of it.

Its tasks write down each call in the Redis list ``user:calls``, as ``[name, task id, arguments]``.
"""

from __future__ import annotations

import json
import os
from typing import Any

import redis
from celery import Celery

URL = os.environ["LEOFLOW_BROKER_URL"]
app = Celery("user", broker=URL, backend=URL)
app.conf.update(
    broker_transport_options={"global_keyprefix": "leoflow:"},
    result_backend_transport_options={"global_keyprefix": "leoflow:"},
    task_default_queue="user",
    worker_pool="threads",
    worker_concurrency=2,
    broker_connection_retry_on_startup=True,
)


def write_down(task: Any, *arguments: Any) -> None:
    with redis.Redis.from_url(URL) as client:
        client.rpush("user:calls", json.dumps([task.name, task.request.id, arguments], default=str))


@app.task(name="user.call_of", bind=True)
def call_of(self: Any, answer: dict[str, Any]) -> int:
    """Which call of its name the answer came from."""
    write_down(self, answer)
    return int(answer["call"])


@app.task(name="user.add", bind=True)
def add(self: Any, number: int, more: int) -> int:
    write_down(self, number, more)
    return number + more


@app.task(name="user.collect", bind=True)
def collect(self: Any, values: list[Any]) -> list[Any]:
    """The body of a chord."""
    write_down(self, values)
    return sorted(value["path"] for value in values)


@app.task(name="user.note", bind=True)
def note(self: Any, *arguments: Any) -> None:
    """A result callback, or an errback."""
    write_down(self, *arguments)
