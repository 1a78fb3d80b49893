"""Writing log lines: many streams, few writes, each line once, nothing on the event loop that could wait for a disk.

Lines of a holder gather in memory for a moment; then a thread writes what has gathered with one write per file. A
stream whose lines wait for the disk is not read any further, so memory is bounded and the agent slows down.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.gateway.sessions import Recent
from leoflow_celery.gateway.threads import LOG_THREADS
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.store.logs import LogKey, LogRecord, LogStore, LogWriter, cut_text, refine_level

log = logging.getLogger(__name__)

#: How long lines gather. Readers that follow a log see a line well within half a second.
_GATHER_SECONDS = 0.05
#: Above this much waiting for the disk, a stream is not read on.
_MAX_WAITING_BYTES = 256 * 1024
#: How long a report, or the next holder of a log, waits for a write that is under way.
_SLOW_DISK_SECONDS = 5.0
_STREAM_CHARACTERS = 32
_STREAMS = frozenset({"stdout", "stderr", "agent"})
#: What a line costs in memory beside its text.
_LINE_OVERHEAD_BYTES = 200
#: How far back a line can be written and not acknowledged: more than a stream may have waiting, each
#: character as its escape of six bytes.
TAIL_BYTES = 1 << 21
_LATEST_SECOND = 253_402_300_799  # the end of the year 9999: datetime knows none later
_LEVEL_OF = {
    pb.LOG_LEVEL_DEBUG: "debug",
    pb.LOG_LEVEL_INFO: "info",
    pb.LOG_LEVEL_WARN: "warning",
    pb.LOG_LEVEL_ERROR: "error",
}


def record_of(line: pb.LogLine) -> LogRecord:
    """A line as it is stored; its text may name a level better than its stream does."""
    stream = line.stream or "stdout"
    default = _LEVEL_OF.get(line.level, "error" if stream == "stderr" else "info")
    return LogRecord(_seconds(line), refine_level(line.message, default), stream, line.message)


def _seconds(line: pb.LogLine) -> float:
    seconds = line.time.seconds
    if not 0 < seconds <= _LATEST_SECOND:
        return time.time()
    return seconds + min(max(line.time.nanos, 0), 999_999_000) / 1e9


class Replay:
    """Lines that are on disk already when a stream begins: an agent sends again what was not acknowledged.

    What it sends again comes first and in order, so the comparison ends with the first line that is new. A line gives
    the same bytes every time, so bytes are compared.
    """

    def __init__(self, tail: bytes) -> None:
        self._lines: Counter[bytes] | None = Counter(tail.split(b"\n")) if tail else None

    @classmethod
    def of_file(cls, path: Path) -> Replay:
        """What may come again, from the end of a log; nothing when there is no log yet."""
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - TAIL_BYTES))
                return cls(file.read())
        except FileNotFoundError:
            return cls(b"")

    def fresh(self, lines: Sequence[bytes]) -> Sequence[bytes]:
        """The lines, as they are on disk, that are not there yet."""
        if self._lines is None:
            return lines
        for index, line in enumerate(lines):
            text = line.removesuffix(b"\n")
            if self._lines[text] <= 0:
                self._lines = None
                return lines[index:]
            self._lines[text] -= 1
        return ()


def _count_of(line: pb.LogLine) -> str:
    """Which count the number of a line belongs to; few, whatever streams are named."""
    return line.stream if line.stream in _STREAMS else ""


class HolderLog:
    """The lines of one holder between the wire and the disk; shared by its streams when it has several."""

    def __init__(self, holder: str, key: LogKey, attempt: AttemptId, received: int | None, numbered: bool) -> None:
        """``received``: the last line taken earlier; None: lines that are on disk may come again (see ``Replay``).

        ``numbered``: one count for all lines, as our agent numbers them. Others count standard output and error apart.
        """
        self.holder, self.key, self.attempt = holder, key, attempt
        self.received = self.written = received or 0
        self._received_of: dict[str, int] | None = None if numbered else {}
        self.error: OSError | None = None
        self.listeners: set[asyncio.Event] = set()
        self.room = asyncio.Event()
        self.room.set()
        self.busy = self.fenced = False
        self.waiting: list[pb.LogLine] = []
        self._waiting_bytes = 0
        self._compare = received is None
        self._replay: Replay | None = None
        self._writer: LogWriter | None = None

    @property
    def idle(self) -> bool:
        """Whether everything taken is on disk."""
        return not self.busy and not self.waiting

    def take(self, line: pb.LogLine) -> bool:
        """Keep a line for the next write; False for one that was taken before, after a write that failed or a fence."""
        if self.fenced or self.error is not None or 0 < line.line_number <= self._last(line):
            return False
        self.received = max(self.received, line.line_number)
        if self._received_of is not None:
            self._received_of[_count_of(line)] = line.line_number
        self.waiting.append(line)
        self._waiting_bytes += len(line.message) + _LINE_OVERHEAD_BYTES
        if self._waiting_bytes > _MAX_WAITING_BYTES:
            self.room.clear()
        return True

    def _last(self, line: pb.LogLine) -> int:
        """The number of the line that was taken before this one."""
        return self.received if self._received_of is None else self._received_of.get(_count_of(line), 0)

    def fence(self) -> None:
        """Somebody else writes this log now: nothing is taken any more, and what waits is dropped."""
        self.fenced = True
        self.waiting, self._waiting_bytes = [], 0
        self.room.set()

    def begin_write(self) -> list[pb.LogLine]:
        lines, self.waiting, self._waiting_bytes = self.waiting, [], 0
        self.busy = True
        return lines

    def write(self, store: LogStore, lines: Sequence[pb.LogLine]) -> OSError | None:
        """Append lines to the file; called in a thread, by one at a time."""
        if self.fenced:
            return None
        try:
            if self._writer is None:
                self._writer = store.writer(self.key)
                self._replay = Replay.of_file(store.path(self.key)) if self._compare else None
            written: Sequence[bytes] = [record_of(line).line(store.limits) for line in lines]
            if self._replay is not None:
                written = self._replay.fresh(written)
            self._writer.append_lines(written)
        except OSError as error:
            return error
        return None

    def end_write(self, lines: Sequence[pb.LogLine], error: OSError | None) -> None:
        self.busy = False
        if self.fenced:
            pass  # whoever sent them holds nothing any more, and hears nothing of them
        elif error is None:
            self.written = max(self.written, *(line.line_number for line in lines))
        else:
            self.error = error
            self.waiting.clear()
        self.room.set()
        self.notify()

    def notify(self) -> None:
        """Wake the streams: something was written, or must be acknowledged again."""
        for listener in self.listeners:
            listener.set()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _try_of(attempt: AttemptId) -> tuple[str, int]:
    return attempt.task_instance_id, attempt.try_number


class HolderLogs:
    """All logs that are being written. Used on the event loop; the writing happens in ``pool``."""

    def __init__(self, store: LogStore, pool: Executor) -> None:
        self._store, self._pool = store, pool
        self._logs: dict[str, HolderLog] = {}
        #: Logs of streams whose numbers begin anew with each stream: nobody else may find them.
        self._unnumbered: set[HolderLog] = set()
        self._of_try: defaultdict[tuple[str, int], set[HolderLog]] = defaultdict(set)
        self._dirty: set[HolderLog] = set()
        self._work = asyncio.Event()
        #: The last line of holders whose streams are closed; they may come back.
        self._received: Recent[str, int] = Recent()

    def open(
        self, holder: str, key: LogKey, attempt: AttemptId, listener: asyncio.Event, *, numbered: bool
    ) -> HolderLog:
        """The log of a holder. ``numbered``: its line numbers go on counting when a stream is opened again."""
        entry = self._logs.get(holder) if numbered else None
        if entry is None or entry.error is not None or entry.fenced:
            received = self._received.get(holder) if numbered else None
            entry = HolderLog(holder, key, attempt, received, numbered)
            if numbered:
                self._logs[holder] = entry
            else:
                self._unnumbered.add(entry)
            self._of_try[_try_of(attempt)].add(entry)
        entry.listeners.add(listener)
        return entry

    def release(self, entry: HolderLog, listener: asyncio.Event) -> None:
        """A stream is over; what it brought is still written."""
        entry.listeners.discard(listener)
        self._close_if_unused(entry)

    async def fence(self, attempt: AttemptId, holder: str) -> None:
        """``holder`` writes the log of the try from now on: after this, no line of whoever had it before lands."""
        others = [entry for entry in self._of_try.get(_try_of(attempt), ()) if entry.holder != holder]
        for entry in others:
            entry.fence()
        await self._until(lambda: not any(entry.busy for entry in others))

    async def settle(self, attempt: AttemptId, holder: str) -> None:
        """Until what was taken of a holder is on disk, or its disk was slow for too long."""
        mine = [entry for entry in self._of_try.get(_try_of(attempt), ()) if entry.holder == holder]
        await self._until(lambda: all(entry.idle for entry in mine))

    @staticmethod
    async def _until(condition: Callable[[], bool], patience_seconds: float = _SLOW_DISK_SECONDS) -> bool:
        deadline = asyncio.get_running_loop().time() + patience_seconds
        while not condition():
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(_GATHER_SECONDS / 5)
        return True

    def take(self, entry: HolderLog, line: pb.LogLine) -> None:
        """Keep a line until the next write. What is longer than any line may be is not kept whole."""
        if len(line.message) > self._store.limits.line_bytes:
            line.message = cut_text(line.message, self._store.limits.line_bytes)
        line.stream = line.stream[:_STREAM_CHARACTERS]
        if not entry.take(line):
            entry.notify()
        elif entry not in self._dirty:
            self._dirty.add(entry)
            self._work.set()

    async def run(self) -> None:
        """Write what gathers, until cancelled."""
        while True:
            await self._work.wait()
            await asyncio.sleep(_GATHER_SECONDS)
            self._work.clear()
            self._write_gathered()

    def _write_gathered(self) -> None:
        ready = [entry for entry in self._dirty if not entry.busy and entry.waiting]
        self._dirty.difference_update(ready)
        size = math.ceil(len(ready) / LOG_THREADS)
        for start in range(0, len(ready), size or 1):
            batch = [(entry, entry.begin_write()) for entry in ready[start : start + size]]
            work = asyncio.get_running_loop().run_in_executor(self._pool, self._write, batch)
            work.add_done_callback(lambda done, batch=batch: self._written(batch, done.result()))  # type: ignore[misc]

    def _write(self, batch: Sequence[tuple[HolderLog, list[pb.LogLine]]]) -> list[OSError | None]:
        return [entry.write(self._store, lines) for entry, lines in batch]

    def _written(self, batch: Sequence[tuple[HolderLog, list[pb.LogLine]]], errors: Sequence[OSError | None]) -> None:
        for (entry, lines), error in zip(batch, errors, strict=True):
            entry.end_write(lines, error)
            if error is not None:
                log.error("log of %s cannot be written: %s", entry.key, error, extra={"holder": entry.holder})
                self._dirty.discard(entry)
            elif entry.waiting:
                self._work.set()
            self._close_if_unused(entry)

    def _close_if_unused(self, entry: HolderLog) -> None:
        if entry.listeners or not entry.idle:
            return
        entry.close()
        self._dirty.discard(entry)
        self._unnumbered.discard(entry)
        of_try = self._of_try[_try_of(entry.attempt)]
        of_try.discard(entry)
        if not of_try:
            del self._of_try[_try_of(entry.attempt)]
        if self._logs.get(entry.holder) is not entry:
            return
        del self._logs[entry.holder]
        if entry.error is None:
            self._received.set(entry.holder, entry.received)
        else:
            # Who knows what the failed write left behind: the next stream compares with the disk.
            self._received.pop(entry.holder)

    async def drain(self, patience_seconds: float) -> None:
        """Until everything taken is on disk, or the patience is over."""
        entries = (*self._logs.values(), *self._unnumbered)
        if not await self._until(lambda: all(entry.idle for entry in entries), patience_seconds):
            log.warning("log lines that were not acknowledged are left unwritten")

    def close(self) -> None:
        for entry in (*self._logs.values(), *self._unnumbered):
            entry.close()
