"""One worker at a time without SQL: for as long as it takes, and not longer than it lives."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import redis

from leoflow_celery.errors import BrokerUnavailable, LeaseLost
from leoflow_celery.queueing.locks import BrokerLocks
from tests.support.redis_server import RedisServer
from tests.support.waiting import PATIENCE, wait_until

_HOLDER = """
import sys, time, redis
from leoflow_celery.queueing.locks import BrokerLocks
with BrokerLocks(redis.Redis.from_url(sys.argv[1]), "test:").single_flight("reconcile", 2) as held:
    print(bool(held), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as made:
        yield made


def is_free(locks: BrokerLocks, ttl_seconds: float = 60) -> bool:
    with locks.single_flight("reconcile", ttl_seconds) as held:
        return bool(held)


def test_a_lock_is_one_s_own_and_free_afterwards(client: redis.Redis) -> None:
    locks = BrokerLocks(client, "test:")
    with locks.single_flight("reconcile", 60) as held:
        assert held
        assert not is_free(locks)
    assert is_free(locks)
    with pytest.raises(ZeroDivisionError), locks.single_flight("reconcile", 60):
        raise ZeroDivisionError
    assert is_free(locks)


def test_a_key_that_no_worker_of_ours_wrote_closes_no_door(client: redis.Redis) -> None:
    """It has no end, or one in a year; whoever may write to the broker could stop every reconcile with it."""
    locks, key = BrokerLocks(client, "test:"), "test:lock:reconcile"
    client.set(key, "x")
    assert is_free(locks)
    client.set(key, "x", ex=31_536_000)
    assert is_free(locks)
    client.hset(key, "x", "y")
    assert is_free(locks)
    assert not client.exists(key)


def test_what_takes_longer_than_the_lock_lives_keeps_it(client: redis.Redis) -> None:
    locks = BrokerLocks(client, "test:")
    with locks.single_flight("reconcile", 0.6):
        until = time.monotonic() + 1.5
        wait_until(lambda: is_free(locks) or time.monotonic() > until, 10, interval=0.05)
        assert time.monotonic() > until, "it ran out while its holder lived"
        assert client.pttl("test:lock:reconcile") <= 600
    assert is_free(locks)


def test_a_holder_that_was_killed_is_replaced_when_its_lock_runs_out(redis_url: str, client: redis.Redis) -> None:
    locks, command = BrokerLocks(client, "test:"), [sys.executable, "-c", _HOLDER, redis_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert not is_free(locks)
        holder.kill()
    killed_at = time.monotonic()
    wait_until(lambda: is_free(locks), 10, "the lock runs out", interval=0.05)
    assert time.monotonic() - killed_at < 4 * PATIENCE


def test_a_lock_that_was_lost_is_not_taken_back_from_the_next_holder(client: redis.Redis) -> None:
    locks = BrokerLocks(client, "test:")
    with locks.single_flight("reconcile", 0.3) as held:
        client.set("test:lock:reconcile", "the next holder's")
        wait_until(lambda: not held, 5, "it notices")
        with pytest.raises(LeaseLost, match="'reconcile'"):
            held.check()
        assert client.ttl("test:lock:reconcile") == -1
    assert client.get("test:lock:reconcile") == b"the next holder's"


def test_an_outage_of_the_broker_does_not_disturb_the_holder(redis_server: RedisServer) -> None:
    with redis.Redis.from_url(redis_server.url()) as client:
        locks = BrokerLocks(client, "test:")
        with locks.single_flight("reconcile", 60) as held:
            assert held
        with pytest.raises(BrokerUnavailable, match="'reconcile'"), locks.single_flight("reconcile", 0.3):
            redis_server.stop()
        with pytest.raises(BrokerUnavailable), locks.single_flight("reconcile", 0.3):
            raise AssertionError("nobody is let in")


def test_a_broker_that_is_no_redis_lets_everybody_in() -> None:
    locks = BrokerLocks(None, "test:")
    with locks.single_flight("reconcile", 60) as held:
        assert held
        assert is_free(locks)
