"""What events add to an outcome."""

from __future__ import annotations

from typing import Any

import pytest

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason as Reason
from leoflow_celery.executors.kubernetes.events import explain, explain_claim, failing_since, read_events

DELETED = Outcome.failed(Reason.POD_DELETED, "pod x was deleted")


def event(reason: str, message: str = "text", kind: str = "Normal", **fields: Any) -> dict[str, Any]:
    involved = {"kind": "Pod", "name": "x", "uid": "uid-1"}
    return {"reason": reason, "message": message, "type": kind, "involvedObject": involved, **fields}


@pytest.mark.parametrize(
    ("happened", "reason", "words"),
    [
        (event("Preempted", "Preempted by ns/high on node n"), Reason.PREEMPTED, "Preempted by ns/high on node n"),
        (event("Evicted", "Usage of EmptyDir exceeds"), Reason.EVICTED, "Usage of EmptyDir exceeds"),
        (event("TaintManagerEviction", "Marking for deletion Pod ns/x"), Reason.NODE_LOST, "NoExecute taint"),
        (event("NodeNotReady", "Node is not ready"), Reason.NODE_LOST, "Node is not ready"),
        (event("DeadlineExceeded", "Pod was active too long"), Reason.TIMEOUT, "ended at its deadline"),
        (event("TaintManagerEviction", "Cancelling deletion of Pod ns/x"), Reason.POD_DELETED, "pod x was deleted"),
        (event("Killing", "Stopping container task"), Reason.POD_DELETED, "pod x was deleted"),
    ],
)
def test_who_deleted_a_pod(happened: dict[str, Any], reason: Reason, words: str) -> None:
    outcome = explain(DELETED, read_events([event("Started"), happened]))
    assert outcome.reason is reason
    assert words in outcome.message
    assert outcome.last_event == f"{happened['reason']}: {happened['message']}"


def test_an_interruption_is_explained_too_and_other_reasons_are_kept() -> None:
    events = read_events([event("Preempted", "by y")])
    interrupted = Outcome.failed(Reason.INTERRUPTED, "SIGTERM", 143)
    assert (explain(interrupted, events).reason, explain(interrupted, events).exit_code) == (Reason.PREEMPTED, 143)
    exit_3 = Outcome.failed(Reason.NON_ZERO_EXIT, "exit code 3", 3)
    assert explain(exit_3, events).reason is Reason.NON_ZERO_EXIT


def test_why_an_image_could_not_be_pulled_is_in_the_events_only() -> None:
    failed = event("Failed", 'Failed to pull image "x": no such host', "Warning")
    outcome = Outcome.failed(Reason.IMAGE_PULL_FAILED, "cannot pull")
    assert explain(outcome, read_events([failed])).message == 'cannot pull; Failed to pull image "x": no such host'


@pytest.mark.parametrize(
    ("words", "reason"),
    [('secret "db" not found', Reason.UNKNOWN_SECRET), ('configmap "ca" not found', Reason.CONTAINER_CREATE_FAILED)],
)
def test_a_secret_that_cannot_be_mounted_is_in_the_events_only(words: str, reason: Reason) -> None:
    failed = event("FailedMount", f'MountVolume.SetUp failed for volume "x" : {words}', "Warning")
    outcome = explain(Outcome.failed(Reason.CONTAINER_CREATE_FAILED, "pending"), read_events([failed]))
    assert outcome.reason is reason
    assert outcome.message.startswith(f'pending; MountVolume.SetUp failed for volume "x" : {words}')
    assert ("create the Secret" in outcome.message) == (reason is Reason.UNKNOWN_SECRET)


def test_the_last_word_is_the_last_warning_that_is_not_routine() -> None:
    events = [
        event("FailedScheduling", "no node", "Warning", eventTime="2026-01-01T00:00:02.000000Z", lastTimestamp=None),
        event("Killing", "stop", lastTimestamp="2026-01-01T00:00:05Z"),
        event("MissingClusterDNS", "dns", "Warning", lastTimestamp="2026-01-01T00:00:09Z"),
        event("FailedMount", "disk", "Warning", lastTimestamp="2026-01-01T00:00:01Z"),
    ]
    assert explain(DELETED, read_events(events)).last_event == "FailedScheduling: no node"
    assert explain(DELETED, read_events(events[1:3])).last_event == "Killing: stop"
    assert explain(DELETED, read_events(events[2:3])).last_event == ""
    assert explain(DELETED, []) == DELETED


def test_since_when_a_kubelet_fails_to_start_a_container() -> None:
    first, later = "2026-01-01T00:00:01Z", "2026-01-01T00:05:00Z"
    events = [
        event("Pulling", firstTimestamp="2025-12-31T23:55:00Z", lastTimestamp=later),
        event("BackOff", firstTimestamp=later, lastTimestamp=later),
        event("Failed", "Error: ErrImagePull", "Warning", firstTimestamp=first, lastTimestamp=later),
        event("Failed", "of the events API", eventTime="2026-01-01T00:00:09.000000Z", firstTimestamp=None),
    ]
    assert failing_since(read_events(events)) == 1_767_225_601.0
    assert failing_since(read_events(events[3:])) == 1_767_225_609.0
    assert failing_since(read_events(events[:1])) is None
    assert failing_since(read_events([event("Failed")])) is None


def test_what_keeps_a_claim_unbound_is_said_of_a_pod_that_no_node_took() -> None:
    outcome = Outcome.failed(Reason.UNSCHEDULABLE, "no node took the pod")
    waits = event("ExternalProvisioning", "waiting for a volume", lastTimestamp="2026-01-01T00:00:02Z")
    failed = event("ProvisioningFailed", "no quota", "Warning", lastTimestamp="2026-01-01T00:00:01Z")
    done = event("ProvisioningSucceeded", "done", lastTimestamp="2026-01-01T00:00:03Z")

    def said(*events: dict[str, Any]) -> str:
        return explain_claim(outcome, "c", read_events(events)).message

    assert said(failed, waits) == "no node took the pod; claim 'c': ProvisioningFailed: no quota"
    assert said(waits) == "no node took the pod; claim 'c': ExternalProvisioning: waiting for a volume"
    assert said(failed, done) == said() == outcome.message


def test_events_of_another_pod_of_that_name_are_left_out() -> None:
    without_uid = event("TaintManagerEviction", "Marking for deletion", involvedObject={"kind": "Pod", "name": "x"})
    assert [one.reason for one in read_events([event("Preempted"), without_uid], "uid-2")] == ["TaintManagerEviction"]
    assert len(read_events([event("Preempted"), without_uid])) == 2
