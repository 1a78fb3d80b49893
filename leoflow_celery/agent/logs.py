"""Lines on their way to the control plane: numbered once, kept on disk until acknowledged, sent again after a break."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import tempfile
import time
from array import array
from collections.abc import Callable

from leoflow_celery.agent.client import CallRefused, ControlPlane, LogStream
from leoflow_celery.agent.deadline import Deadline
from leoflow_celery.errors import ClaimRefused, GatewayUnavailable, InvalidToken, LeoflowError
from leoflow_celery.protocol import agent_pb2 as pb

log = logging.getLogger(__name__)

#: Where no directory can be written, the spool is memory; it must stay small then.
_MAX_MEMORY_BYTES = 4 * 1024 * 1024
_COMPACT_AFTER = 8_192


class Spool:
    """A ring of records in an unlinked file: at most ``capacity`` bytes that nobody acknowledged yet.

    What a full disk does not take is kept in memory, up to 4 MiB.
    Records are numbered from 1 without gaps. The index costs eight bytes of memory per record.
    """

    def __init__(self, capacity: int) -> None:
        self._file, self._capacity = _open(capacity)
        #: Where each record starts, counted from the beginning of time; the last entry is where the next one will.
        self._starts = array("Q", [0])
        self._skipped = 0
        self._in_memory: dict[int, bytes] = {}
        self._memory_bytes = 0
        self.first = 1
        self.next = 1

    @property
    def used_bytes(self) -> int:
        return self._start(self.next) - self._start(self.first)

    @property
    def fill(self) -> float:
        """How full it is, 0 to 1."""
        return self.used_bytes / self._capacity

    def append(self, record: bytes) -> bool:
        """Keep a record; False when there is no room for it (on the disk or in memory)."""
        if self.used_bytes + len(record) > self._capacity:
            return False
        start = self._start(self.next)
        if not self._write(start % self._capacity, record):
            if self._memory_bytes + len(record) > _MAX_MEMORY_BYTES:
                return False
            self._in_memory[self.next] = record
            self._memory_bytes += len(record)
        self._starts.append(start + len(record))
        self.next += 1
        return True

    def read(self, number: int) -> bytes:
        """One record that is kept."""
        if number in self._in_memory:
            return self._in_memory[number]
        start, end = self._start(number), self._start(number + 1)
        offset, length = start % self._capacity, end - start
        head = os.pread(self._file, min(length, self._capacity - offset), offset)
        return head if len(head) == length else head + os.pread(self._file, length - len(head), 0)

    def release(self, through: int) -> None:
        """Forget the records up to and including this one."""
        self.first = max(self.first, min(through + 1, self.next))
        for number in [number for number in self._in_memory if number < self.first]:
            self._memory_bytes -= len(self._in_memory.pop(number))
        skipped = self.first - 1 - self._skipped
        if skipped > _COMPACT_AFTER and skipped > len(self._starts) // 2:
            del self._starts[:skipped]
            self._skipped += skipped

    def close(self) -> None:
        os.close(self._file)

    def _start(self, number: int) -> int:
        return self._starts[number - 1 - self._skipped]

    def _write(self, offset: int, record: bytes) -> bool:
        room = self._capacity - offset
        try:
            written = os.pwrite(self._file, record[:room], offset)
            if len(record) > room:
                written += os.pwrite(self._file, record[room:], 0)
        except OSError:
            return False
        return written == len(record)


def _open(capacity: int) -> tuple[int, int]:
    """A nameless file and the capacity it is good for."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="leoflow-spool-")
        os.unlink(path)
    except OSError:
        return os.memfd_create("leoflow-spool"), min(capacity, _MAX_MEMORY_BYTES)
    return descriptor, capacity


AGENT_STREAM = "agent"
_FIRST_BACKOFF_SECONDS, _MAX_BACKOFF_SECONDS = 0.1, 2.0
#: A control plane that acknowledged something this recently is slow rather than away.
_ALIVE_SECONDS = 5.0
#: How long lines are offered to one that answers everything else.
_DENIED_SECONDS = 5.0
#: How often deadline is looked at: a request to stop shortens it.
_LOOK_SECONDS = 0.5
_CROWDED = 0.75


