"""How deep the queues are, asked of the broker itself.

On Redis a queue is one list per priority step, named by kombu (``queue``, then ``queue`` + separator + step), plus the
messages that workers hold unacknowledged. A passive declare answers 404 under a key prefix, so this asks Redis.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeVar

from leoflow_celery.broker_url import RedisAddress, redis_address
from leoflow_celery.domain.routing import held_key
from leoflow_celery.errors import BrokerUnavailable
from leoflow_celery.settings import BrokerSettings

log = logging.getLogger(__name__)
R = TypeVar("R")
_SEPARATOR = "\x06\x16"
_STEPS = (0, 3, 6, 9)


class QueueDepths:
    """Depths of the queues of one broker."""

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings

    @cached_property
    def client(self) -> Any:
        """A Redis client of the broker."""
        return redis_client(self._settings)

    def waiting(self, queue: str) -> int:
        """Messages that no worker has taken.

        Raises:
            BrokerUnavailable: the broker did not answer.
        """
        with broker_errors_mapped(self._settings), self.client.pipeline(transaction=False) as pipe:
            for name in _lists(queue):
                pipe.llen(self._settings.key_prefix + name)
            return int(sum(pipe.execute()))

    def oldest_tag(self, queue: str) -> str | None:
        """What identifies the oldest waiting message of a queue; None for an empty queue.

        Raises:
            BrokerUnavailable: the broker did not answer.
        """
        with broker_errors_mapped(self._settings), self.client.pipeline(transaction=False) as pipe:
            for name in _lists(queue):
                pipe.lindex(self._settings.key_prefix + name, -1)
            payload = next(filter(None, pipe.execute()), None)
        return None if payload is None else hashlib.sha256(payload).hexdigest()

    def depth(self, queue: str) -> int:
        """Messages waiting in a queue or held unacknowledged by its workers.

        Raises:
            BrokerUnavailable: the broker did not answer.
        """
        waiting = self.waiting(queue)
        with broker_errors_mapped(self._settings):
            held = sum(
                1
                for key in {held_key(), held_key(queue)}  # a worker of several queues holds them together
                for _, payload in self.client.hscan_iter(self._settings.key_prefix + key, count=200)
                if _queue_of(payload) == queue
            )
        return waiting + held

    def close(self) -> None:
        if "client" in self.__dict__:
            self.client.close()


def _lists(queue: str) -> list[str]:
    """The lists of a queue, as kombu names them, first served first. Their oldest message is at the end."""
    return [queue if step == 0 else f"{queue}{_SEPARATOR}{step}" for step in _STEPS]


def _queue_of(payload: bytes) -> str | None:
    try:
        _message, _exchange, routing_key = json.loads(payload)
    except (ValueError, TypeError, RecursionError):
        return None
    return str(routing_key)


def redis_client(settings: BrokerSettings) -> Any:
    """A Redis client of the broker, which the caller closes.

    Raises:
        ConfigurationError: a file that its URL names cannot be read.
    """
    return client_of(settings, redis_address(settings.url))


def client_of(settings: BrokerSettings, address: RedisAddress, **options: Any) -> Any:
    """A Redis client of an address, with the timeouts of the broker's, which the caller closes."""
    import redis

    return redis.Redis.from_url(
        address.client_url,
        **address.tls,
        socket_connect_timeout=settings.connect_timeout_seconds,
        socket_timeout=settings.socket_timeout_seconds,
        **options,
    )


def answered(settings: BrokerSettings, client: Any, kinds: Mapping[str, bytes], call: Callable[[], R]) -> R:
    """What the broker answers; of the keys in ``kinds``, those that hold another type are moved out of the way.

    Raises:
        BrokerUnavailable: it did not answer.
    """
    from redis.exceptions import ResponseError

    with broker_errors_mapped(settings):
        try:
            return call()
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
        for key, kind in kinds.items():
            set_aside(client, key, kind)
        return call()


def set_aside(client: Any, key: str, kind: bytes) -> tuple[str, str] | None:
    """Rename a key of the broker that holds another type than ``kind``: (its type, its new name) if it did.

    Raises:
        RedisError: the broker did not answer.
    """
    from redis.exceptions import ResponseError

    found = client.type(key)
    if found in (b"none", kind):
        return None
    moved_to = f"{key}.set-aside.{uuid.uuid4().hex[:12]}"
    try:
        client.rename(key, moved_to)
    except ResponseError:
        return None  # another worker was faster
    log.error("broker.key_set_aside", extra={"key": key, "moved_to": moved_to})
    return found.decode(), moved_to


class broker_errors_mapped:  # noqa: N801 - a context manager, used as one
    """What Redis raises inside becomes BrokerUnavailable."""

    def __init__(self, settings: BrokerSettings) -> None:
        self._url = settings.url

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        from redis.exceptions import RedisError

        if isinstance(error, RedisError):
            raise BrokerUnavailable(f"broker {safe_url(self._url)} did not answer: {error}") from error


def safe_url(url: str) -> str:
    """A broker URL without its password."""
    from kombu.utils.url import maybe_sanitize_url

    return str(maybe_sanitize_url(url))
