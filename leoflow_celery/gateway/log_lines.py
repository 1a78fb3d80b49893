"""From lines on the wire to lines on disk, each once. Pure but for the clock."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.store.logs import LogRecord, refine_level

#: How far back a line can be written and not acknowledged: more than a stream may have waiting (see ``journal``), each
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
