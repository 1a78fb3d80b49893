"""What we change inside kombu 5.7.0, all of it in this file; ``setup.cfg`` bounds the version.

Each change says why, and a test of kombu's own behaviour in ``tests/unit/app/test_kombu_inside.py`` fails when a
release makes it needless:

- A client per channel. kombu makes a new redis-py client for every message it publishes, takes or acknowledges. The
  connections behind it are pooled, but a client fills a table of some hundred entries when it is made, which costs as
  much as the command itself. A client is thread-safe, so each channel keeps one for as long as it keeps its pool.
- A door. kombu parses what it takes from a queue, from the messages that workers hold and from broadcasts without a
  guard: text that is not JSON ends the worker, and a broadcast on an unknown exchange counts as a lost connection.
  A worker's consumer gives its transport a door (``leoflow_celery.queueing.dead_letters.Door``), through which all of
  it goes first. Without a door (publishers, Flower, ``celery inspect``) kombu does what it always does.
- Keys of another kind. A key of Redis that holds no list where a queue is ends the worker, and the next one. It is
  moved out of the way.
- A body is decoded once: the door has done it.

``AMQP`` is Celery's documented ``amqp_cls``; it is here because publishers need it and load nothing of a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any

import kombu.transport
from celery.app import amqp
from kombu.transport import redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps
from redis.exceptions import ResponseError

from leoflow_celery.domain.routing import is_monitored
from leoflow_celery.queueing.depths import set_aside

_NAME = f"{__name__}:Transport"
_SCHEMES = ("redis", "rediss")


def register() -> None:
    """Make kombu use this transport for Redis, in this process. Again is harmless."""
    inside: Any = kombu.transport
    for scheme in _SCHEMES:
        if inside.TRANSPORT_ALIASES[scheme] != _NAME:
            inside.TRANSPORT_ALIASES[scheme] = _NAME
            inside._transport_cache.pop(scheme, None)  # somebody may have connected before


class Message(virtual.Message):
    """A message whose body was decoded at the door."""

    _raw: Any

    def _decode(self) -> Any:
        raw = self._raw
        return raw.content if hasattr(raw, "content") else super()._decode()


class QoS(redis.QoS):
    """The messages that a worker holds."""

    channel: Any
    _remove_from_indices: Any

    def append(self, message: Any, delivery_tag: str) -> None:
        self._again_without_wrong_types(lambda: super(QoS, self).append(message, delivery_tag))

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        self._again_without_wrong_types(lambda: super(QoS, self).restore_visible(*args, **kwargs))

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Put a message that was held back on its queue; what cannot be put back goes through the door."""
        door = self.channel.door
        if door is None:
            super().restore_by_tag(tag, client, leftmost)
            return
        refused: list[tuple[Any, bytes]] = []

        def restore(pipe: Any) -> None:
            refused.clear()
            entry = pipe.hget(self.unacked_key, tag)
            pipe.multi()
            self._remove_from_indices(tag, pipe)
            if entry is None:
                return
            held = door.held(entry)
            if isinstance(held, tuple):
                self._put_back(pipe, *held, leftmost=leftmost)
            else:
                refused.append((held, entry))

        with self.channel.conn_or_acquire(client) as connected:
            connected.transaction(restore, self.unacked_key)
        for why, entry in refused:
            door.refuse(why, entry, self.unacked_key)

    def _put_back(self, pipe: Any, envelope: Any, exchange: str, routing_key: str, *, leftmost: bool) -> None:
        envelope["headers"]["redelivered"] = True
        # Of an exchange that nobody declared the queue is unknown; what it says is the best that there is.
        queues = self.channel._lookup(exchange, routing_key) if exchange else []
        put = pipe.lpush if leftmost else pipe.rpush
        priority = self.channel._get_message_priority(envelope, reverse=False)
        for queue in queues or [routing_key]:
            put(self.channel._q_for_pri(queue, priority), dumps(envelope))

    def _again_without_wrong_types(self, call: Callable[[], None]) -> None:
        try:
            call()
        except ResponseError as error:
            if not self.channel.is_wrong_type(error):
                raise
            self.channel.set_aside({self.unacked_key: b"hash", self.unacked_index_key: b"zset"})
            call()


