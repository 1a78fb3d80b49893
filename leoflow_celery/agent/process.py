"""The user process: its own session, its output, its end and the end of everything it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from typing import IO

from leoflow_celery.agent import linux
from leoflow_celery.agent.output import LineSplitter

#: How long something that outlived the user process may go on writing before it is killed.
DRAIN_SECONDS = 2.0
_MAX_DRAIN_SECONDS = 60.0
#: How long to wait for a process that even SIGKILL does not end (it hangs in the kernel).
_UNKILLABLE_SECONDS = 10.0
_THROTTLE_SECONDS = 0.05
#: A line that has begun (a prompt, dots of progress) is shown when nothing was added to it for so long.
PARTIAL_LINE_SECONDS = 2.0

Sink = Callable[[str], None]


class UserProcess:
    """A running command. Create and use it in the event loop's thread, which must be the main one (signals)."""

    def __init__(self, argv: list[str], env: Mapping[str, str], stdin: bytes = b"") -> None:
        """Start it; ``stdin`` is what it reads. Raises OSError when it cannot be executed."""
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self._loop.create_future()
        self._pipes: list[_Pipe] = []
        self._popen = subprocess.Popen(
            argv,
            # A pipe, not a file: what was read cannot be read again, by whatever the process starts.
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
        linux.offer_children_to_oom_kill()
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)
        self._reap()  # it may have ended before the handler was there
        self._stdin = stdin

    async def read_output(self, stdout: Sink, stderr: Sink, throttled: Callable[[], bool]) -> None:
        """Send every line to its sink; stop reading for a while whenever ``throttled`` says so. Give it its input."""
        if self._popen.stdin is not None:
            writer, _ = await self._loop.connect_write_pipe(asyncio.BaseProtocol, self._popen.stdin)
            writer.write(self._stdin)
            writer.write_eof()  # closed once it was read; a process that does not read it is no error
            self._stdin = b""
        for pipe, sink in ((self._popen.stdout, stdout), (self._popen.stderr, stderr)):
            self._pipes.append(await _Pipe.connect(pipe, sink, throttled))

    def signal(self, number: int) -> None:
        """Signal the whole process group."""
        if not self.exited.done():
            linux.signal_group(self._popen.pid, number)

    async def terminate(self, grace_seconds: float) -> None:
        """SIGTERM to the group, then SIGKILL after the grace."""
        self.signal(signal.SIGTERM)
        await asyncio.wait({self.exited}, timeout=grace_seconds)
        if not self.exited.done():
            self.signal(signal.SIGKILL)
            await asyncio.wait({self.exited}, timeout=_UNKILLABLE_SECONDS)

    async def finish(self) -> None:
        """After the end: read what is left, then kill what is left. Nothing that holds the pipe open can hang us."""
        await self._drain()
        self._loop.remove_signal_handler(signal.SIGCHLD)
        # By process id, not by group: descendants are our children by now, so their ids cannot be anybody else's.
        linux.kill_descendants()
        await self._drain()
        for pipe in self._pipes:
            pipe.close()

    async def _drain(self) -> None:
        """Read to the end of the output, at most ``DRAIN_SECONDS``, or longer while it is we who are slow."""
        deadline = self._loop.time() + _MAX_DRAIN_SECONDS
        pending = {pipe.ended for pipe in self._pipes if not pipe.ended.done()}
        while pending:
            _, pending = await asyncio.wait(pending, timeout=DRAIN_SECONDS)
            if not any(pipe.paused for pipe in self._pipes) or self._loop.time() > deadline:
                return

    @property
    def exit_code(self) -> int:
        """The exit code, negative for a signal (as ``subprocess`` has it)."""
        return self.exited.result() if self.exited.done() else -signal.SIGKILL

    def _reap(self) -> None:
        """Collect every child that ended: ours, and orphans that we adopted or that PID 1 must reap."""
        with contextlib.suppress(ChildProcessError):
            self._reap_all()

    def _reap_all(self) -> None:
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            pid, status = ended
            if pid == self._popen.pid:
                self._popen.returncode = os.waitstatus_to_exitcode(status)
                self.exited.set_result(self._popen.returncode)


class _Pipe(asyncio.Protocol):
    """One output of the process."""

    def __init__(self, sink: Sink, throttled: Callable[[], bool]) -> None:
        self._loop = asyncio.get_running_loop()
        self._sink, self._throttled = sink, throttled
        self._splitter = LineSplitter()
        self._transport: asyncio.ReadTransport | None = None
        # Kept here: pipes' is_reading() does not work in Python 3.11.2, Debian 12's.
        self._is_paused = False
        self._flush_timer: asyncio.TimerHandle | None = None
        self.ended: asyncio.Future[None] = self._loop.create_future()

    @classmethod
    async def connect(cls, pipe: IO[bytes] | None, sink: Sink, throttled: Callable[[], bool]) -> _Pipe:
        transport, protocol = await asyncio.get_running_loop().connect_read_pipe(lambda: cls(sink, throttled), pipe)
        protocol._transport = transport
        return protocol

    def data_received(self, data: bytes) -> None:
        for line in self._splitter.feed(data):
            self._sink(line)
        self._stop_waiting_for_the_line()
        if self._throttled() and self._transport is not None:
            self._transport.pause_reading()
            self._is_paused = True
            self._loop.call_later(_THROTTLE_SECONDS, self._resume)
        else:
            self._wait_for_the_line()

    def _wait_for_the_line(self) -> None:
        if self._splitter.pending:
            self._flush_timer = self._loop.call_later(PARTIAL_LINE_SECONDS, self._flush)

    def _stop_waiting_for_the_line(self) -> None:
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None

    def _flush(self) -> None:
        for line in self._splitter.flush():
            self._sink(line)

    def _resume(self) -> None:
        if self._transport is None or not self.paused:
            return
        if self._throttled():
            self._loop.call_later(_THROTTLE_SECONDS, self._resume)
        else:
            self._is_paused = False
            self._transport.resume_reading()
            # Only from now: while reading waited, the rest of the line could not come.
            self._wait_for_the_line()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._stop_waiting_for_the_line()
        if not self.ended.done():
            for line in self._splitter.end():
                self._sink(line)
            self.ended.set_result(None)

    @property
    def paused(self) -> bool:
        """Whether reading waits for the control plane."""
        return self._is_paused and self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self.connection_lost(None)
