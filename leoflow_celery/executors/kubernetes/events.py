"""What the cluster's events say about one pod: why it was deleted, and the last word of scheduler and kubelet.

Asked for only when an end is reported. Events outlive their pod by an hour: all that is left of one that is gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason as Reason
from leoflow_celery.executors.kubernetes.client import KubernetesApi
from leoflow_celery.executors.kubernetes.failure_reasons import missing_secret, unknown_secret
from leoflow_celery.executors.kubernetes.parse_pod import seconds

#: Every pod has these; they explain nothing.
_ROUTINE = frozenset(
    {"Scheduled", "Pulling", "Pulled", "Created", "Started", "MissingClusterDNS", "SuccessfulAttachVolume"}
)
#: What the kubelet says each time it cannot start a container.
_FAILED_STARTS = frozenset({"Failed", "InspectFailed", "ErrImageNeverPull", "BackOff"})
#: Who deletes pods says so in an event of the pod: reason → ours. The first that matches explains best.
_DELETERS = {
    "Preempted": (Reason.PREEMPTED, "preempted"),
    "Preempting": (Reason.PREEMPTED, "preempted"),
    "Evicted": (Reason.EVICTED, "evicted"),
    "DeadlineExceeded": (Reason.TIMEOUT, "ended at its deadline"),
    "TaintManagerEviction": (Reason.NODE_LOST, "taken off a node that is not ready or has a NoExecute taint"),
    "NodeNotReady": (Reason.NODE_LOST, "lost: its node is not ready"),
    "NodeShutdown": (Reason.NODE_LOST, "ended by the shutdown of its node"),
}
#: The taint manager says with the same reason that it will not delete a pod after all.
_CANCELLED = "Cancelling deletion"
#: Words of the kubelet and the scheduler that say more than the pod's status does.
_EXPLAINS = {
    Reason.IMAGE_PULL_FAILED: "Failed to pull image",
    Reason.CONTAINER_CREATE_FAILED: "MountVolume",
}
_LIMIT = 500


@dataclass(frozen=True, slots=True)
class PodEvent:
    """One event, ``at`` its last occurrence as the API writes it (sorts as text), ``since`` its first in seconds."""

    reason: str
    message: str
    warning: bool = False
    at: str = ""
    since: float | None = None

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def fetch_events(api: KubernetesApi, name: str, uid: str = "", kind: str = "Pod") -> list[PodEvent]:
    """The events of a pod, or of its claim, oldest first; with ``uid``, without those of another that had its name.

    Raises:
        ApiError: the API server did not answer or refused.
    """
    selector = f"involvedObject.kind={kind},involvedObject.name={name}"
    answer = api.get(api.path("events"), operation="list_events", fieldSelector=selector, limit=_LIMIT)
    return read_events(answer.get("items") or (), uid)


def read_events(items: Iterable[dict[str, Any]], uid: str = "") -> list[PodEvent]:
    """The same of decoded JSON."""
    events = [_event(one) for one in items if _is_of(one, uid)]
    return sorted(events, key=lambda one: one.at)


def _is_of(event: dict[str, Any], uid: str) -> bool:
    # The taint manager's events have no uid.
    return not uid or event.get("involvedObject", {}).get("uid", uid) == uid


def _event(event: dict[str, Any]) -> PodEvent:
    last = ((event.get("series") or {}).get("lastObservedTime"), event.get("lastTimestamp"))
    made = (event.get("eventTime"), event.get("metadata", {}).get("creationTimestamp"))
    return PodEvent(
        event.get("reason", ""),
        event.get("message", "").strip(),
        event.get("type") == "Warning",
        at=next(filter(None, (*last, *made)), ""),
        since=seconds(next(filter(None, (event.get("firstTimestamp"), *made)), None)),
    )


def failing_since(events: list[PodEvent]) -> float | None:
    """When the kubelet could not start a container for the first time; None when the events do not say."""
    return min((one.since for one in events if one.reason in _FAILED_STARTS and one.since is not None), default=None)


def pull_words(events: list[PodEvent]) -> str:
    """What the last failed pull said; a container that backs off says only that it does."""
    words = _EXPLAINS[Reason.IMAGE_PULL_FAILED]
    return next((one.message for one in reversed(events) if one.message.startswith(words)), "")


def explain(outcome: Outcome, events: list[PodEvent]) -> Outcome:
    """The outcome with the last word of the events, and the true reason where they know better."""
    if outcome.reason in (Reason.POD_DELETED, Reason.INTERRUPTED):
        outcome = _who_deleted(outcome, events)
    words = _EXPLAINS.get(outcome.reason) if outcome.reason else None
    explaining = [one for one in events if words and one.message.startswith(words)]
    if explaining and explaining[-1].message not in outcome.message:
        outcome = outcome.evolve(message=f"{outcome.message}; {explaining[-1].message}")
    if outcome.reason is Reason.CONTAINER_CREATE_FAILED and explaining and missing_secret(explaining[-1].message):
        outcome = unknown_secret(outcome)  # one that the pod mounts: its status does not say so
    last = last_word(events)
    return outcome.evolve(last_event=str(last)) if last is not None else outcome


def _who_deleted(outcome: Outcome, events: list[PodEvent]) -> Outcome:
    for kind, (reason, verb) in _DELETERS.items():
        found = [one for one in events if one.reason == kind and not one.message.startswith(_CANCELLED)]
        if found:
            return outcome.evolve(reason=reason, message=f"the pod was {verb}: {found[-1].message}")
    return outcome


def explain_claim(outcome: Outcome, claim: str, events: list[PodEvent]) -> Outcome:
    """The outcome of a pod that no node took, with what kept its claim from being bound."""
    last = last_word(events)
    if last is None or any(one.reason == "ProvisioningSucceeded" for one in events):
        return outcome
    return outcome.evolve(message=f"{outcome.message}; claim {claim!r}: {last}")


def last_word(events: list[PodEvent]) -> PodEvent | None:
    """The last warning, else the last event that is not routine."""
    telling = [one for one in events if one.reason not in _ROUTINE]
    warnings = [one for one in telling if one.warning]
    return next(reversed(warnings or telling), None)
