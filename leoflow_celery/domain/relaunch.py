"""Whether an attempt that failed is started again by us, and when.

A relaunch is the same try with ``launch + 1``. It spends a budget of its own, kept on the row, and never the user's
retries. After an OOM kill it only makes sense with more memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from leoflow_celery.domain.quantity import format_bytes
from leoflow_celery.domain.reasons import CLASS_OF, FailureClass, FailureReason


class RelaunchMode(StrEnum):
    """When the system starts a try again after an infrastructure failure or an OOM kill.

    ``before_start``: while none of its user code has begun. A scheduler that must be told of every second start of the
    user's code wants that.
    """

    ALWAYS = "always"
    BEFORE_START = "before_start"
    NEVER = "never"

    def permits(self, has_started: bool) -> bool:
        """Whether a launch may follow one whose user code has begun, or has not."""
        return self is RelaunchMode.ALWAYS or (self is RelaunchMode.BEFORE_START and not has_started)


@dataclass(frozen=True, slots=True)
class RelaunchPolicy:
    """``max_relaunches`` per try; the delay doubles from ``backoff_seconds`` up to ``max_backoff_seconds``.

    No memory limit grows beyond ``max_memory_bytes``.
    """

    max_relaunches: int = 2
    backoff_seconds: float = 1.0
    max_backoff_seconds: float = 60.0
    max_memory_bytes: int = 16 * 1024**3


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory limit that a request asks for in bytes (0: none), and how often it grew by ``factor`` since."""

    limit_bytes: int = 0
    factor: float = 1.0
    growths: int = 0

    def current(self, policy: RelaunchPolicy) -> int:
        """The limit of the current launch. A request above the cap keeps what it asked for."""
        grown = int(self.limit_bytes * self.factor**self.growths)
        return min(grown, max(self.limit_bytes, policy.max_memory_bytes))

    def next(self, policy: RelaunchPolicy) -> int | None:
        """The limit of a launch after an OOM kill; None when it cannot grow."""
        grown = Memory(self.limit_bytes, self.factor, self.growths + 1).current(policy)
        return grown if grown > self.current(policy) else None


@dataclass(frozen=True, slots=True)
class Growth:
    """A memory limit, before and after."""

    from_bytes: int
    to_bytes: int

    def __str__(self) -> str:
        return f"{format_bytes(self.from_bytes)} → {format_bytes(self.to_bytes)}"


@dataclass(frozen=True, slots=True)
class Relaunch:
    """Start the same try again after ``delay_seconds``, after an OOM kill with more memory."""

    delay_seconds: float
    growth: Growth | None = None


#: No limit is known, so none can grow.
NO_LIMIT = Memory()


def relaunch_decision(
    reason: FailureReason, launch: int, policy: RelaunchPolicy, memory: Memory = NO_LIMIT
) -> Relaunch | None:
    """A Relaunch for an infrastructure failure, or an OOM kill whose limit can grow, with budget left; else None.

    ``launch`` is the launch that failed, so ``launch - 1`` relaunches are spent already.
    """
    if launch > policy.max_relaunches:
        return None
    delay = min(policy.backoff_seconds * 2.0 ** min(launch - 1, 60), policy.max_backoff_seconds)
    if CLASS_OF[reason] is FailureClass.INFRASTRUCTURE:
        return Relaunch(delay)
    more = memory.next(policy) if reason is FailureReason.OOM_KILLED else None
    return None if more is None else Relaunch(delay, Growth(memory.current(policy), more))
