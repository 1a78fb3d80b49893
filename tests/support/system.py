"""A whole system of real processes for a test: a database, workers, beat, the gateway, and a client of it."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from cryptography.fernet import Fernet

from leoflow_celery.client import Client
from leoflow_celery.settings import Settings
from tests.support import process
from tests.support.leaks import keep_process, release_process
from tests.support.ports import free_port
from tests.support.postgres_databases import migrate
from tests.support.process import ManagedProcess

ROOT = Path(__file__).parents[2]
_START_SECONDS = 60


class System:
    """One installation, with keys of its own. Nothing runs before ``start_worker`` and its siblings are called.

    ``overrides`` are further LEOFLOW_* variables, named without that prefix.
    """

    def __init__(self, directory: Path, broker_url: str, database_url: str = "", **overrides: object) -> None:
        self.directory = directory
        self.broker_url = broker_url
        self.processes: list[ManagedProcess] = []
        self._kept: list[int] = []
        address = f"127.0.0.1:{free_port()}"
        values: dict[str, object] = {
            "BROKER_URL": broker_url,
            "DATABASE_URL": database_url or f"sqlite:///{directory / 'leoflow.db'}",
            "JWT_SECRET": secrets.token_hex(32),
            "SEAL_KEYS": Fernet.generate_key().decode(),
            "LOGS_ROOT": directory / "logs",
            "GATEWAY_LISTEN": address,
            "GATEWAY_SHUTDOWN_GRACE_SECONDS": 1,
            "CONTROL_PLANE_ADDR": address,
            "AGENT_INSECURE": "true",
            "AGENT_HEARTBEAT_SECONDS": 1,
            "EXECUTOR_TYPE": "subprocess",
            "DISPATCH_PERMITTED_EXECUTORS": "kubernetes,docker,subprocess,inline",
            "SUBPROCESS_STATE_DIR": directory / "attempts",
            **overrides,
        }
        self.env = {f"LEOFLOW_{name}": str(value) for name, value in values.items()}
        self.settings = self.load_settings()
        migrate(self.env["LEOFLOW_DATABASE_URL"])

    def load_settings(self, **overrides: object) -> Settings:
        """The settings of a process of this system, with some variables set otherwise."""
        with environment({**self.env, **{f"LEOFLOW_{name}": str(value) for name, value in overrides.items()}}):
            return Settings.load()

    # -- processes ----------------------------------------------------------------------------------------------

    def start(self, name: str, *command: str | Path, env: Mapping[str, str] | None = None) -> ManagedProcess:
        """Start a process of the system; its output is ``<directory>/<name>.out``."""
        started = ManagedProcess(
            command, self.directory / f"{name}.out", env={**self.env, **(env or {})}, cwd=ROOT, name=name
        )
        self.processes.append(started)
        return started

    def start_workers(self, *modules: str, options: Mapping[str, tuple[str, ...]] | None = None) -> None:
        """Start several workers beside each other, and wait until all of them take tasks."""
        started = [self._spawn_worker(module, module, *(options or {}).get(module, ())) for module in modules]
        for worker in started:
            wait_for_worker(worker)

    def start_worker(
        self, module: str, *options: str, name: str = "", env: Mapping[str, str] | None = None
    ) -> ManagedProcess:
        """A Celery worker that takes tasks when this returns."""
        worker = self._spawn_worker(module, name or module, *options, env=env)
        wait_for_worker(worker)
        return worker

    def _spawn_worker(
        self, module: str, name: str, *options: str, env: Mapping[str, str] | None = None
    ) -> ManagedProcess:
        command = (sys.executable, "-m", "celery", "-A", module, "worker", "-l", "INFO", "-n", f"{name}@%h")
        return self.start(name, *command, *options, env=env)

    def start_beat(self, name: str = "beat", env: Mapping[str, str] | None = None) -> ManagedProcess:
        """Beat, which has sent nothing yet but will."""
        schedule = self.directory / f"{name}.schedule"
        command = (sys.executable, "-m", "celery", "-A", "beat_schedule", "beat", "-l", "INFO", "-s", str(schedule))
        beat = self.start(name, *command, "--pidfile=", env=env)
        beat.wait_for_line("beat: Starting", _START_SECONDS)
        return beat

    def start_gateway(self) -> ManagedProcess:
        """The gateway, listening when this returns."""
        gateway = self.start("gateway", sys.executable, "-m", "leoflow_celery.cli", "gateway")
        gateway.wait_for_line("gateway listening on", _START_SECONDS)
        return gateway

    def process(self, name: str) -> ManagedProcess:
        """The one started under this name, the newest of several."""
        return next(one for one in reversed(self.processes) if one.name == name)

    def restart(self, name: str) -> ManagedProcess:
        """Start an ended process again; it may outlive the running test, as the system does."""
        process = self.process(name)
        process.restart()
        keep_process(process.pid)
        self._kept.append(process.pid)
        return process

    # -- looking and asking -------------------------------------------------------------------------------------

    @cached_property
    def client(self) -> Client:
        return Client(self.settings)

    @cached_property
    def redis(self) -> redis.Redis[bytes]:
        """The broker, for a look at its keys."""
        return redis.Redis.from_url(self.broker_url)

    def maintain(self, name: str) -> None:
        """Send a maintenance task, as beat would."""
        self.client.app.send_task(f"leoflow.maintenance.{name}", queue="maintenance", ignore_result=True)

    def output(self) -> str:
        """What all processes printed so far."""
        return "".join(one.output() for one in self.processes)

    def shown_on_failure(self) -> None:
        """Tell the report of the running test about processes that an earlier one started."""
        process.started_in_this_test.extend(
            one for one in self.processes if one not in process.started_in_this_test and one.returncode is None
        )

    # -- the end ------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End all processes, all at once, and the client."""
        for one in self.processes:
            one.ask_to_stop()
        for one in self.processes:
            one.stop(20)
        for pid in self._kept:
            release_process(pid)
        if "client" in self.__dict__:
            self.client.close()
        if "redis" in self.__dict__:
            self.redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def wait_for_worker(worker: ManagedProcess) -> None:
    """Until a worker takes tasks (again): it says so each time it has connected."""
    worker.wait_for_line(r"@\S+ ready\.", _START_SECONDS)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """These variables in our own environment, inside the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def http_task(url: str, task_instance_id: str = "", method: str = "GET", **fields: Any) -> dict[str, Any]:
    """A request for an http_api task; ``headers``, ``body`` and the like of the call go in ``http``."""
    identity = task_instance_id or secrets.token_hex(8)
    call = {"method": method, "url": url, **fields.pop("http", {})}
    return {
        "task_instance_id": identity,
        "dag_id": "d",
        "run_id": "r",
        "task_id": f"t-{identity}",
        "operator": "http_api",
        "http_request": call,
        **fields,
    }
