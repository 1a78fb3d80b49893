"""Time that several hosts agree on. Two hosts' clocks are never compared.

What SQL stores is written and compared by the database's clock, in SQL. What travels through the broker and is compared
by another process (expiry, delays, the age of a sealed message) is by the broker's clock: every process asks it now and
then, and reads its own monotonic clock in between, which nobody sets. What a cluster or an Engine wrote is compared
with the ``Date`` of its own answers. Inside one process, monotonic time is enough.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

#: The header has whole seconds, and what is left of one is cut off.
_HALF_A_SECOND = 0.5


@dataclass(frozen=True, slots=True)
class _Reading:
    """What a server's clock said, and this process's own clocks at that moment."""

    server: float
    monotonic: float
    own: float


class ServerClock:
    """The clock of a server, as this process last read it. Thread-safe; good after a fork.

    Before it was read, and where nobody reads it, it is this process's own clock.
    """

    def __init__(self) -> None:
        self._reading: _Reading | None = None
        self._lock = threading.Lock()

    def read(self, ask: Callable[[], float]) -> None:
        """Ask the server what time it is (seconds since the epoch). The answer is dated half-way back.

        Raises:
            Whatever ``ask`` raises.
        """
        before = time.monotonic()
        self._note(ask(), before)

    def read_date(self, header: str | None, sent_at: float) -> None:
        """Take the ``Date`` of an HTTP answer to what was sent at ``sent_at`` (monotonic); an answer may have none."""
        try:
            server = parsedate_to_datetime(header or "").timestamp()
        except (ValueError, OverflowError):
            return
        self._note(server + _HALF_A_SECOND, sent_at)

    def _note(self, server: float, before: float) -> None:
        after, own = time.monotonic(), time.time()
        with self._lock:
            self._reading = _Reading(server + (after - before) / 2, after, own)

    def time(self) -> float:
        """What the server's clock says now, in seconds since the epoch."""
        reading = self._reading
        return time.time() if reading is None else reading.server + (time.monotonic() - reading.monotonic)

    @property
    def offset_seconds(self) -> float | None:
        """How far this host's clock was ahead of the server's when that was last read; None when it never was."""
        reading = self._reading
        return None if reading is None else reading.own - reading.server

    def to_own(self, instant: float) -> float:
        """An instant of the server's clock, as this host's clock will show it then: for code that knows only that."""
        return instant - self.time() + time.time()


def due_in(seconds: float) -> datetime:
    """The instant in so many seconds by the broker's clock, as the ``eta`` of a message of ours."""
    return datetime.fromtimestamp(broker_clock.time() + seconds, UTC)


#: Of the broker that this process uses. There is one in a process.
broker_clock = ServerClock()
