"""What this process remembers of holders: who registered here, who must stop, whose log streams are open.

Memory only: SQL decides, and everything here can be lost with the process.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterator
from enum import StrEnum
from typing import Protocol

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.gateway.recent import Recent
from leoflow_celery.store.attempts import Beat


class Stop(StrEnum):
    """Why a holder must stop. A cancelled one keeps its claim until it has reported; an ended one has reported."""

    FENCED = "fenced"
    CANCELLED = "cancelled"
    ENDED = "ended"


class Stoppable(Protocol):
    """An open log stream."""

    @property
    def beat(self) -> Beat: ...

    def stop(self, why: Stop) -> None: ...


class HolderRegistry:
    """The holders this gateway has heard of. Used on the event loop only."""

    def __init__(self) -> None:
        self._granted: Recent[str, AttemptId] = Recent()
        self._stops: Recent[str, Stop] = Recent()
        self._streams: defaultdict[str, set[Stoppable]] = defaultdict(set)
        self._registered: dict[AttemptId, asyncio.Event] = {}

    # -- claims ---------------------------------------------------------------------------------------------------

    def grant(self, holder: str, attempt: AttemptId) -> None:
        """The holder has claimed the attempt through us."""
        self._stops.pop(holder)
        self._granted.set(holder, attempt)
        self.wake(attempt)

    def is_granted(self, holder: str, attempt: AttemptId) -> bool:
        return self._granted.get(holder) == attempt

    def wake(self, attempt: AttemptId) -> None:
        """Let whoever waits for a Register of the attempt look again."""
        if event := self._registered.pop(attempt, None):
            event.set()

    async def wait_for_register(self, attempt: AttemptId, timeout_seconds: float) -> None:
        """Until somebody registers for the attempt here, or the time is over."""
        event = self._registered.setdefault(attempt, asyncio.Event())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), timeout_seconds)
        if not event.is_set():
            self._registered.pop(attempt, None)
            event.set()

    # -- stops ----------------------------------------------------------------------------------------------------

    def stop(self, holder: str, why: Stop) -> None:
        """Remember it, and close the holder's log streams so that its agent asks at once."""
        known = self._stops.get(holder)
        if known in (Stop.ENDED, Stop.FENCED) or known is why:
            return
        self._stops.set(holder, why)
        if why is Stop.FENCED:
            self._granted.pop(holder)
        if why is not Stop.ENDED:
            for stream in tuple(self._streams.get(holder, ())):
                stream.stop(why)

    def why_stopped(self, holder: str) -> Stop | None:
        return self._stops.get(holder)

    # -- streams --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def streaming(self, stream: Stoppable) -> Iterator[None]:
        """The stream is open inside."""
        holder = stream.beat.holder
        self._streams[holder].add(stream)
        try:
            yield
        finally:
            self._streams[holder].discard(stream)
            if not self._streams[holder]:
                del self._streams[holder]

    def watched(self) -> list[Beat]:
        """Holders with an open stream that have not been told to stop."""
        return [
            next(iter(streams)).beat for holder, streams in self._streams.items() if self._stops.get(holder) is None
        ]

    @property
    def stream_count(self) -> int:
        return sum(map(len, self._streams.values()))
