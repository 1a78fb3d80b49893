"""The processes of a one-machine system and the order in which they start."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from leoflow_celery.errors import ConfigurationError
from leoflow_celery.lite.redis_server import EmbeddedRedis
from leoflow_celery.lite.state import Command, StateDirectory, exclusive
from leoflow_celery.lite.supervisor import Child, ChildFailed, Supervisor


@contextmanager
def running(state: StateDirectory, command: Command, say: Callable[[str], None]) -> Iterator[Supervisor]:
    """The whole system, up and ready; stopped at the end. A second Ctrl-C while it stops ends it at once.

    ``say`` gets what a person at the terminal should know.

    Raises:
        InUse: another process runs the system of this directory.
        ConfigurationError: the directory cannot be used, there is no broker to start, or a process does not start (its
            last lines are printed).
    """
    state.create()
    with exclusive(state.lock_path, command):
        os.environ.setdefault("LEOFLOW_SUBPROCESS_WORK_DIR", os.getcwd())
        state.use()
        say(f"starting broker, worker, beat and gateway in {state.path}")
        redis = EmbeddedRedis(state.redis_directory)
        redis.prepare()
        upgrade_database()
        supervisor = Supervisor(children(state, redis), state.process_logs)
        try:
            _start(supervisor, say)
            yield supervisor
        finally:
            try:
                supervisor.stop()
            except BaseException:
                supervisor.kill()
                raise


def _start(supervisor: Supervisor, say: Callable[[str], None]) -> None:
    try:
        supervisor.start()
    except ChildFailed as error:
        say(error.log_tail)
        raise ConfigurationError(
            f"{error.name} {error.problem}; {error.log_path} has its output (above: the end)"
        ) from error


def children(state: StateDirectory, redis: EmbeddedRedis) -> list[Child]:
    """Broker, worker, beat and gateway. The gateway comes last: the others need no waiting for, and start meanwhile."""
    # Not the user's directory: "-m" imports from there, and a module of the user's could be taken for one of ours.
    home = state.path
    celery = (sys.executable, "-m", "celery")
    worker = ("worker", "--hostname", "lite@%h", "--loglevel", "INFO", "--without-gossip", "--without-mingle")
    beat = ("beat", "--scheduler", "celery.beat:Scheduler", "--pidfile", "", "--loglevel", "INFO")
    return [
        Child(
            "redis",
            tuple(redis.command()),
            work_dir=home,
            ready=redis.is_ready,
            parent_death_signal=signal.SIGTERM,  # it saves what it holds
        ),
        Child("worker", (*celery, "-A", "leoflow_celery.workers.lite", *worker), work_dir=home),
        Child("beat", (*celery, "-A", "leoflow_celery.beat_schedule", *beat), work_dir=home),
        Child(
            "gateway",
            (sys.executable, "-m", "leoflow_celery.cli", "gateway"),
            work_dir=home,
            ready=lambda: _is_listening(state.gateway_socket),
        ),
    ]


def upgrade_database() -> None:
    """Create or upgrade the tables of the database that the environment names."""
    from leoflow_celery.settings import Settings
    from leoflow_celery.store.database import Database
    from leoflow_celery.store.migrate import upgrade

    database = Database(Settings.load().database)
    try:
        upgrade(database)
    finally:
        database.close()


def _is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0
