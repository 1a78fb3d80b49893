"""A process under test: started with an environment, read through a file, waited for, terminated, killed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import pytest

from tests.support.ports import is_listening
from tests.support.waiting import PATIENCE, wait_until

#: Everything started in the running test, so that its output can be shown when the test fails.
started_in_this_test: list[ManagedProcess] = []


class ManagedProcess:
    """A command in a session of its own. ``env`` is added to ours; output (both streams) goes to ``log_path``.

    Use it as a context manager, or call ``stop``; its output is shown when the test fails.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log_path: Path,
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        name: str = "",
    ) -> None:
        self.command = [str(part) for part in command]
        self.name = name or Path(self.command[0]).name
        self.log_path, self.cwd = log_path, cwd
        merged = {**os.environ, **(env or {})}
        self.env = {key: value for key, value in merged.items() if value is not None}
        self._process = self._spawn()
        started_in_this_test.append(self)

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                ending_with_us(self.command, signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=self.cwd,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def output(self) -> str:
        """All it printed so far."""
        return self.log_path.read_text(errors="replace")

    def wait_for_line(self, pattern: str, timeout: float = 20.0) -> re.Match[str]:
        """The first match of a regular expression in its output; fails at once when it ended without one."""

        def found() -> re.Match[str] | None:
            ended = self.returncode
            match = re.search(pattern, self.output(), re.MULTILINE)
            if match is None and ended is not None:
                raise AssertionError(f"{self.name} ended with {ended} and never printed {pattern!r}:\n{self.output()}")
            return match

        match = wait_until(found, timeout, lambda: f"{pattern!r} in the output of {self.name}:\n{self.output()}")
        assert match is not None
        return match

    def wait_for_port(self, port: int, timeout: float = 20.0) -> None:
        """Until somebody listens on it; fails at once when the process ended."""

        def listening() -> bool:
            if self.returncode is not None:
                raise AssertionError(f"{self.name} ended with {self.returncode}:\n{self.output()}")
            return is_listening(port)

        wait_until(listening, timeout, lambda: f"{self.name} on port {port}:\n{self.output()}")

    def wait(self, timeout: float = 30.0) -> int:
        """Its exit code (negative: the signal)."""
        try:
            return self._process.wait(timeout * PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{self.name} still runs after {timeout * PATIENCE:g} s:\n{self.output()}") from error

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def terminate(self, timeout: float = 30.0) -> int:
        """SIGTERM, and its exit code."""
        self._process.terminate()
        return self.wait(timeout)

    def kill(self) -> None:
        """kill -9 to it alone, as the kernel's OOM killer would; what it started lives on."""
        self._process.kill()
        self._process.wait()

    def kill_group(self) -> None:
        """kill -9 to it and all of its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def restart(self) -> None:
        """The same command again, after it ended."""
        assert self.returncode is not None, f"{self.name} still runs"
        self._process = self._spawn()

    def ask_to_stop(self) -> None:
        """SIGTERM when it still runs; ``stop`` waits."""
        if self.returncode is None:
            self._process.terminate()

    def stop(self, timeout: float = 10.0) -> None:
        """SIGTERM when it still runs, kill -9 to its group when that was not enough. Never fails."""
        if self.returncode is None:
            self.ask_to_stop()
            try:
                self._process.wait(timeout * PATIENCE)
            except subprocess.TimeoutExpired:
                self.kill_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def sections() -> list[tuple[str, str]]:
    """What the processes of the running test printed, for its report. A hook calls this: it raises nothing."""
    found = []
    for one in started_in_this_test:
        try:
            output = one.output()[-8_000:]
        except Exception as error:  # its directory is gone, say; a hook that raises ends the whole run
            output = f"cannot be shown: {error!r}"
        found.append((f"output of {one.name} (pid {one.pid})", output))
    return found


def process_ended(pid: int) -> bool:
    """Whether a process that need not be our child is gone, or a zombie nobody waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def ending_with_us(command: Sequence[str | Path], number: signal.Signals) -> list[str | Path]:
    """The command, ended by the kernel when this process is killed; the plain command where setpriv is missing.

    Also the plain one on any thread but the main one: the kernel's parent is a thread, and that one may end soon.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None or threading.current_thread() is not threading.main_thread():
        return list(command)
    return [setpriv, "--pdeathsig", number.name.removeprefix("SIG"), "--", *command]


def end_tests_on_sigterm() -> None:
    """Let a SIGTERM to the test run (make, a CI's time limit) end it as Ctrl-C does: fixtures stop their servers."""
    us = os.getpid()

    def end(number: int, _frame: FrameType | None) -> None:
        if os.getpid() == us:
            pytest.exit("ended by SIGTERM", returncode=128 + number)
        signal.signal(number, signal.SIG_DFL)  # a fork of ours that has not become anything else yet
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end)
