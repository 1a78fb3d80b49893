"""How long the control plane is waited for."""

from __future__ import annotations

import time

from leoflow_celery.agent.deadline import StopRequest

#: After somebody asked us to go, lines and reports are offered for so long, in case only the task was cancelled.
URGED_SECONDS = 3.0


def seconds_left(now: float, since: float, seconds: float, urged_at: float | None) -> float:
    """What is left of so many seconds since then; a few more, at the most, once we were asked to go."""
    left = since + seconds - now
    return left if urged_at is None else min(left, max(since, urged_at) + URGED_SECONDS - now)


class Patience:
    """So many seconds from now on, or a few from the moment the agent is asked to go."""

    def __init__(self, stop: StopRequest, seconds: float) -> None:
        self._stop, self._seconds, self._since = stop, seconds, time.monotonic()

    def left(self, moved_at: float = 0.0) -> float:
        """Seconds, negative when it is over; ``moved_at`` (monotonic) is when there was progress: it begins anew."""
        since = max(self._since, moved_at)
        return seconds_left(time.monotonic(), since, self._seconds, self._stop.urged_at)
