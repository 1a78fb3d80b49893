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
- An atomic take. kombu's BRPOP leaves a message in the worker's memory alone until it is recorded as held, and a worker
  that dies then takes it along. A worker's channel takes as ``leoflow_celery.queueing.holding`` says instead, several
  messages at once and without waiting for an answer.
- Leases. What a dead worker held comes back when its lease ran out by Redis's clock, and no lock stands before that.

``AMQP`` is Celery's documented ``amqp_cls``; it is here because publishers need it and load nothing of a worker.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any

import kombu.transport
from celery.app import amqp
from kombu.transport import redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from leoflow_celery.domain.routing import is_monitored
from leoflow_celery.queueing import holding
from leoflow_celery.queueing.depths import set_aside

_NAME = f"{__name__}:Transport"
_SCHEMES = ("redis", "rediss")
log = logging.getLogger(__name__)
#: BLMOVE answers after so long at the latest, or its connection is dead. Shorter than a lease, so that none is under
#: way when the lease of a stopped worker ran out.
_WAIT_SECONDS = 5
#: After an error that waiting does not mend, such as a full memory.
_AGAIN_SECONDS = 1.0
#: Of a worker whose prefetch is not limited.
_MANY = 100
_PUT_BACK_AT_ONCE = 100


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
    _quick_ack: Any

    def append(self, message: Any, delivery_tag: str) -> None:
        if self.channel.holder is not None:  # held already
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        holder = self.channel.holder
        if holder is None:
            super().ack(delivery_tag)
        else:
            self._quick_ack(delivery_tag)
            holder.done(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if requeue or self.channel.holder is None:
            super().reject(delivery_tag, requeue)
            if self.channel.holder is not None:
                self.channel.holder.forget(delivery_tag)
        else:
            self.ack(delivery_tag)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """kombu puts back what is held when a channel closes; a holder outlives it, and ends by itself."""
        if self.channel.holder is None:
            super().restore_unacked_once(stderr)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        if self.channel.holder is None:
            super().restore_visible(*args, **kwargs)
        else:
            self._again_without_wrong_types(self._put_back_what_is_due)

    def _put_back_what_is_due(self) -> None:
        prefix, timeout = self.channel.global_keyprefix, self.channel.visibility_timeout
        with self.channel.conn_or_acquire() as client:
            plain = client.connection_pool
            found = raw_command(plain, "EVAL", holding.DUE, *holding.due(prefix, timeout, _PUT_BACK_AT_ONCE))
            for tag, score, entry in zip(found[::3], found[1::3], found[2::3], strict=True):
                self._put_back_one(plain, prefix, tag, score, entry)

    def _put_back_one(self, pool: Any, prefix: str, tag: bytes, score: bytes, entry: bytes) -> None:
        held = self.channel.door.held(entry)
        keys = [f"{prefix}{holding.UNACKED}", f"{prefix}{holding.INDEX}"]
        if not isinstance(held, tuple):
            if raw_command(pool, "EVAL", holding.PUT_BACK, 2, *keys, tag, score):
                self.channel.door.refuse(held, entry, self.unacked_key)
            return
        envelope, exchange, routing_key = held
        envelope["headers"]["redelivered"] = True
        queues = self.channel._lookup(exchange, routing_key) if exchange else []
        priority = self.channel._get_message_priority(envelope, reverse=False)
        target = f"{prefix}{self.channel._q_for_pri((queues or [routing_key])[0], priority)}"
        raw_command(pool, "EVAL", holding.PUT_BACK, 3, *keys, target, tag, score, dumps(envelope))

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


def raw_command(pool: Any, *command: Any) -> Any:
    """One command as it is, on a connection of ``pool``: kombu's client would put its prefix before some arguments."""
    connection = pool.get_connection()
    try:
        connection.send_command(*command)
        return connection.read_response()
    finally:
        pool.release(connection)


class Holder:
    """What one worker process holds. It outlives its connections; acknowledging is safe from any thread."""

    def __init__(self, hold_seconds: float) -> None:
        self.hold_seconds = hold_seconds
        self.held: set[str] = set()
        self.wake: Callable[[], None] = lambda: None
        self._name = uuid.uuid4().hex
        self._takes = 0
        self._done: deque[str] = deque()
        self._lock = threading.Lock()

    def next_tags(self) -> str:
        """What the tags of one take begin with."""
        self._takes += 1
        return f"{self._name}.{self._takes}."

    def done(self, tag: str) -> None:
        """The message is acknowledged, or refused."""
        self._done.append(tag)
        self.wake()

    def forget(self, tag: str) -> None:
        self.held.discard(tag)

    def keep_only(self, tags: set[str]) -> None:
        """The connection was lost: what nobody works on comes back when its lease runs out."""
        self.held &= tags | set(self._done)

    def take_done(self) -> list[str]:
        tags = []
        while self._done:
            tags.append(self._done.popleft())
        self.held.difference_update(tags)
        return tags

    def not_done(self, tags: list[str]) -> None:
        """Nobody knows whether Redis heard it: it is said again, which changes nothing."""
        self._done.extend(tags)

    @property
    def has_done(self) -> bool:
        return bool(self._done)


class Taking:
    """Takes messages for one channel, in the loop of its worker. Whatever it raises ends the connection."""

    def __init__(self, channel: Any, holder: Holder, hub: Any) -> None:
        self._channel, self._holder, self._hub = channel, holder, hub
        self._places: list[tuple[str, str, str]] = []
        self._landing: holding.Landing | None = None
        self._talk: Any = None
        self._waits: list[Any] = []
        self._waiting: dict[int, float] = {}
        self._readers: dict[int, Any] = {}
        self._landed: list[tuple[int, str]] = []
        self._sent: tuple[list[str], float] | None = None
        self._asked = 0
        self._renewed_at = float("-inf")
        self._registered = self._is_empty = self._is_woken = self._is_over = False
        self._pause_until = 0.0
        self._pid = os.getpid()
        holder.wake = self.wake

    def wake(self) -> None:
        """There is something to tell Redis. From any thread."""
        if not self._is_woken and not self._is_over:
            self._is_woken = True
            self._hub.call_soon(self.turn)

    def turn(self) -> None:
        """Begin what can be begun: nothing here waits."""
        self._is_woken = False
        if self._is_over:
            return
        self._see_queues()
        now = time.monotonic()
        self._check_answers(now)
        if self._landing is None:
            return
        room = self._room()
        renew = now - self._renewed_at >= self._holder.hold_seconds / holding.RENEWALS_PER_LEASE
        wants = room > 0 and not self._is_empty and now >= self._pause_until and bool(self._channel.active_queues)
        if self._sent is None and (renew or wants or self._landed or self._holder.has_done):
            self._send(renew, room if wants else 0)
        if self._registered and self._is_empty and room > 0 and now >= self._pause_until:
            self._wait(now)

    def _room(self) -> int:
        most = self._channel.qos.can_consume_max_estimate()
        return (_MANY if most is None else most) - self._asked

    def _see_queues(self) -> None:
        """The queues that are consumed may change at any time (``add_consumer``)."""
        channel = self._channel
        queues = channel._queue_cycle.consume(len(channel.active_queues))
        places = [
            (channel._q_for_pri(queue, step), queue, f',"",{dumps(queue)}]')
            for step in channel.priority_steps
            for queue in queues
        ]
        if places == self._places or not places or self._sent is not None or self._landed:
            return
        if self._landing is not None:
            if self._waiting:
                for connection in self._waits:
                    connection.disconnect()
            self._leave()
        self._drop_waits()
        self._places, self._landing = places, holding.Landing.of(channel.global_keyprefix, places)
        self._registered = self._is_empty = False
        self._renewed_at = float("-inf")

    def _connect(self, on_answer: Callable[..., None], *arguments: Any) -> Any:
        connection = self._channel.async_pool.get_connection()
        if connection._sock is None:
            connection.connect()
        descriptor = connection._sock.fileno()
        self._readers[descriptor] = connection
        self._hub.add_reader(descriptor, on_answer, *arguments)
        return connection

    def _send(self, renew: bool, wanted: int) -> None:
        if self._talk is None:
            self._talk = self._connect(self._hear)
        landing: Any = self._landing
        done, landed, self._landed = self._holder.take_done(), self._landed, []
        command = landing.sync(
            lease_seconds=self._holder.hold_seconds,
            visibility_seconds=self._channel.visibility_timeout,
            register=not self._registered,
            wanted=wanted,
            tag_base=self._holder.next_tags(),
            done=done,
            landed=landed,
            renewed=list(self._holder.held) if renew else None,
        )
        self._sent, self._asked = (done, time.monotonic()), wanted
        self._talk.send_command("EVAL", holding.SYNC, *command, check_health=False)
        if renew:
            self._renewed_at = time.monotonic()

    def _hear(self) -> None:
        """Redis answered the script."""
        if self._sent is None or self._talk is None:
            raise RedisConnectionError("the broker closed an idle connection")
        done, _ = self._sent
        asked, self._asked = self._asked, 0
        try:
            lapsed, empty, wrong, *found = self._talk.read_response()
        except ResponseError as error:
            self._holder.not_done(done)
            self._sent = None
            if self._channel.is_wrong_type(error):
                self._channel.set_aside_all()
                return
            if "OOM" in str(error):
                self._later(error)
                return
            raise RedisConnectionError(f"the broker does not serve: {error}") from error
        self._sent = None
        if lapsed:
            raise RedisConnectionError("the broker did not hear of this worker for longer than a lease")
        self._registered = True
        if wrong:
            self._channel._set_aside_queues()
        if asked:
            self._is_empty = bool(empty)
        for tag, place, raw in zip(found[::3], found[1::3], found[2::3], strict=True):
            self._deliver(bytes_to_str(tag), int(place) - 1, raw)
        self.wake()

    def _later(self, error: Exception) -> None:
        log.warning("broker.take_later", extra={"error": str(error)})
        self._pause_until = time.monotonic() + _AGAIN_SECONDS
        self._is_empty = False
        self._hub.call_later(_AGAIN_SECONDS, self.wake)

    def _wait(self, now: float) -> None:
        names: Any = self._landing
        while len(self._waits) < len(self._places):
            self._waits.append(self._connect(self._arrived, len(self._waits)))
        for place, connection in enumerate(self._waits):
            if place not in self._waiting:
                source, landing = names.queues[place], names.keys[place]
                connection.send_command("BLMOVE", source, landing, "RIGHT", "LEFT", _WAIT_SECONDS, check_health=False)
                self._waiting[place] = now

    def _arrived(self, place: int) -> None:
        """A message came while we waited, or none did."""
        if place not in self._waiting:
            raise RedisConnectionError("the broker closed an idle connection")
        del self._waiting[place]
        try:
            raw = self._waits[place].read_response()
        except ResponseError as error:
            if self._channel.is_wrong_type(error):
                self._channel._set_aside_queues()
                self._is_empty = False
                self.wake()
                return
            if "OOM" in str(error):
                self._later(error)
                return
            raise RedisConnectionError(f"the broker does not serve: {error}") from error
        if raw is not None:
            if self._room() <= 0 or self._places[place][1] not in self._channel.active_queues:
                self._landed.append((place + 1, ""))
                self._is_empty = False
            else:
                tag = f"{self._holder.next_tags()}0"
                self._landed.append((place + 1, tag))
                self._deliver(tag, place, raw)
        self.turn()

    def _deliver(self, tag: str, place: int, raw: bytes) -> None:
        channel, queue = self._channel, self._places[place][1]
        self._holder.held.add(tag)
        admitted = channel.door.admit(raw, queue)
        if admitted is None:
            self._holder.done(tag)
            return
        admitted["properties"]["delivery_tag"] = tag
        try:
            channel.connection._deliver(admitted, queue)
        finally:
            if tag not in channel.qos._delivered:
                self._holder.done(tag)

    def _check_answers(self, now: float) -> None:
        limit = _WAIT_SECONDS + (self._channel.socket_timeout or _WAIT_SECONDS)
        if self._sent is not None and now - self._sent[1] > limit:
            raise RedisConnectionError("the broker does not answer")
        if any(now - since > limit for since in self._waiting.values()):
            raise RedisConnectionError("the broker does not answer")

    # -- the end ----------------------------------------------------------------------------------------------------

    def lost(self, connection: Any) -> None:
        """A connection ended: its socket is no reader any more."""
        if self._pid != os.getpid():
            return
        for descriptor, one in list(self._readers.items()):
            if one is connection:
                del self._readers[descriptor]
                self._hub.remove(descriptor)

    def _drop_waits(self) -> None:
        for connection in self._waits:
            connection.disconnect()
        self._waits.clear()
        self._waiting.clear()

    def _leave(self) -> None:
        if self._landing is not None and self._registered:
            raw_command(self._channel.pool, "EVAL", holding.LEAVE, *self._landing.leave())

    def end(self) -> None:
        """The worker ends: tell what is done, and put back what nobody works on. Raises what Redis does."""
        if self._sent is not None:
            self._hear()
        self._is_over = True
        channel, holder = self._channel, self._holder
        keys = [f"{channel.global_keyprefix}{key}" for key in (holding.UNACKED, holding.INDEX)]
        for tag in holder.take_done():
            raw_command(channel.pool, "EVAL", holding.PUT_BACK, 2, *keys, tag, "")
        self._drop_waits()
        if self._landing is not None:
            if self._landed:
                self._send(False, 0)
                if self._talk.read_response()[0]:
                    raise RedisConnectionError("the broker did not hear of this worker for longer than a lease")
                self._sent = None
            self._leave()
        for tag in list(holder.held):
            entry = raw_command(channel.pool, "HGET", keys[0], tag)
            if entry is not None:
                channel.qos._put_back_one(channel.pool, channel.global_keyprefix, tag, "", entry)
            holder.forget(tag)

    def close(self) -> None:
        """The connection is gone, or given up."""
        self._is_over = True
        self._holder.wake = lambda: None
        if self._sent is not None:
            self._holder.not_done(self._sent[0])
            self._sent = None
        if self._pid == os.getpid():
            for descriptor in list(self._readers):
                del self._readers[descriptor]
                self._hub.remove(descriptor)


class Poller(redis.MultiChannelPoller):
    """kombu's, with channels that take by themselves."""

    def _register_BRPOP(self, channel: Any) -> None:  # noqa: N802 - kombu's name
        if channel.taking is None:
            super()._register_BRPOP(channel)  # type: ignore[misc]

    def on_poll_start(self) -> None:
        super().on_poll_start()
        channels: Any = self._channels  # type: ignore[attr-defined]
        for channel in list(channels):
            if channel.taking is not None:
                channel.taking.turn()


class Channel(redis.Channel):
    """Keeps the client that its commands go through, and opens nothing that did not come through the door."""

    Message = Message
    QoS = QoS
    connection: Any
    _pooled_client: Any = None
    _holder: Any = None
    _taking: Any = None

    @property
    def door(self) -> Any:
        """Of a worker; None elsewhere, and of a channel that is closed."""
        return getattr(self.connection, "door", None)

    @property
    def holder(self) -> Any:
        """Of a worker: what its process holds."""
        if self._holder is None and self.door is not None:
            self._holder = getattr(self.connection, "holder", None)
        return self._holder

    @property
    def taking(self) -> Any:
        """Of a worker's channel that consumes from queues."""
        if self._taking is None and self.holder is not None and self.connection.hub is not None:
            channel: Any = self
            if channel.active_queues and not channel.closed:
                self._taking = Taking(self, self.holder, self.connection.hub)
        return self._taking

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        if self._holder is not None and getattr(self, "closed", False):
            self._holder.done(delivery_tag)  # the next connection says it
        else:
            super().basic_ack(delivery_tag, multiple)

    def _on_connection_disconnect(self, connection: Any) -> None:
        if self._taking is not None:
            self._taking.lost(connection)
        super()._on_connection_disconnect(connection)  # type: ignore[misc]

    def close(self) -> None:
        if self._taking is not None:
            self._taking.close()
        super().close()

    def set_aside_all(self) -> None:
        """Whatever a worker of messages reads, if it is of another kind."""
        self._set_aside_queues()
        self.set_aside({holding.UNACKED: b"hash", holding.INDEX: b"zset", holding.LANDINGS: b"zset"})
        self.set_aside({holding.ABANDONED: b"zset"})

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
    holder: Holder | None = None
    hub: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle: Any = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        connection.hub = loop
        super().register_with_event_loop(connection, loop)


class AMQP(amqp.AMQP):
    """What the app makes its messages with."""

    def as_task_v2(self, task_id: str, name: str, *args: Any, **options: Any) -> Any:
        """A message, without the event ``task-sent`` when no monitor is to see the task."""
        message = super().as_task_v2(task_id, name, *args, **options)
        return message if is_monitored(name) else message._replace(sent_event=None)
