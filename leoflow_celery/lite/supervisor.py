"""Starts child processes in order, keeps them running, and stops them in the reverse order.

::

    with Supervisor([redis, gateway, worker], log_dir) as supervisor:
        ...                      # all are ready; one that dies is started again

A child is killed with its whole group. Children never outlive their supervisor, not even when that is killed with
``kill -9``: the kernel ends them (see ``guard``). All of them are started on one thread that lives until the last of
them ended, because the kernel sends a child's parent-death signal when the *thread* that started it ends.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from leoflow_celery.errors import LeoflowError
from leoflow_celery.lite import guard

_TAIL_BYTES = 8_192


def always_ready() -> bool:
    """The readiness of a child that has none to check."""
    return True


@dataclass(frozen=True, slots=True)
class Child:
    """What to run under a name.

    ``env`` replaces the environment (None inherits it). ``ready`` is asked until it is true, at most
    ``ready_timeout_seconds``. SIGTERM, then after ``stop_timeout_seconds`` SIGKILL, ends it; a Celery worker needs a
    long one, it finishes its tasks first. ``parent_death_signal`` is what the kernel sends when the supervisor is gone:
    SIGKILL for what keeps nothing, SIGTERM for what wants to save.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] | None = None
    work_dir: Path | None = None
    ready: Callable[[], bool] = always_ready
    ready_timeout_seconds: float = 30.0
    stop_timeout_seconds: float = 10.0
    parent_death_signal: signal.Signals = signal.SIGKILL


class ChildProcess:
    """A started child. The thread that starts it has to outlive it: the kernel's parent is a thread, not a process."""

    def __init__(self, spec: Child, log_path: Path) -> None:
        self.spec = spec
        self.log_path = log_path
        self.started_at = time.monotonic()
        guarded = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(int(spec.parent_death_signal))]
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*guarded, *spec.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(spec.env) if spec.env is not None else None,
                cwd=spec.work_dir,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_status(self) -> int | None:
        """None while it runs; once it ended, its exit code (negative: the signal). What it left running is killed."""
        if self._process.returncode is None:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return None
            # Still a zombie, so its number cannot be somebody else's group yet.
            self._signal_group(signal.SIGKILL)
            self._process.wait()
        return self._process.returncode

    def terminate(self) -> None:
        """Ask it, and it alone, to stop: how its own children end is its business."""
        if self.exit_status() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it and its whole group, and wait for it."""
        if self.exit_status() is None:
            self._signal_group(signal.SIGKILL)
            self._process.wait()

    def _signal_group(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # the group is empty, or all zombies
            return

    def describe_exit(self) -> str:
        """How it ended, in words."""
        status = self.exit_status()
        if status is None:
            return "still runs"
        if status >= 0:
            return f"exited with code {status}"
        return f"was killed by {signal.Signals(-status).name}"

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of its log."""
        return tail(self.log_path, lines)


def tail(path: Path, lines: int) -> str:
    """The last lines of a file, of its last 8 KiB at most; empty when there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05


class ChildFailed(LeoflowError):
    """A child could not be started. ``name``, ``log_path`` and ``log_tail`` (its last lines) say which and why."""

    def __init__(self, name: str, problem: str, log_path: Path, log_tail: str) -> None:
        super().__init__(name, problem, log_path, log_tail)
        self.name, self.problem, self.log_path, self.log_tail = name, problem, log_path, log_tail

    def __str__(self) -> str:
        said = f"its last lines in {self.log_path}:\n{self.log_tail}" if self.log_tail else "it printed nothing"
        return f"{self.name} {self.problem}; {said}"


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The delay doubles from ``backoff_seconds`` to ``max_backoff_seconds``.

    A child that ran for ``forget_after_seconds`` starts from the beginning again.
    """

    backoff_seconds: float = 0.5
    max_backoff_seconds: float = 30.0
    forget_after_seconds: float = 60.0

    def delay_seconds(self, failures: int) -> float:
        """How long to wait after the ``failures``-th failure in a row."""
        return min(self.backoff_seconds * 2.0 ** min(failures - 1, 30), self.max_backoff_seconds)


@dataclass(frozen=True, slots=True)
class ChildStatus:
    """A child as it stands: ``pid`` is None while it waits to be started again."""

    name: str
    pid: int | None
    restarts: int
    last_exit: str = ""


class _Slot:
    """One child over all its processes."""

    def __init__(self, spec: Child, log_path: Path) -> None:
        self.spec, self.log_path = spec, log_path
        self.process: ChildProcess | None = None
        self.restarts = 0
        self.failures_in_a_row = 0
        self.restart_at = 0.0
        self.last_exit = ""

    def spawn(self) -> None:
        self.process = ChildProcess(self.spec, self.log_path)

    def status(self) -> ChildStatus:
        process = self.process
        return ChildStatus(self.spec.name, process.pid if process else None, self.restarts, self.last_exit)


