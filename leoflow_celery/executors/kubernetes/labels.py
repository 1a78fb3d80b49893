"""Labels and annotations: how a pod, a Secret and a claim say whose they are.

Labels are sanitised, for selectors and people; annotations carry the ids as they are, so that the attempt can be
rebuilt from a pod alone.
"""

from __future__ import annotations

from typing import Any

from leoflow_celery.domain.attempt import AttemptId, label_value, sanitise
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.errors import PermanentLaunchError
from leoflow_celery.executors.base import LaunchSpec
from leoflow_celery.executors.core import PREFIX, attempt_in, check_run, raw_ids, run_ids

#: Every pod and Secret of an attempt has this label, and nothing else has.
MANAGED_SELECTOR = f"{PREFIX}run-id"
STAGING_LABEL = f"{PREFIX}staging"
STAGING_SELECTOR = f"{STAGING_LABEL}=true"
#: Whose it is, where several systems share a namespace: none may delete what another one runs.
SYSTEM_LABEL = f"{PREFIX}system"
#: What the request gives its task, less than the pod's deadline; absent without a limit.
TIMEOUT_ANNOTATION = f"{PREFIX}timeout-seconds"
#: On a pod until its end is recorded: whoever deletes it, what its agent left can still be read.
FINALIZER = f"{PREFIX}record-end"
_MANAGED_BY = {"app.kubernetes.io/managed-by": "leoflow-celery"}


def _managed_by(system: str) -> dict[str, str]:
    return {**_MANAGED_BY, SYSTEM_LABEL: system} if system else _MANAGED_BY


def system_of(metadata: dict[str, Any]) -> str:
    """The system that made an object; empty for one without a name."""
    return str((metadata.get("labels") or {}).get(SYSTEM_LABEL, ""))


def is_held(metadata: dict[str, Any]) -> bool:
    """Whether a deletion of the pod waits for us."""
    return FINALIZER in (metadata.get("finalizers") or ())


def of_system(selector: str, system: str) -> str:
    """The part of a selector's objects that this system made."""
    return f"{selector},{SYSTEM_LABEL}={system}" if system else f"{selector},!{SYSTEM_LABEL}"


def another_system(what: str, owner: str, system: str) -> PermanentLaunchError:
    """The refusal to touch what another system made under the same name."""
    return PermanentLaunchError(
        FailureReason.INVALID_SPEC,
        f"{what} exists and belongs to system {owner!r}, not to {system!r}: systems that share a namespace need task "
        "instance ids and run ids of their own (or one LEOFLOW_KUBERNETES_SYSTEM, when they are the same)",
    )


def attempt_labels(launch: LaunchSpec, system: str = "") -> dict[str, str]:
    """Of everything that belongs to one attempt."""
    request, attempt = launch.request, launch.attempt
    return {
        **_managed_by(system),
        f"{PREFIX}dag-id": label_value(request.dag_id),
        f"{PREFIX}task-id": label_value(request.task_id),
        f"{PREFIX}run-id": label_value(request.run_id),
        f"{PREFIX}tenant-id": label_value(request.tenant_id),
        f"{PREFIX}try-number": str(attempt.try_number),
        f"{PREFIX}launch": str(attempt.launch),
    }


def attempt_of(metadata: dict[str, Any]) -> AttemptId | None:
    """The attempt whose annotations an object carries, or None when they are not those of an attempt."""
    return attempt_in(metadata.get("annotations") or {})


def attempt_annotations(launch: LaunchSpec) -> dict[str, str]:
    """Of the pod: the raw ids, and what a reconcile needs to know of the request."""
    timeout = launch.request.timeout_seconds
    return {**raw_ids(launch), **({TIMEOUT_ANNOTATION: str(timeout)} if timeout else {})}


def timeout_of(metadata: dict[str, Any]) -> int:
    """Seconds that the task of a pod may take; 0 for ever."""
    text = (metadata.get("annotations") or {}).get(TIMEOUT_ANNOTATION, "")
    return int(text) if text.isdecimal() else 0


def claim_metadata(request: TaskRequest, system: str = "") -> dict[str, Any]:
    """Of the staging claim of a run."""
    ids = run_ids(request)
    labels = {**_managed_by(system), STAGING_LABEL: "true", **{key: label_value(one) for key, one in ids.items()}}
    return {"name": request.staging_claim, "labels": labels, "annotations": ids}


def check_claim(metadata: dict[str, Any], request: TaskRequest, system: str) -> None:
    """Refuse a staging claim of another system or run; one that an operator made is anybody's.

    Raises:
        PermanentLaunchError: names the claim.
    """
    labels, what = metadata.get("labels") or {}, f"staging claim {metadata['name']!r}"
    if STAGING_LABEL not in labels:
        return
    if (owner := system_of(metadata)) != system:
        raise another_system(what, owner, system)
    ids, tenant = dict(metadata.get("annotations") or {}), f"{PREFIX}tenant-id"
    if tenant not in ids and tenant in labels:  # an older version wrote no tenant but in the label
        known = labels[tenant] in (label_value(request.tenant_id), sanitise(request.tenant_id))
        ids[tenant] = request.tenant_id if known else labels[tenant]
    check_run(what, ids, request)