class Channel(redis.Channel):
    """Keeps the client that its commands go through, and opens nothing that did not come through the door."""

    Message = Message
    QoS = QoS
    connection: Any
    _pooled_client: Any = None

    @property
    def door(self) -> Any:
        """Of a worker; None elsewhere, and of a channel that is closed."""
        return getattr(self.connection, "door", None)

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        """The client given, or the channel's own."""
        if client is None:
            client = self._pooled_client
            if client is None or client.connection_pool is not self.pool:
                channel: Any = self
                client = self._pooled_client = channel._create_client()
        yield client

    def _brpop_read(self, **options: Any) -> Any:
        """Take what BRPOP answered: kombu's own, with a door where it parses."""
        door = self.door
        if door is None:
            return super()._brpop_read(**options)  # type: ignore[misc]
        channel: Any = self
        try:
            try:
                found = channel.client.parse_response(channel.client.connection, "BRPOP", **options)
            except ResponseError as error:
                if not self.is_wrong_type(error):
                    raise
                self._set_aside_queues()
                raise Empty from error
            except channel.connection_errors:
                channel.client.connection.disconnect()
                raise
            if not found:
                raise Empty
            key, raw = found
            queue = bytes_to_str(key).rsplit(channel.sep, 1)[0]
            channel._queue_cycle.rotate(queue)
            admitted = door.admit(raw, queue)
            if admitted is not None:
                self.connection._deliver(admitted, queue)
            return True
        finally:
            channel._in_poll = None
            channel._flush_brpop_reauth()

    def _receive_one(self, c: Any) -> Any:
        """Take a broadcast: kombu's own, with a door where it parses."""
        door = self.door
        if door is None:
            return super()._receive_one(c)  # type: ignore[misc]
        channel: Any = self
        try:
            response = c.parse_response()
        except channel.connection_errors:
            channel._in_listen = None
            raise
        if not isinstance(response, list | tuple):
            return None
        payload = channel._handle_message(c, response)
        if not bytes_to_str(payload["type"]).endswith("message") or not payload["data"]:
            return None
        name = bytes_to_str(payload["channel"])
        name = name.partition(".")[2] if name.startswith("/") else name
        exchange = name.split("/", 1)[0]
        message = door.broadcast(payload["data"])
        if message is None or exchange not in channel._fanout_to_queue:
            raise Empty
        return channel._deliver_fanout_message(message, exchange)

    # -- keys that hold something else than they are for --------------------------------------------------------

    @staticmethod
    def is_wrong_type(error: Exception) -> bool:
        return "WRONGTYPE" in str(error)

    def _set_aside_queues(self) -> None:
        channel: Any = self
        self.set_aside(
            {
                channel._q_for_pri(queue, step): b"list"
                for queue in channel.active_queues
                for step in channel.priority_steps
            }
        )

    def set_aside(self, wanted: dict[str, bytes]) -> None:
        """Rename each key that holds another type than ``wanted``, and leave a dead letter that says so."""
        prefix: str = self.global_keyprefix
        with self.conn_or_acquire() as client:
            for key, kind in wanted.items():
                moved = set_aside(client, f"{prefix}{key}", kind)
                if moved is not None and self.door is not None:
                    self.door.refuse_key(f"{prefix}{key}", *moved)


class Transport(redis.Transport):
    """Redis, with channels of ours. ``door`` is a worker's."""

    Channel = Channel
    door: Any = None


class AMQP(amqp.AMQP):
    """What the app makes its messages with."""

    def as_task_v2(self, task_id: str, name: str, *args: Any, **options: Any) -> Any:
        """A message, without the event ``task-sent`` when no monitor is to see the task."""
        message = super().as_task_v2(task_id, name, *args, **options)
        return message if is_monitored(name) else message._replace(sent_event=None)
