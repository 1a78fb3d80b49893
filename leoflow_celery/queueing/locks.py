"""Single flight among workers without SQL: a lock in the broker's Redis."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from leoflow_celery.background import Periodic
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
    def single_flight(self, name: str, ttl_seconds: float) -> Iterator[bool]:
        """True inside for the one who holds the lock, which is renewed for as long as the block takes.

        Raises:
            BrokerUnavailable: the broker did not answer.
        """
        if self._client is None:
            yield True
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
            yield False
            return
        try:
            with _renewed(lock, name, ttl_seconds / 3):
                yield True
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


def _renewed(lock: Any, name: str, interval_seconds: float) -> Periodic:
    """The lock starts anew every so often, until the block ends or the lock was lost."""
    from redis.exceptions import LockError

    def renew() -> None:  # a broker that does not answer is asked again: there is another third of the lock's life
        try:
            lock.reacquire()
        except LockError:
            log.warning("lock.lost", extra={"lock": name})
            renewal.stop()

    renewal = Periodic(
        renew,
        interval_seconds,
        name=f"leoflow-lock-{name}",
        failed="lock.not_renewed",
        fields={"lock": name},
        at_once=False,
    )
    return renewal
