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
  that dies then takes it along. A worker takes by a script instead (``leoflow_celery.queueing.holding``), as many as it
  has room for, and acknowledges in the same call. Redis tells it when a queue that was empty no longer is
  (``CLIENT TRACKING``); it asks once a second all the same, as kombu does.
- Put back without a lock. A worker that died while it had kombu's kept every other from putting back what dead ones
  held, for minutes. How often a message was put back travels with it, and the door ends that.
- Answers that pass. While Redis is a replica, is loading or is full, a worker waits and goes on.

``AMQP`` is Celery's documented ``amqp_cls``; it is here because publishers need it and load nothing of a worker.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty
from time import monotonic
from typing import Any

import kombu.transport
from celery.app import amqp
from kombu.transport import redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError

from leoflow_celery.domain.routing import is_monitored
from leoflow_celery.queueing import holding
from leoflow_celery.queueing.depths import set_aside

_NAME = f"{__name__}:Transport"
_SCHEMES = ("redis", "rediss")
log = logging.getLogger(__name__)
#: After an answer that waiting may mend, such as that of a replica or of a full memory.
_AGAIN_SECONDS = 1.0
#: Of what waits, found at once: a message may have megabytes.
_DUE_AT_ONCE = 20
#: A connection that closes waits so long for what it asked last.
_LAST_ANSWER_SECONDS = 5.0
#: A push of Redis, as opposed to an answer.
_PUSH = object()


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
    _delivered: Any
    _dirty: Any
    _quick_ack: Any

    def append(self, message: Any, delivery_tag: str) -> None:
        holder = self.channel.holder
        if holder is not None and holder.is_ours(delivery_tag):  # Redis holds it
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        holder = self.channel.holder
        if holder is not None and holder.is_ours(delivery_tag):
            self._quick_ack(delivery_tag)
            holder.done.append(delivery_tag)
        else:
            super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Celery gives back what a process died of, and we what the broker has no room for."""
        if self.channel.holder is None:
            super().reject(delivery_tag, requeue)
        elif not requeue:
            self.ack(delivery_tag)
        else:
            is_at_fault = requeue not in (holding.NOT_ITS_FAULT, holding.NO_ROOM)
            self.restore_by_tag(delivery_tag, leftmost=True, counted=is_at_fault)
            self._quick_ack(delivery_tag)
            if requeue == holding.NOT_ITS_FAULT:
                self.channel.wait()

    def held(self) -> list[str]:
        """The tags of what this process works on or is to."""
        return [tag for tag in self._delivered if tag not in self._dirty]

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Put back what nobody was heard of that holds it."""
        channel = self.channel
        if channel.door is None:
            super().restore_visible(*args, **kwargs)
            return
        arguments = holding.due(channel.held_keys, self.visibility_timeout, _DUE_AT_ONCE)
        try:
            found = channel.run(holding.DUE, arguments)
        except ResponseError as error:
            channel.answered_otherwise(error)
            return
        for tag, entry in zip(found[::2], found[1::2], strict=True):
            try:
                self.put_back(bytes_to_str(tag), entry)
            except ResponseError as error:
                channel.answered_otherwise(error)
                if not channel.is_wrong_type(error):  # which one queue has, and the others of these have not
                    return

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False, counted: bool = True) -> None:
        """Put a message that was held back on its queue; what cannot be put back goes through the door."""
        if self.channel.door is None:
            super().restore_by_tag(tag, client, leftmost)
            return
        with self.channel.conn_or_acquire(client) as connected:
            entry = connected.hget(self.unacked_key, tag)
        if entry is not None:
            self.put_back(bytes_to_str(tag), entry, leftmost=leftmost, counted=counted)

    def restore_unacked(self, client: Any = None) -> None:
        """At the end of a connection: nothing is wrong with these, and they count as never taken."""
        if self.channel.door is None:
            super().restore_unacked(client)
            return
        for tag in self._delivered:
            try:
                self.restore_by_tag(tag, client, counted=False)
            except ResponseError as error:  # it comes back when nobody was heard of that holds it
                log.warning("broker.left_unsaid", extra={"error": repr(error)})
        self._delivered.clear()

    def put_back(self, tag: str, entry: bytes, *, leftmost: bool = False, counted: bool = True) -> None:
        """Put one back, or keep it as a dead letter; it stays held until one of the two is done."""
        channel = self.channel
        held = channel.door.held(entry, counted=counted)
        if held is True:  # as a dead letter
            channel.run(holding.PUT_BACK, [2, *channel.held_keys, tag])
        elif isinstance(held, tuple):
            envelope, exchange, routing_key = held
            # Of an exchange that nobody declared the queue is unknown; what it says is the best that there is.
            queues = channel._lookup(exchange, routing_key) if exchange else []
            priority = channel._get_message_priority(envelope, reverse=False)
            lists = [channel.key(channel._q_for_pri(queue, priority)) for queue in queues or [routing_key]]
            push = "LPUSH" if leftmost else "RPUSH"
            keys = [*channel.held_keys, *lists]
            channel.run(holding.PUT_BACK, [len(keys), *keys, tag, push, dumps(envelope)])


