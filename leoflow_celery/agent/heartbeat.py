"""Heartbeats: they keep the claim's lease, and their answer may say stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from leoflow_celery.agent.client import ControlPlane
from leoflow_celery.agent.deadline import StopRequest
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.errors import ClaimRefused, Fenced, GatewayUnavailable, LeoflowError
from leoflow_celery.protocol import agent_pb2 as pb

log = logging.getLogger(__name__)

#: After a signal the control plane is asked whether it was a cancellation; it gets this long to answer.
_EXPLAIN_SECONDS = 2.0
FENCED = "the attempt is no longer ours: cancelled, ended or taken over"
CANCELLED = "the control plane asked the task to stop"


class Heartbeat:
    """Beats at the start, every ``interval_seconds``, and at once when asked to."""

    def __init__(self, plane: ControlPlane, stop: StopRequest, interval_seconds: float) -> None:
        self._plane, self._stop, self._interval = plane, stop, interval_seconds
        self._now = asyncio.Event()

    def beat_now(self) -> None:
        """Something happened that the control plane may have an opinion about (a signal, a closed log stream)."""
        self._now.set()

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            await self.beat()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._now.wait(), self._interval)
            self._now.clear()

    async def explain_interruption(self) -> None:
        """After a signal: ask whether it was a cancellation, which the reason to stop then says."""
        if self._stop.reason is FailureReason.INTERRUPTED:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.beat(), _EXPLAIN_SECONDS)

    async def beat(self) -> None:
        """One heartbeat. A control plane that is away is no reason to stop anything."""
        request = pb.HeartbeatRequest()
        request.sent_at.GetCurrentTime()
        try:
            answer = await self._plane.call("Heartbeat", request)
        except GatewayUnavailable as error:
            log.debug("heartbeat unanswered: %s", error)
        except (Fenced, ClaimRefused):
            self._stop.ask(FailureReason.CANCELLED, FENCED)
        except LeoflowError as error:
            log.warning("heartbeat refused: %s", error)
        else:
            self._plane.use_token(answer.renewed_token)
            if answer.should_terminate:
                self._stop.ask(FailureReason.CANCELLED, CANCELLED)
