"""Why the task must stop. The first reason counts, but a cancellation explains a SIGTERM."""

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
