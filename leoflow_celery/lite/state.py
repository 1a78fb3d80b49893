"""The directory that holds everything a one-machine system keeps: keys, database, broker, logs; and its lock.

It outlives the processes, so ``leoflow --lite logs …`` works after ``leoflow lite run`` has ended. One system runs per
directory: the kernel drops the lock with its holder, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from leoflow_celery.environment import state_dir
from leoflow_celery.errors import ConfigurationError

Command = Literal["run", "up"]


@dataclass(frozen=True, slots=True)
class Holder:
    """Who runs the system of a state directory."""

    pid: int
    command: str


class InUse(ConfigurationError):
    """Another process runs this system. ``holder`` says which, when it could be read."""

    def __init__(self, path: Path, holder: Holder | None) -> None:
        self.holder = holder
        who = f"'leoflow lite {holder.command}' (process {holder.pid})" if holder else "another process"
        super().__init__(f"{path.parent} is in use by {who}; wait for it, or choose another --state-dir")


@contextmanager
def exclusive(path: Path, command: Command) -> Iterator[None]:
    """Hold the lock of a state directory.

    Raises:
        InUse: somebody else holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUse(path, _holder(descriptor)) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "command": command}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> Holder | None:
    try:
        data = json.loads(os.pread(descriptor, 4_096, 0))
        return Holder(int(data["pid"]), str(data["command"]))
    except (ValueError, KeyError, TypeError):
        return None  # it is just writing its name


#: Settings of a deployed system that must not leak from the shell into this one.
_FOREIGN = (
    # What the user's own file says was taken over before.
    "LEOFLOW_ENV_FILE",
    "LEOFLOW_JWT_SECRET_FILE",
    "LEOFLOW_SEAL_KEYS_FILE",
    "LEOFLOW_DATABASE_URL_FILE",
    "LEOFLOW_BROKER_URL_FILE",
    "LEOFLOW_BROKER_RESULT_URL",
    "LEOFLOW_BROKER_KEY_PREFIX",
    "LEOFLOW_DISPATCH_EXECUTOR_TYPE",
    "LEOFLOW_DISPATCH_PERMITTED_EXECUTORS",
    "LEOFLOW_DISPATCH_QUEUE_LIMITS",
    "LEOFLOW_GATEWAY_TLS_CERT",
    "LEOFLOW_GATEWAY_TLS_KEY",
    "LEOFLOW_XCOM_BACKEND",
    "LEOFLOW_XCOM_REDIS_URL",
)
#: Paths of the user's own: relative ones are meant from where the command was given, and our processes start elsewhere.
_PATHS = (
    "LEOFLOW_GATEWAY_SECRET_FILES",
    "LEOFLOW_GATEWAY_VARIABLES_PATH",
    "LEOFLOW_GATEWAY_CONNECTIONS_PATH",
    "LEOFLOW_GATEWAY_SECRETS_PATH",
    "LEOFLOW_LITE_VENVS_ROOT",
    "LEOFLOW_SUBPROCESS_VENVS_ROOT",
    "LEOFLOW_SUBPROCESS_WORK_DIR",
    "LEOFLOW_HEALTH_FILE",
)
#: Each of the URLs has its own rules of quoting, and kombu takes a list of them at ';'.
_NOT_IN_URLS = "?#%;"


@dataclass(frozen=True, slots=True)
class StateDirectory:
    """One system's directory. Nothing is created before ``create``."""

    path: Path

    @classmethod
    def at(cls, path: Path | None) -> StateDirectory:
        """The directory named, or the standard one below the XDG state directory.

        Raises:
            ConfigurationError: its name means something else in the URLs of database, broker and gateway.
        """
        found = (path or state_dir() / "lite").absolute()
        if wrong := next((character for character in _NOT_IN_URLS if character in str(found)), None):
            raise ConfigurationError(
                f"state directory {found}: its path holds {wrong!r}, which has a meaning in URLs; choose another with "
                "--state-dir"
            )
        return cls(found)

    @property
    def redis_directory(self) -> Path:
        return self.path / "redis"

    @property
    def gateway_socket(self) -> Path:
        return self.path / "gateway.sock"

    @property
    def database_path(self) -> Path:
        return self.path / "leoflow.db"

    @property
    def process_logs(self) -> Path:
        """What redis, gateway, worker and beat print."""
        return self.path / "processes"

    @property
    def keys_path(self) -> Path:
        return self.path / "keys.json"

    @property
    def lock_path(self) -> Path:
        return self.path / "lite.lock"

    def create(self) -> None:
        """Make the directory and its keys, readable by their owner only; keep what is there.

        Raises:
            ConfigurationError: the directory cannot be made or written.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self.keys_path.exists():
                from leoflow_celery.security.sealing import fresh_keys  # cryptography takes its time to import

                _create_once(self.keys_path, json.dumps(fresh_keys()))
        except OSError as error:
            raise ConfigurationError(
                f"state directory {self.path}: {error.strerror}; choose another with --state-dir"
            ) from error

    def environment(self) -> dict[str, str]:
        """The settings that make a process part of this system.

        Raises:
            ConfigurationError: there is no such system yet, or its keys cannot be read.
        """
        from leoflow_celery.lite.redis_server import EmbeddedRedis

        address = f"unix:{self.gateway_socket}"
        return {
            **self._keys(),
            "LEOFLOW_BROKER_URL": EmbeddedRedis(self.redis_directory).broker_url,
            "LEOFLOW_DATABASE_URL": f"sqlite:///{self.database_path}",
            "LEOFLOW_EXECUTOR_TYPE": "subprocess",
            "LEOFLOW_GATEWAY_LISTEN": address,
            "LEOFLOW_CONTROL_PLANE_ADDR": address,
            # The channel is a socket in a directory of the user's own.
            "LEOFLOW_GATEWAY_ALLOW_INSECURE_SECRETS": "true",
            "LEOFLOW_LOGS_ROOT": str(self.path / "logs"),
            "LEOFLOW_SUBPROCESS_STATE_DIR": str(self.path / "attempts"),
        }

    def use(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Make this process, and those it starts, part of this system. Settings of the user's own stay."""
        for name in _FOREIGN:
            environ.pop(name, None)
        for name in _PATHS:
            if path := environ.get(name):
                environ[name] = os.path.abspath(path)
        environ.update(self.environment())
        environ.setdefault("LEOFLOW_MAINTENANCE_INTERVAL_SECONDS", "5")

    def _keys(self) -> dict[str, str]:
        try:
            keys: Any = json.loads(self.keys_path.read_text())
            return {name: str(keys[name]) for name in ("LEOFLOW_JWT_SECRET", "LEOFLOW_SEAL_KEYS")}
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"no one-machine system at {self.path}; 'leoflow lite run' or 'leoflow lite up' makes one"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{self.keys_path} cannot be used ({error}); correct it, or choose another --state-dir"
            ) from error


def _create_once(path: Path, content: str) -> None:
    """Write a file whole or not at all, never over another's."""
    descriptor, name = tempfile.mkstemp(dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
        os.link(name, path)
    except FileExistsError:
        return  # another process was first; its keys are the keys
    finally:
        os.unlink(name)
