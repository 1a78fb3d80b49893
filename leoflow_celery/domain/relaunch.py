"""Whether an attempt that failed is started again by us, and when.

A relaunch is the same try with ``launch + 1``. It spends a budget of its own, kept on the row, and never the user's
retries. After an OOM kill it only makes sense with more memory: that of the request's
``resources``, or what its pod override says in their place.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from leoflow_celery.domain.attempt import TASK_CONTAINER
from leoflow_celery.domain.quantity import format_bytes, parse_quantity
from leoflow_celery.domain.reasons import CLASS_OF, FailureClass, FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import RECONCILED, ExecutorType

_MAX_BIGINT = 2**63 - 1


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


def memory_limit(request: TaskRequest, executor: ExecutorType) -> int:
    """Bytes that the user's container may use; 0: no limit, or none that the control plane knows of."""
    if executor not in RECONCILED:
        return 0
    limits = _override(request) if executor is ExecutorType.KUBERNETES else {}
    limit = limits.get("memory", request.resources.limits.memory)
    try:
        # A number is a quantity too, to the API server that checks the override.
        return min(int(parse_quantity(str(limit))), _MAX_BIGINT) if limit else 0
    except ValueError:
        return 0


def with_memory_limit(request: TaskRequest, limit: str) -> TaskRequest:
    """The request with another limit for the user's container, also where its pod override has one."""
    limits = request.resources.limits.model_copy(update={"memory": limit})
    changed = request.evolve(resources=request.resources.model_copy(update={"limits": limits}))
    if "memory" not in _override(request):
        return changed
    part = copy.deepcopy(request.pod_override)
    _limits(part)["memory"] = limit
    return changed.evolve(pod_override=part)


def _override(request: TaskRequest) -> dict[str, Any]:
    return _limits(request.pod_override)


def _limits(part: Any) -> dict[str, Any]:
    """The limits object in a pod override, in which anything may be missing or of another shape."""
    containers = _get(_get(part, "spec"), "containers")
    for container in containers if isinstance(containers, list) else ():
        if _get(container, "name") == TASK_CONTAINER:
            limits = _get(_get(container, "resources"), "limits")
            return limits if isinstance(limits, dict) else {}
    return {}


def _get(part: Any, key: str) -> Any:
    return part.get(key) if isinstance(part, dict) else None
