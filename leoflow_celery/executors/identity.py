"""Whose a pod or a container is, in its own words: the raw ids that annotations and Docker labels carry.

The attempt can be rebuilt from them alone, so a reconcile needs no other source. They are words all the same: whoever
may create pods can write them. Where more is at stake than tidying up, a ``Voucher`` says it under seal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from leoflow_celery.domain.attempt import AttemptId
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.request import TaskRequest
from leoflow_celery.errors import DecryptionFailed, PermanentLaunchError
from leoflow_celery.executors.base import LaunchSpec, Sealing

PREFIX = "leoflow.io/"
#: The annotation with the voucher of a pod.
SEAL = f"{PREFIX}seal"
#: For whom a pod's service account token is that an agent exchanges.
AUDIENCE = "leoflow-agent"
_PURPOSE = "leoflow.pod"
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


@dataclass(frozen=True, slots=True)
class PresentedPod:
    """The pod that somebody proved to be, as the cluster knows it."""

    namespace: str
    name: str
    uid: str
    annotations: Mapping[str, str]


class PodReviewer(Protocol):
    """Asks a cluster which pod a token was given to."""

    @property
    def namespace(self) -> str:
        """Where task pods live."""
        ...

    def pod_of(self, token: str) -> PresentedPod:
        """The pod in our namespace whose service account token this is.

        Raises:
            InvalidToken: no token of the cluster, or not for us, or its pod is gone.
            ClusterUnavailable: the API server did not answer, or does not let us ask.
        """
        ...

    def missing_rights(self) -> list[str]:
        """What the API server would not let us ask, as ``create tokenreviews``.

        Raises:
            ClusterUnavailable: it did not answer.
        """
        ...

    def close(self) -> None:
        """Close idle connections."""
        ...


@dataclass(frozen=True, slots=True)
class Voucher:
    """The word of a launch worker: I made this very pod, and for this attempt.

    The uid is the cluster's, and no second pod ever has it: copied to another pod the word is worth nothing.
    """

    attempt: AttemptId
    namespace: str
    name: str
    uid: str

    def sealed(self, sealing: Sealing) -> str:
        """The voucher as the pod's annotation has it."""
        return sealing.seal({"purpose": _PURPOSE, **asdict(self)})

    @classmethod
    def opened(cls, sealed: str, sealing: Sealing) -> Voucher | None:
        """The voucher again; None for a text that was not made as one with our keys."""
        try:
            found = sealing.open(sealed)
            if found["purpose"] != _PURPOSE:
                return None
            names = (str(found[name]) for name in ("namespace", "name", "uid"))
            return cls(AttemptId.from_json(found["attempt"]), *names)
        except (DecryptionFailed, KeyError, ValueError, TypeError):
            return None

    def is_of(self, pod: PresentedPod) -> bool:
        """Whether it speaks of this pod."""
        return (self.namespace, self.name, self.uid) == (pod.namespace, pod.name, pod.uid)
