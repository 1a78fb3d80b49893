"""Single flight among workers without SQL: a lock in the broker's Redis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from leoflow_celery.errors import BrokerUnavailable


class BrokerLocks:
    """Named locks that end with their holder's block, or ``ttl_seconds`` after a holder that died in it.

    A broker that is not Redis has none: then everybody is let in, and what they do must be harmless twice.
    """

    def __init__(self, client: Any, key_prefix: str) -> None:
        """``client`` is a Redis client, or None for another kind of broker."""
        self._client, self._prefix = client, key_prefix

    @contextmanager
    def single_flight(self, name: str, ttl_seconds: float) -> Iterator[bool]:
        """True inside for the one who holds the lock.

        Raises:
            BrokerUnavailable: the broker did not answer.
        """
        if self._client is None:
            yield True
            return
        from redis.exceptions import LockError, RedisError

        lock = self._client.lock(f"{self._prefix}lock:{name}", timeout=ttl_seconds, blocking=False)
        try:
            held = bool(lock.acquire())
        except RedisError as error:
            raise BrokerUnavailable(f"lock {name!r}: the broker did not answer: {error}") from error
        try:
            yield held
        finally:
            if held:
                try:
                    lock.release()
                except LockError:
                    pass  # it ran out: somebody else may hold it by now
                except RedisError as error:
                    raise BrokerUnavailable(f"lock {name!r}: the broker did not answer: {error}") from error
