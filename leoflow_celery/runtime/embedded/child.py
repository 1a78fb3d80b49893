"""One supervised child process: how it is started, asked to stop, killed with its whole group, and read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

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