class LogShipper:
    """Takes lines at any speed, delivers them in order.

    While the control plane is slow, ``throttled`` asks the producers to wait. While it is away, the spool fills, then
    lines are dropped; one line says how many as soon as there is room for it.
    """

    def __init__(self, plane: ControlPlane, spool: Spool, on_break: Callable[[], None]) -> None:
        """``on_break`` is called whenever a stream ends that should not: the claim may be gone."""
        self._plane, self._spool, self._on_break = plane, spool, on_break
        self._wake = asyncio.Event()
        self._cursor = 1
        self._dropped = 0
        self._closing = False
        self._refused = False
        self._last_ack = time.monotonic()
        self._last_break = 0.0
        #: Since when streams break although the control plane answers other calls in between; None: they do not.
        self._denied_since: float | None = None

    def add(self, stream: str, text: str, level: int = pb.LOG_LEVEL_INFO) -> None:
        """Take a line. Never blocks."""
        if self._refused:
            return
        if self._dropped:
            self._announce_dropped()
        if self._dropped or not self._append(stream, text, level):
            self._dropped += 1
        self._wake.set()

    def throttled(self) -> bool:
        """Whether producers should wait: much is spooled and the control plane is working on it."""
        alive = time.monotonic() - self._last_ack < _ALIVE_SECONDS
        return alive and not self._refused and self._spool.fill > _CROWDED

    async def run(self) -> None:
        """Deliver until everything is acknowledged after ``drain`` was called."""
        backoff = _FIRST_BACKOFF_SECONDS
        while not (self._closing and self._all_acknowledged()):
            before = self._spool.first
            try:
                await self._stream_once()
                if self._spool.first > before:
                    continue
            except (InvalidToken, ClaimRefused, CallRefused) as error:
                log.warning("log stream refused, going on without: %s", error)
                self._refused = True
                return
            except LeoflowError as error:
                log.debug("log stream broke: %s", error)
                # A status may get lost when a write races with the server's end of the stream, so any end counts.
                self._note_break()
                self._on_break()
            backoff = _FIRST_BACKOFF_SECONDS if self._spool.first > before else min(backoff * 2, _MAX_BACKOFF_SECONDS)
            await asyncio.sleep(random.uniform(backoff / 2, backoff))  # noqa: S311 - jitter

    async def drain(self, running: asyncio.Task[None], deadline: Deadline) -> bool:
        """Deliver the rest; gives up when nothing was acknowledged for too long. True: all delivered.

        A control plane that is there and takes no lines (its disk is full, say) is not waited for as one that is away.
        """
        self._closing = True
        self._last_ack = time.monotonic()
        self._wake.set()
        while not running.done():
            left = deadline.left(self._last_ack)
            if self._denied_since is not None:
                left = min(left, self._denied_since + _DENIED_SECONDS - time.monotonic())
            if left <= 0:
                return False
            await asyncio.wait({running}, timeout=min(left, _LOOK_SECONDS))
        return self._all_acknowledged()

    def _note_break(self) -> None:
        now = time.monotonic()
        answers = self._plane.answered_at > self._last_break > 0
        self._denied_since = (self._denied_since or now) if answers else None
        self._last_break = now

    async def _stream_once(self) -> None:
        stream = self._plane.open_log_stream()
        try:
            await self._ship(stream)
        except InvalidToken as error:
            if not await self._plane.token_again(stream.token):
                raise
            raise GatewayUnavailable("the token of the log stream has expired") from error

    async def _ship(self, stream: LogStream) -> None:
        self._cursor = self._spool.first
        sender = asyncio.create_task(self._send(stream))
        try:
            async for line in stream.acks():
                self._acknowledge(line)
                if self._closing and self._all_acknowledged():
                    return
            if not sender.done():
                raise GatewayUnavailable("the control plane closed the log stream early")
            self._acknowledge(self._spool.next - 1)
        finally:
            sender.cancel()
            stream.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def _send(self, stream: LogStream) -> None:
        while True:
            while self._cursor < self._spool.next:
                self._cursor += 1
                if not await stream.send(self._spool.read(self._cursor - 1)):
                    await asyncio.Event().wait()
            if self._closing:
                await stream.finish()
                return
            self._wake.clear()
            await self._wake.wait()

    def _acknowledge(self, line: int) -> None:
        before = self._spool.first
        self._spool.release(min(line, self._cursor - 1))
        if self._spool.first > before:  # an empty stream, or an old number again, is no progress
            self._last_ack = time.monotonic()
            self._denied_since = None
        if self._dropped:
            self._announce_dropped()

    def _all_acknowledged(self) -> bool:
        return self._spool.first == self._spool.next and not self._dropped

    def _announce_dropped(self) -> None:
        if self._spool.fill > _CROWDED and not self._closing:
            return  # else every line that fits would be followed by another announcement
        text = f"{self._dropped} log lines were dropped here: the control plane did not take them in time"
        if self._append(AGENT_STREAM, text, pb.LOG_LEVEL_WARN):
            self._dropped = 0
            self._wake.set()

    def _append(self, stream: str, text: str, level: int) -> bool:
        line = pb.LogLine(level=level, message=text, stream=stream, line_number=self._spool.next)  # type: ignore[arg-type]
        line.time.FromNanoseconds(time.time_ns())
        return self._spool.append(line.SerializeToString())
