"""What to do about one pod: report how it ended, delete it, or leave it alone. Pure.

Two rules hold everywhere. A pod that came into being after SQL was read is not judged by its absence there. And the
agent's own record is the truth about its task; the server's words are believed where it left none, or where it only
knows that it was interrupted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from leoflow_celery.domain.desired_state import ExpectedAttempt
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.termination import TerminationRecord, decode
from leoflow_celery.executors.kubernetes.failure_reasons import (
    cause_of_agent_death,
    cause_of_end,
    cause_of_pending,
    cause_of_stall,
    disturbance,
    init_overdue,
    overdue_deletion,
    waits_for_registry,
    waits_for_room,
)
from leoflow_celery.executors.kubernetes.parse_pod import PodState
from leoflow_celery.settings import KubernetesSettings


@dataclass(frozen=True, slots=True)
class ReconcilePolicy:
    """How long to wait before concluding something.

    ``margin_seconds``: clocks of the hosts differ, and reports are on their way. ``patience_seconds``: for what the
    kubelet tries again by itself. ``pending_timeout_seconds``: 0 is for ever.
    """

    margin_seconds: float = 30
    patience_seconds: float = 30
    pending_timeout_seconds: float = 600
    finished_grace_seconds: float = 600
    #: How long a pod waits for room in the cluster or for a scheduling gate, how long for a registry that is away, and
    #: how long one init container may work; 0 is for ever.
    capacity_timeout_seconds: float = 86_400
    registry_timeout_seconds: float = 1_800
    init_timeout_seconds: float = 3_600
    #: How long a container may run whose agent has not called; 0 is for ever.
    claim_timeout_seconds: float = 900
    #: Pods of another system in the namespace are none of our business.
    system: str = ""

    @classmethod
    def of(cls, settings: KubernetesSettings) -> Self:
        return cls(
            patience_seconds=settings.startup_patience_seconds,
            pending_timeout_seconds=settings.pending_timeout_seconds,
            finished_grace_seconds=settings.finished_grace_seconds,
            capacity_timeout_seconds=settings.capacity_timeout_seconds,
            registry_timeout_seconds=settings.registry_timeout_seconds,
            init_timeout_seconds=settings.init_timeout_seconds,
            claim_timeout_seconds=settings.claim_timeout_seconds,
            system=settings.system,
        )


@dataclass(frozen=True, slots=True)
class PodReport:
    """An end to report. ``wants_log_tail``: nobody may have shipped the log."""

    outcome: Outcome
    return_value: str | None = None
    wants_log_tail: bool = False


@dataclass(frozen=True, slots=True)
class PodDecision:
    """Report first, when there is something to report, then delete. ``why`` is for our own log.

    ``release``: nobody will read the pod any more, so no deletion needs to wait for us. What we delete is
    released too.
    """

    report: PodReport | None = None
    delete: bool = False
    release: bool = False
    why: str = ""


KEEP = PodDecision()
NEVER_STARTED = "never_started"


def decide_pod(
    pod: PodState,
    expected: ExpectedAttempt | None,
    read_at: float,
    now: float,
    policy: ReconcilePolicy,
    failing_since: float | None = None,
    pull_words: str = "",
) -> PodDecision:
    """``expected`` is the live attempt of the pod's name, as SQL had it at ``read_at``.

    ``failing_since`` is when its kubelet failed to start it for the first time, ``pull_words`` what the last failed
    pull said, where the pod's events were asked.
    Another system's pod is left alone even under a name that is expected: the same DAG may run in both. So is one of
    that name that is no attempt's.
    """
    if pod.system != policy.system or pod.attempt is None:
        return KEEP
    if expected is None:
        return _unexpected(pod, read_at, now, policy)
    if pod.attempt != expected.attempt:
        return KEEP
    if pod.ended:
        report = _end(pod, expected, read_at, now, policy)
        is_over = report is None and _is_refused(pod, expected) and pod.deletion_due_at is not None
        return PodDecision(release=True, why="refused") if is_over and pod.held else PodDecision(report)
    if pod.deletion_due_at is not None:
        overdue = now - pod.deletion_due_at
        if pod.held and pod.without_grace and (overdue > policy.margin_seconds or not pod.scheduled):
            # But for us it would be gone, and no kubelet will say more of it.
            is_lost = is_missing(expected, read_at, policy)
            return PodDecision(PodReport(missing_outcome(expected))) if is_lost else KEEP
        return PodDecision(PodReport(overdue_deletion(pod, overdue))) if overdue > policy.margin_seconds else KEEP
    if pod.phase == "Unknown":
        return PodDecision(PodReport(cause_of_end(pod)))
    if pod.has_run:
        return _running(pod, expected, now, policy)  # whatever its sidecars wait for
    return _starting(pod, expected, now, policy, failing_since, pull_words)


def _running(pod: PodState, expected: ExpectedAttempt, now: float, policy: ReconcilePolicy) -> PodDecision:
    """A pod whose task's container runs: nothing about starting applies. But an agent calls within minutes."""
    if expected.claimed or pod.task is None or pod.task.started_at is None:
        return KEEP
    running = now - pod.task.started_at
    if not 0 < policy.claim_timeout_seconds <= running:
        return KEEP
    message = (
        f"pod {pod.name} runs for {running:.0f} s, and its agent never called; is leoflow-agent the entry point of "
        f"image {pod.image!r}, and does it reach LEOFLOW_CONTROL_PLANE_ADDR?"
    )
    report = PodReport(Outcome.failed(FailureReason.LAUNCH_LOST, message), wants_log_tail=True)
    return PodDecision(report, delete=True, why="never_called")


