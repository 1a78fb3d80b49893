"""Why the task must stop, and how long the control plane is waited for.

The first reason counts, but a cancellation explains a SIGTERM.
"""

from __future__ import annotations

import asyncio
import time

from leoflow_celery.domain.reasons import FailureReason


class StopRequest:
    """Set by a signal, a timeout or the control plane; awaited by whoever runs the task."""

    def __init__(self) -> None:
        self.reason: FailureReason | None = None
        self.message = ""
        #: When somebody outside first asked (monotonic). A timeout is our own and leaves all the time to report it.
        self.urged_at: float | None = None
        self._event = asyncio.Event()

    def ask(self, reason: FailureReason, message: str) -> None:
        """Ask the task to stop."""
        explains_a_signal = reason is FailureReason.CANCELLED and self.reason is FailureReason.INTERRUPTED
        if self.reason is None or explains_a_signal:
            self.reason, self.message = reason, message
        if self.urged_at is None and reason is not FailureReason.TIMEOUT:
            self.urged_at = time.monotonic()
        self._event.set()

    @property
    def asked(self) -> bool:
        return self._event.is_set()

    async def wait(self) -> None:
        await self._event.wait()


#: After somebody asked us to go, lines and reports are offered for so long, in case only the task was cancelled.
URGED_SECONDS = 3.0


def seconds_left(now: float, since: float, seconds: float, urged_at: float | None) -> float:
    """What is left of so many seconds since then; a few more, at the most, once we were asked to go."""
    left = since + seconds - now
    return left if urged_at is None else min(left, max(since, urged_at) + URGED_SECONDS - now)


class Deadline:
    """So many seconds from now on, or a few from the moment the agent is asked to go."""

    def __init__(self, stop: StopRequest, seconds: float) -> None:
        self._stop, self._seconds, self._since = stop, seconds, time.monotonic()

    def left(self, moved_at: float = 0.0) -> float:
        """Seconds, negative when it is over; ``moved_at`` (monotonic) is when there was progress: it begins anew."""
        since = max(self._since, moved_at)
        return seconds_left(time.monotonic(), since, self._seconds, self._stop.urged_at)
