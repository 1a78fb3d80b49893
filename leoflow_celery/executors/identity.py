"""Whose a pod or a container is, in its own words: the raw ids that annotations and Docker labels carry.

The attempt can be rebuilt from them alone, so a reconcile needs no other source.
"""

from __future__ import annotations

from collections.abc import Mapping

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.executors.base import LaunchSpec

PREFIX = "leoflow.io/"
_TASK_INSTANCE, _TRY, _LAUNCH = f"{PREFIX}task-instance-id", f"{PREFIX}try-number", f"{PREFIX}launch"


def raw_ids(launch: LaunchSpec) -> dict[str, str]:
    """The ids of an attempt as they are, by key."""
    request, attempt = launch.request, launch.attempt
    return {
        _TASK_INSTANCE: attempt.task_instance_id,
        _TRY: str(attempt.try_number),
        _LAUNCH: str(attempt.launch),
        f"{PREFIX}dag-id": request.dag_id,
        f"{PREFIX}task-id": request.task_id,
        f"{PREFIX}run-id": request.run_id,
        f"{PREFIX}tenant-id": request.tenant_id,
    }


def attempt_in(ids: Mapping[str, str]) -> AttemptId | None:
    """The attempt that such ids name, or None when they are not those of an attempt."""
    try:
        return AttemptId(ids[_TASK_INSTANCE], int(ids[_TRY]), int(ids[_LAUNCH]))
    except (KeyError, ValueError):
        return None
