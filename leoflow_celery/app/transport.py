"""How the app speaks to its broker: kombu's Redis transport with one client per channel, and no news of ourselves.

kombu 5.7.0 makes a new redis-py client for every message it publishes, takes or acknowledges. The connections behind
it are pooled, but a client fills a table of some hundred entries when it is made, which costs as much as the command
itself. A client is thread-safe, so each channel keeps one for as long as it keeps its pool. Drop the classes from
Channel to Pool when a kombu release does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kombu
from celery.app import amqp
from kombu.connection import ConnectionPool
from kombu.transport import redis

from leoflow_celery.domain.routing import is_monitored

__all__ = ["AMQP"]


class Channel(redis.Channel):
    """Keeps the client that its commands go through."""

    _pooled_client: Any = None

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        """The client given, or the channel's own."""
        if client is None:
            client = self._pooled_client
            if client is None or client.connection_pool is not self.pool:
                channel: Any = self
                client = self._pooled_client = channel._create_client()
        yield client


class Transport(redis.Transport):
    """Redis, with channels of ours."""

    Channel = Channel


class Connection(kombu.Connection):
    """A connection whose Redis transport is ours, whatever form its URL has."""

    def get_transport_cls(self) -> Any:
        found = super().get_transport_cls()
        return Transport if found is redis.Transport else found

    def Pool(self, limit: int | None = None, **_: Any) -> Pool:  # noqa: N802 - kombu's name for it
        return Pool(self, limit)


class Pool(ConnectionPool):
    """Copies of a connection, with its transport: kombu copies the URL and looks the transport up again."""

    def new(self) -> Any:
        copied: Any = super().new()
        copied.get_transport_cls = self.connection.get_transport_cls
        return copied


class AMQP(amqp.AMQP):
    """What the app makes its connections and messages with."""

    Connection = Connection

    def as_task_v2(self, task_id: str, name: str, *args: Any, **options: Any) -> Any:
        """A message, without the event ``task-sent`` when no monitor is to see the task."""
        message = super().as_task_v2(task_id, name, *args, **options)
        return message if is_monitored(name) else message._replace(sent_event=None)
