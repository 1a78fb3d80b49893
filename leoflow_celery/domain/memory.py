"""The memory limit of a request: its ``resources``, or what its pod override says in their place."""

from __future__ import annotations

import copy
from typing import Any

from leoflow_celery.domain.attempt import TASK_CONTAINER
from leoflow_celery.domain.quantity import parse_quantity
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.domain.routing import RECONCILED, ExecutorType

_MAX_BIGINT = 2**63 - 1


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
