"""Whose a pod or a container is, in its own words: the raw ids that annotations and Docker labels carry.

The attempt can be rebuilt from them alone, so a reconcile needs no other source.
"""

from __future__ import annotations

from collections.abc import Mapping

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.errors import PermanentLaunchError
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
        f"{PREFIX}task-id": request.task_id,
        **run_ids(request),
    }


def run_ids(request: TaskRequest) -> dict[str, str]:
    """The ids of a run as they are, by key."""
    return {
        f"{PREFIX}dag-id": request.dag_id,
        f"{PREFIX}run-id": request.run_id,
        f"{PREFIX}tenant-id": request.tenant_id,
    }


def check_run(what: str, ids: Mapping[str, str], request: TaskRequest) -> None:
    """Refuse a staging volume that carries the ids of another run than the request's.

    Raises:
        PermanentLaunchError: names the volume, not its run.
    """
    if any(ids.get(key, own) != own for key, own in run_ids(request).items()):
        message = f"{what} belongs to another run; name the volume of run {request.run_id!r}, or one of its own"
        raise PermanentLaunchError(FailureReason.INVALID_SPEC, message)


def attempt_in(ids: Mapping[str, str]) -> AttemptId | None:
    """The attempt that such ids name, or None when they are not those of an attempt."""
    try:
        return AttemptId(ids[_TASK_INSTANCE], int(ids[_TRY]), int(ids[_LAUNCH]))
    except (KeyError, ValueError):
        return None