class Supervisor:
    """A context manager over child processes.

    Each writes to ``<log_dir>/<name>.log``; the log of the previous run is kept beside it as ``<name>.log.1``.
    """

    def __init__(self, children: Sequence[Child], log_dir: Path, policy: RestartPolicy | None = None) -> None:
        self._log_dir = log_dir
        self._policy = policy or RestartPolicy()
        self._slots = [_Slot(child, log_dir / f"{child.name}.log") for child in children]
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="supervisor")

    def start(self) -> None:
        """Start every child in order, each when the one before it is ready.

        Raises:
            ChildFailed: one ended, or was not ready in its time. Those started before it are stopped again.
        """
        self._log_dir.mkdir(parents=True, exist_ok=True)
        for slot in self._slots:
            if slot.log_path.exists():
                slot.log_path.replace(slot.log_path.with_suffix(".log.1"))
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop every child in the reverse order, SIGTERM first, and return when all ended."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def kill(self) -> None:
        """Like ``stop``, without grace: for the second Ctrl-C."""
        self._hurry.set()
        self.stop()

    def statuses(self) -> list[ChildStatus]:
        """All children, in their order."""
        return [slot.status() for slot in self._slots]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # The owner thread: everything below runs on it.

    def _run(self) -> None:
        try:
            for slot in self._slots:
                self._start_first(slot)
        except Exception as error:  # noqa: BLE001 - raised again in start()
            self._stop_all()
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        while not self._stop.wait(_POLL_SECONDS):
            for slot in self._slots:
                self._keep_running(slot)
        self._stop_all()

    def _start_first(self, slot: _Slot) -> None:
        if self._stop.is_set():
            return
        slot.spawn()
        if not self._wait(slot, slot.spec.ready, slot.spec.ready_timeout_seconds):
            raise self._failed(slot, f"is not ready after {slot.spec.ready_timeout_seconds:g} s")

    def _wait(self, slot: _Slot, ready: Callable[[], bool], timeout_seconds: float) -> bool:
        """True when it is ready (or a stop was asked for, which needs no readiness any more), False when time is up."""
        process = slot.process
        deadline = time.monotonic() + timeout_seconds
        while process is not None and not self._stop.is_set():
            if process.exit_status() is not None:
                raise self._failed(slot, f"{process.describe_exit()} before it was ready")
            if ready():
                return True
            if time.monotonic() > deadline:
                return False
            self._stop.wait(_POLL_SECONDS)
        return True

    def _failed(self, slot: _Slot, problem: str) -> ChildFailed:
        log_tail = slot.process.log_tail() if slot.process else ""
        return ChildFailed(slot.spec.name, problem, slot.log_path, log_tail)

    def _keep_running(self, slot: _Slot) -> None:
        if slot.process is not None and slot.process.exit_status() is not None:
            self._note_exit(slot, slot.process)
        elif slot.process is None and time.monotonic() >= slot.restart_at:
            self._restart(slot)

    def _restart(self, slot: _Slot) -> None:
        try:
            slot.spawn()
        except OSError as error:  # no processes or no disk left: this thread has to live on, or the others die with it
            slot.failures_in_a_row += 1
            slot.restart_at = time.monotonic() + self._policy.delay_seconds(slot.failures_in_a_row)
            slot.last_exit = f"could not be started: {error}"
            logger.exception("%s could not be started", slot.spec.name, extra={"event": "child_not_started"})
            return
        slot.restarts += 1
        logger.warning(
            "%s was started again", slot.spec.name, extra={"event": "child_restarted", "child": slot.spec.name}
        )

    def _note_exit(self, slot: _Slot, process: ChildProcess) -> None:
        lived = time.monotonic() - process.started_at
        slot.failures_in_a_row = 1 if lived > self._policy.forget_after_seconds else slot.failures_in_a_row + 1
        delay = self._policy.delay_seconds(slot.failures_in_a_row)
        slot.last_exit, slot.process, slot.restart_at = process.describe_exit(), None, time.monotonic() + delay
        logger.error(
            "%s %s; starting it again in %g s; its last lines in %s:\n%s",
            slot.spec.name,
            slot.last_exit,
            delay,
            slot.log_path,
            process.log_tail(),
            extra={"event": "child_exited", "child": slot.spec.name},
        )

    def _stop_all(self) -> None:
        for slot in reversed(self._slots):
            if slot.process is not None:
                self._stop_one(slot.process)
                slot.last_exit, slot.process = slot.process.describe_exit(), None

    def _stop_one(self, process: ChildProcess) -> None:
        deadline = time.monotonic() + process.spec.stop_timeout_seconds
        process.terminate()
        while process.exit_status() is None and time.monotonic() < deadline and not self._hurry.is_set():
            self._hurry.wait(_POLL_SECONDS)
        if process.exit_status() is None:
            logger.warning(
                "%s did not stop in its time and is killed",
                process.spec.name,
                extra={"event": "child_killed", "child": process.spec.name},
            )
            process.kill()