class Poller(redis.MultiChannelPoller):
    """kombu's, with channels that take by themselves."""

    def on_poll_start(self) -> None:
        super().on_poll_start()
        inside: Any = self
        for channel in list(inside._channels):
            if channel.holder is not None:
                channel.see_to_it()


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
        """The client given, or the channel's own.

        A producer may still have a channel that an error closed; kombu opens it another one for an error of the
        connection, and not for what a closed channel would raise.
        """
        if client is None:
            if self.connection is None:
                raise RedisConnectionError("the channel is closed")
            client = self._pooled_client
            if client is None or client.connection_pool is not self.pool:
                channel: Any = self
                client = self._pooled_client = channel._create_client()
        yield client

    # -- taking messages ----------------------------------------------------------------------------------------
    # One connection, on which one command at a time is under way (``_awaited``): "tracking" once, then "messages", and
    # "empty" when there were none. That last one makes Redis tell when one of the lists changes, and closes the gap.

    _holder: Any = None
    _awaited = ""
    _asked: Any = None
    _knows_script = True
    #: Ask as soon as there is room.
    _woken = False
    _ask_at = _again_at = _renew_at = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: Tag, queue and message of what Redis gave and nobody has seen.
        self._taken: deque[tuple[str, str, bytes]] = deque()
        self._places: list[tuple[str, str]] = []
        super().__init__(*args, **kwargs)

    @property
    def holder(self) -> Any:
        """Of a worker: what its process has to tell Redis. A channel that is closed keeps it."""
        if self._holder is None:
            self._holder = getattr(self.connection, "holder", None)
        return self._holder

    def key(self, name: str) -> str:
        return f"{self.global_keyprefix}{name}"

    @property
    def held_keys(self) -> list[str]:
        channel: Any = self
        return [self.key(channel.unacked_key), self.key(channel.unacked_index_key)]

    def run(self, script: str, arguments: list[Any]) -> Any:
        """Run a script whose keys are whole: EVAL is a command that kombu's client leaves as it is."""
        with self.conn_or_acquire() as client:
            return client.eval(script, *arguments)

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        if self.closed and self._holder is not None and self._holder.is_ours(delivery_tag):
            self._holder.done.append(delivery_tag)  # the next connection says it
        else:
            super().basic_ack(delivery_tag, multiple)

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        params: dict[str, Any] = super()._connparams(asynchronous)  # type: ignore[misc]
        return {"protocol": 3, **params} if asynchronous else params

    def _brpop_start(self, timeout: float | None = None) -> None:
        """There is a connection that kombu's poller watches."""
        if self.holder is None:
            super()._brpop_start(timeout)  # type: ignore[misc]
            return
        self._forget_asked()  # on another connection
        channel: Any = self
        channel.client.connection._parser.invalidation_push_handler_func = lambda _: _PUSH
        self._send("tracking", "CLIENT", "TRACKING", "ON", "NOLOOP")

    def _send(self, awaited: str, *command: Any) -> None:
        channel: Any = self
        connection = channel.client.connection
        connection.send_command(*command, check_health=False)
        self._awaited = awaited
        # kombu drops a connection that does not answer for long, and knows of a pending answer by these two.
        channel._in_poll, channel._brpop_sent_at = connection, monotonic()

    def _forget_asked(self) -> None:
        channel: Any = self
        asked, self._asked = self._asked, None
        self._awaited, channel._brpop_sent_at = "", None
        if asked is not None:
            self.holder.unanswered(asked)

    def see_to_it(self) -> None:
        """In each turn of the loop: ask for messages, tell what is done, and that we live."""
        channel: Any = self
        self._deliver_taken()
        now = monotonic()
        if now < self._again_at:
            return
        if now >= self._renew_at:
            self._refused_for_now(self._renew)
        if self._awaited or (channel.active_fanout_queues and not channel.active_queues):
            return  # broadcasts only: what is done is told by who takes, along with its next question
        has_room = bool(channel._in_poll and channel.active_queues and channel.qos.can_consume())
        if has_room and (self._woken or self.holder.done or now >= self._ask_at):
            self._ask(now)
        elif not has_room and (self.holder.done or self.holder.lost):
            self._refused_for_now(self._tell)

    def _refused_for_now(self, call: Callable[[], None]) -> None:
        try:
            call()
        except ResponseError as error:
            self.answered_otherwise(error)

    def answered_otherwise(self, error: ResponseError) -> None:
        """Redis does not do now what it should: go on when it does."""
        log.warning("broker.not_now", extra={"error": str(error)})
        self.wait()
        channel: Any = self
        if self.is_wrong_type(error):
            self._set_aside_queues()
            self.set_aside({channel.unacked_key: b"hash", channel.unacked_index_key: b"zset"})
        elif isinstance(error, ReadOnlyError) or "READONLY" in str(error):  # Redis 6.2 wraps it
            # The name of the server may lead to another one by now.
            self.pool.disconnect(inuse_connections=False)
            if channel.client.connection is not None:
                channel.client.connection.disconnect()

    def wait(self) -> None:
        """Redis serves nobody well now: ask it for nothing more so soon."""
        self._again_at = monotonic() + _AGAIN_SECONDS

    def _ask(self, now: float) -> None:
        channel: Any = self
        queues = channel._queue_cycle.consume(len(channel.active_queues))
        self._places = [
            (queue, self.key(channel._q_for_pri(queue, step))) for step in channel.priority_steps for queue in queues
        ]
        room = channel.qos.can_consume_max_estimate()
        asked = self._asked = self.holder.ask(holding.MOST_AT_ONCE if room is None else room)
        self._woken, self._ask_at = False, now + channel.brpop_timeout
        script = ("EVALSHA", holding.TAKE_SHA) if self._knows_script else ("EVAL", holding.TAKE)
        self._knows_script = True
        keys = [*self.held_keys, *(key for _, key in self._places)]
        ends = [f',"",{dumps(queue)}]' for queue, _ in self._places]
        self._send("messages", *script, *asked.arguments(keys, len(queues), ends))

    def _tell(self) -> None:
        """Tell what is done and give back what nobody saw, while no message is wanted, and wait for the answer."""
        asked = self.holder.ask(0)
        try:
            answer = self.run(holding.TAKE, asked.arguments(self.held_keys, 1, []))
        except BaseException:
            self.holder.unanswered(asked)
            raise
        self._give_back([(bytes_to_str(tag), entry) for tag, entry in zip(answer[1::3], answer[3::3], strict=True)])

    def _renew(self) -> None:
        """What a living worker holds does not come back, however long its task takes."""
        channel: Any = self
        for arguments in holding.renewals(self.held_keys, channel.qos.held()):
            self.run(holding.RENEW, arguments)
        self._renew_at = monotonic() + channel.visibility_timeout / 3

    def _brpop_read(self, **options: Any) -> Any:
        """Hear what Redis said: kombu's own where there is no door."""
        if self.holder is None:
            return super()._brpop_read(**options)  # type: ignore[misc]
        channel: Any = self
        connection = channel.client.connection
        try:
            self._hear(connection)
            while connection._sock is not None and connection.can_read(timeout=0):  # also what was read along
                self._hear(connection)
        except channel.connection_errors:
            connection.disconnect()
            raise
        if not self._deliver_taken():
            raise Empty
        return True

    def _hear(self, connection: Any) -> None:
        """One thing that Redis said."""
        try:
            answer = connection.read_response(push_request=True)
        except ResponseError as error:
            if self._awaited == "tracking":
                log.warning("broker.tells_nothing", extra={"error": str(error), "asked_every_seconds": 1})
            elif isinstance(error, NoScriptError):
                self._knows_script, self._woken = False, True
            else:
                self._woken = True
                self.answered_otherwise(error)
            self._forget_asked()
            return
        if answer is _PUSH:
            self._woken = True
            return
        channel: Any = self
        awaited, self._awaited, channel._brpop_sent_at = self._awaited, "", None
        if awaited == "messages":
            self._keep_taken(answer)
        elif awaited == "empty" and answer:
            self._woken = True

    def _keep_taken(self, answer: list[Any]) -> None:
        channel: Any = self
        asked, self._asked = self._asked, None
        is_wrong, *found = answer
        unseen = []
        for tag, place, raw in zip(found[::3], found[1::3], found[2::3], strict=True):
            if place < 0:
                unseen.append((bytes_to_str(tag), raw))
                continue
            queue = self._places[int(place)][0]
            self._taken.append((bytes_to_str(tag), queue, raw))
            channel._queue_cycle.rotate(queue)
        self._refused_for_now(lambda: self._give_back(unseen))
        if is_wrong:
            self._set_aside_queues()
        if found or is_wrong or not asked.wanted:
            self._woken = True
        elif not channel._closing:
            self._send("empty", "EXISTS", *(key for _, key in self._places))

    def _deliver_taken(self) -> bool:
        """Whether there was something to deliver. What is not taken into account here stays held, and comes again."""
        has_delivered = False
        while self._taken:
            tag, queue, raw = self._taken.popleft()
            if queue not in self.connection._callbacks:  # since it was taken: the host is full (``tasks.room``)
                self.holder.lost.append(tag)
                continue
            admitted = self.door.admit(raw, queue)
            if admitted is not None:
                admitted["properties"]["delivery_tag"] = tag
                has_delivered = True
                self.connection._deliver(admitted, queue)
            elif self.door.has_kept_all:
                self.holder.done.append(tag)
        return has_delivered

    def _give_back(self, unseen: list[tuple[str, bytes]]) -> None:
        """Put messages that nobody saw back to where they were, the last one first; nothing is wrong with them."""
        channel: Any = self
        try:
            while unseen:
                channel.qos.put_back(*unseen[-1], counted=False)
                unseen.pop()
        finally:
            self.holder.lost.extend(tag for tag, _ in unseen)

    def close(self) -> None:
        channel: Any = self
        if self.holder is not None and not self.closed:
            channel._closing = True
            try:
                self._leave()
            except (RedisError, OSError) as error:
                log.warning("broker.left_unsaid", extra={"error": repr(error)})
            channel._in_poll = None
        super().close()

    def _leave(self) -> None:
        """Tell what is done, and put back what nobody has seen."""
        connection = self.__dict__["client"].connection if "client" in self.__dict__ else None
        try:
            while self._awaited and connection is not None and connection._sock is not None:
                if not connection.can_read(timeout=_LAST_ANSWER_SECONDS):
                    break
                self._hear(connection)
        finally:
            self._forget_asked()
            self.holder.lost.extend(tag for tag, _, _ in self._taken)
            self._taken.clear()
        while self.holder.done or self.holder.lost:
            self._tell()

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
    """Redis, with channels of ours. ``door`` and ``holder`` are a worker's."""

    Channel = Channel
    door: Any = None
    holder: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()


class AMQP(amqp.AMQP):
    """What the app makes its messages with."""

    def as_task_v2(self, task_id: str, name: str, *args: Any, **options: Any) -> Any:
        """A message, without the event ``task-sent`` when no monitor is to see the task.

        The event calls a task what its worker will call it.
        """
        message = super().as_task_v2(task_id, name, *args, **options)
        if not is_monitored(name):
            return message._replace(sent_event=None)
        if message.sent_event is not None and message.headers["shadow"]:
            message.sent_event["name"] = message.headers["shadow"]
        return message