def _unexpected(pod: PodState, read_at: float, now: float, policy: ReconcilePolicy) -> PodDecision:
    """A pod whose attempt is terminal, superseded or unknown; too young to tell: left alone."""
    if pod.created_at >= read_at - policy.margin_seconds:
        return KEEP
    recorded = PodDecision(release=True, why="recorded") if pod.held else KEEP
    if pod.deletion_due_at is not None:
        return recorded
    if not pod.ended:
        return PodDecision(delete=True, why="unexpected")
    if pod.only_sidecars_run:
        return PodDecision(delete=True, why="only_sidecars_run")
    # Evicted pods of old versions have no end time.
    ended_at = pod.finished_at or pod.created_at
    return PodDecision(delete=True, why="finished") if now - ended_at >= policy.finished_grace_seconds else recorded


def _starting(
    pod: PodState,
    expected: ExpectedAttempt,
    now: float,
    policy: ReconcilePolicy,
    failing_since: float | None,
    pull_words: str,
) -> PodDecision:
    """A pod that does not start is deleted with the report: it must not start beside the next launch."""
    # A launch that a second delivery finished (the pod's Secret) has only been complete since then; one that nobody
    # reported yet may wait for that delivery.
    complete_at = now if expected.launched_at is None else max(pod.started_at or pod.created_at, expected.launched_at)
    # A pull may take minutes before it fails for the first time.
    age, pending = now - max(complete_at, failing_since or 0.0), now - max(pod.created_at, pod.moved_at or 0.0)
    limit = policy.pending_timeout_seconds
    if pod.working_init is not None:
        # It moves, and has a limit of its own.
        working = now - (pod.working_init.started_at or now)
        overdue = 0 < policy.init_timeout_seconds <= working
        return PodDecision(PodReport(init_overdue(pod, working)), delete=True, why=NEVER_STARTED) if overdue else KEEP
    patience = policy.patience_seconds
    if waits_for_registry(pod, pull_words):
        limit, patience = 0.0, policy.registry_timeout_seconds or math.inf
    elif waits_for_room(pod):
        limit = policy.capacity_timeout_seconds
    cause = cause_of_stall(pod, age, patience)
    if cause is None and pod.phase == "Pending" and 0 < limit <= pending:
        # Whatever patience is left: a pod that waits for its image is given up because of its image.
        cause = cause_of_stall(pod, age, 0) or cause_of_pending(pod, pending)
    return PodDecision(PodReport(cause), delete=True, why=NEVER_STARTED) if cause else KEEP


def _end(
    pod: PodState, expected: ExpectedAttempt, read_at: float, now: float, policy: ReconcilePolicy
) -> PodReport | None:
    record = _record(pod, expected)
    settled = (pod.finished_at or now) < read_at - policy.margin_seconds
    if _is_refused(pod, expected):
        return None  # its claim was refused: somebody else runs the attempt, or nobody may
    if record is not None and record.state is TaskState.SUCCESS and not expected.claimed:
        # SQL may have been read before the claim; later, nobody who held no claim can have run the task.
        return PodReport(_unclaimed_success(pod), wants_log_tail=True) if settled else None
    if record is not None and record.ended:
        # SQL was read before the report arrived, most likely; reporting it again does no harm.
        return _of_record(pod, record) if settled or not record.reported else None
    if record is not None:
        return PodReport(cause_of_agent_death(pod), wants_log_tail=pod.has_run)
    outcome = cause_of_agent_death(pod) if expected.claimed and pod.has_run else cause_of_end(pod)
    may_have_called = outcome.exit_code == 0 or (outcome.reason is FailureReason.NON_ZERO_EXIT and not expected.claimed)
    if may_have_called and pod.has_run and not settled:
        return None  # an agent that leaves no record may have claimed, or reported, since SQL was read
    return PodReport(outcome, wants_log_tail=pod.has_run or pod.failed_init is not None)


def _is_refused(pod: PodState, expected: ExpectedAttempt) -> bool:
    record = _record(pod, expected)
    return record is not None and record.state is TaskState.NONE


def _unclaimed_success(pod: PodState) -> Outcome:
    message = f"pod {pod.name} left a record of success, but its agent never claimed the attempt; it is not believed"
    return Outcome.failed(FailureReason.INVALID_IMAGE, message)


def _of_record(pod: PodState, record: TerminationRecord) -> PodReport:
    outcome = record.outcome()
    if outcome.reason is FailureReason.INTERRUPTED and (better := disturbance(pod)) is not None:
        outcome = better.evolve(exit_code=outcome.exit_code)
    return PodReport(outcome, record.return_value, wants_log_tail=pod.has_run and not record.reported)


def _record(pod: PodState, expected: ExpectedAttempt) -> TerminationRecord | None:
    """What the agent left, when it is about this task instance."""
    if pod.task is None or not pod.task.terminated:
        return None
    record = decode(pod.task.message)
    return record if record is not None and record.attempt == expected.attempt.task_instance_id else None


def is_missing(expected: ExpectedAttempt, read_at: float, policy: ReconcilePolicy) -> bool:
    """Whether an attempt without a pod, in a complete list, has lost it."""
    return expected.launched_before(read_at - policy.margin_seconds)


def is_pod_of(pod: PodState, expected: ExpectedAttempt, policy: ReconcilePolicy) -> bool:
    """Whether a pod of an attempt's name is the one that was launched for it, whatever system it is labelled with.

    One that was made after the launch was recorded is another system's, which runs the same DAG: ours was gone by then.
    """
    made_by = (expected.launched_at or 0.0) + policy.margin_seconds
    return pod.attempt == expected.attempt and pod.created_at <= made_by


def missing_outcome(expected: ExpectedAttempt) -> Outcome:
    """To be refined by what the events say."""
    what = "while its task was running" if expected.claimed else "before its agent called"
    return Outcome.failed(FailureReason.POD_DELETED, f"pod {expected.name} was deleted {what}")
