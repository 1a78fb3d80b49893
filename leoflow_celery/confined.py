"""Work that a stranger chose the size of, in child processes that the kernel ends when it costs too much."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO

from leoflow_celery.errors import LeoflowError, Unavailable

#: Address space of a child. The engine itself takes a fifth of it.
MEMORY_BYTES = 1 << 30
#: A child that had no processor for so long is given up, without a verdict, and so is the wait for a free one.
PATIENCE_SECONDS = 60.0
_HEADER = struct.Struct("!dI")
_LENGTH = struct.Struct("!I")


class TooCostly(LeoflowError):
    """A question took more processor time or memory than it may, or ended the process that was asked."""


class Confined:
    """Asks ``python -m module``, which calls ``serve``. Thread-safe; each child answers one question at a time.

    Children start with the first question and stay. They have nothing of our environment, no open file of ours, a low
    priority, and end when we do.
    """

    def __init__(self, module: str, processes: int) -> None:
        self._module = module
        self._free = threading.BoundedSemaphore(processes)
        self._idle: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def ask(self, question: bytes, cpu_seconds: float) -> bytes:
        """The answer to a question that may take so many seconds of processor time.

        Raises:
            TooCostly: it took more.
            Unavailable: no child is free, none can be started, or it had no processor for a minute.
        """
        if not self._free.acquire(timeout=PATIENCE_SECONDS):
            raise Unavailable("every process that checks values is busy; try again")
        try:
            child = self._taken()
            try:
                answer = _exchange(child, _HEADER.pack(cpu_seconds, len(question)) + question)
            except BaseException:
                _end(child)
                raise
            with self._lock:
                self._idle.append(child)
            return answer
        finally:
            self._free.release()

    def _taken(self) -> subprocess.Popen[bytes]:
        with self._lock:
            while self._idle:
                child = self._idle.pop()
                if child.poll() is None:
                    return child
                _end(child)
        try:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                cwd="/",
                start_new_session=True,  # Ctrl-C at the terminal is meant for us
            )
        except OSError as error:
            raise Unavailable(f"no process can be started to check values: {error.strerror}") from error

    def close(self) -> None:
        """End the children that are idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for child in idle:
            _end(child)


def _exchange(child: subprocess.Popen[bytes], question: bytes) -> bytes:
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        assert child.stdin is not None and child.stdout is not None  # noqa: S101, PT018 - for mypy: both are pipes
        child.stdin.write(question)
        child.stdin.flush()
        (size,) = _LENGTH.unpack(_read(child.stdout, _LENGTH.size, deadline))
        return _read(child.stdout, size, deadline)
    except (BrokenPipeError, EOFError) as error:
        raise TooCostly("it took more time or memory than it may") from error


def _read(pipe: IO[bytes], size: int, deadline: float) -> bytes:
    descriptor, found = pipe.fileno(), b""
    while len(found) < size:
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN | select.POLLHUP)
        if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
            # It would have been ended by now if it had had a processor: that says nothing about what was asked.
            raise Unavailable(f"a process that checks values had no processor for {PATIENCE_SECONDS:g} s; try again")
        part = os.read(descriptor, size - len(found))
        if not part:
            raise EOFError
        found += part
    return found


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    child.wait()


# -- in the child ------------------------------------------------------------------------------------------------------


def serve(answer: Callable[[bytes], bytes]) -> None:
    """Answer questions until whoever asks is gone. SIGPROF ends the process in one that costs too much."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(10)  # behind the event loop, and not so far that a busy host stops it for seconds
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(header := questions.read(_HEADER.size)) == _HEADER.size:
        cpu_seconds, size = _HEADER.unpack(header)
        question = questions.read(size)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        found = answer(question)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(_LENGTH.pack(len(found)) + found)
        answers.flush()
