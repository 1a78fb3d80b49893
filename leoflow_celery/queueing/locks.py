"""Single flight among workers without SQL: a lock in the broker's Redis."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from leoflow_celery.background import RenewedLease
from leoflow_celery.errors import BrokerUnavailable

log = logging.getLogger(__name__)


class BrokerLocks:
    """Named locks that end with their holder's block, or ``ttl_seconds`` after a holder that died in it.

    A broker that is not Redis has none: then everybody is let in, and what they do must be harmless twice. So must it
    be with Redis: a holder that the broker does not hear of in time is taken for dead.
    """

    def __init__(self, client: Any, key_prefix: str) -> None:
        """``client`` is a Redis client, or None for another kind of broker."""
        self._client, self._prefix = client, key_prefix

    @contextmanager
    def single_flight(self, name: str, ttl_seconds: float) -> Iterator[RenewedLease]:
        """True inside for the one who holds the lock, which is renewed for as long as the block takes.

        One that lost it hears it from ``check``.

        Raises:
            BrokerUnavailable: the broker did not answer.
        """
        if self._client is None:
            with RenewedLease(name, ttl_seconds, lambda: True) as lease:
                yield lease
            return
        from redis.exceptions import LockError, RedisError

        key = f"{self._prefix}lock:{name}"
        # Another thread renews it than takes it.
        lock = self._client.lock(key, timeout=ttl_seconds, blocking=False, thread_local=False)
        try:
            held = bool(lock.acquire()) or (self._is_foreign(key, ttl_seconds) and bool(lock.acquire()))
        except RedisError as error:
            raise BrokerUnavailable(f"lock {name!r}: the broker did not answer: {error}") from error
        if not held:
            yield RenewedLease(name, ttl_seconds, None)
            return

        def renew() -> bool:  # a broker that does not answer is asked again: there is another third of the lock's life
            try:
                return bool(lock.reacquire())
            except LockError:
                return False

        try:
            with RenewedLease(name, ttl_seconds, renew) as lease:
                yield lease
        finally:
            try:
                lock.release()
            except LockError:
                pass  # it ran out: somebody else may hold it by now
            except RedisError as error:
                raise BrokerUnavailable(f"lock {name!r}: the broker did not answer: {error}") from error

    def _is_foreign(self, key: str, ttl_seconds: float) -> bool:
        """Whether the lock is none of ours, which end in time: somebody else's would close the door for ever.

        It is deleted then. ``-1`` is a key that never ends.
        """
        left = int(self._client.pttl(key))
        if left != -1 and left <= ttl_seconds * 1000:
            return False
        log.warning("lock.foreign", extra={"lock": key, "milliseconds_left": left})
        self._client.delete(key)
        return True
