"""When a silent attempt is given up. Do no harm: a decision needs a positive signal.

Times are seconds; ages are measured by the caller against one clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from leoflow_celery.domain.reasons import FailureReason


@dataclass(frozen=True, slots=True)
class ReapPolicy:
    """How long silence may last.

    ``heartbeat_timeout_seconds``: six missed heartbeats of 15 s. ``lost_message_seconds``: how long an attempt may be
    queued while its queue is empty. ``queued_timeout_seconds``: how long it may wait in a queue that is not empty; 0
    means for ever. ``launch_timeout_seconds``: how long a launched attempt may stay silent before its agent's first
    call. ``cancel_grace_seconds``: how long a cancelled holder may take to stop.
    """

    heartbeat_timeout_seconds: float = 90
    lost_message_seconds: float = 60
    queued_timeout_seconds: float = 3_600
    launch_timeout_seconds: float = 900
    cancel_grace_seconds: float = 60


@dataclass(frozen=True, slots=True)
class Verdict:
    """Give the attempt up for this reason; the message is for a human."""

    reason: FailureReason
    message: str


def silent_verdict(seconds_since_heartbeat: float | None, policy: ReapPolicy) -> Verdict:
    """On a holder that was silent for too long. Its claim was the first sign of life, whether or not a heartbeat came.

    None, or a heartbeat that is yet to come: it was of a clock that was set back since.
    """
    limit = f"(limit {policy.heartbeat_timeout_seconds:.0f} s)"
    if seconds_since_heartbeat is None or seconds_since_heartbeat < 0:
        return Verdict(FailureReason.AGENT_LOST, f"the agent sent no heartbeat after its claim {limit}")
    return Verdict(
        FailureReason.AGENT_LOST, f"the agent's last heartbeat was {seconds_since_heartbeat:.0f} s ago {limit}"
    )


def age_seconds(since: float, now: float, even_seconds: float) -> float:
    """How long ago ``since`` was, at least: both are by one clock, which has run evenly for ``even_seconds``.

    What began before the clock was set began no later than that; a time that is yet to come was written before it.
    """
    return even_seconds if since > now + 1 and math.isfinite(even_seconds) else min(now - since, even_seconds)


def may_judge_silence(listening_seconds: float | None, timeout_seconds: float) -> bool:
    """Whether silence means anything: who hears heartbeats has listened long enough to hear one of each holder.

    ``listening_seconds`` is None while nobody listens. After an outage of the listener everybody seems silent; a third
    of the timeout, and of the lease, is two heartbeats.
    """
    return listening_seconds is not None and listening_seconds >= timeout_seconds / 3


def reap_queued(
    queued_seconds: float,
    queue: str,
    depth: int | None,
    launched_seconds: float | None,
    policy: ReapPolicy,
    bound_to: str = "",
    started_as: str = "",
    *,
    all_told: bool = True,
) -> Verdict | None:
    """A verdict on an attempt that is queued and unclaimed, or None to leave it alone.

    ``depth`` is the number of messages in its queue (waiting or unacknowledged), None when the broker did not answer:
    then nothing is known and nothing is done. ``launched_seconds`` is the time since an executor started it, None
    when none reported that. ``bound_to`` says why nobody but the workers of this queue may take it, ``started_as`` what
    was started and where. ``all_told`` is False while reports of workers wait to be recorded: one of them may be that
    this attempt was started, so an empty queue does not mean that its message is lost.
    """
    if launched_seconds is not None:
        if launched_seconds <= policy.launch_timeout_seconds:
            return None
        return Verdict(
            FailureReason.LAUNCH_LOST,
            f"started {launched_seconds:.0f} s ago{started_as and f' as {started_as}'}, its agent never called "
            f"(limit {policy.launch_timeout_seconds:.0f} s); does it reach LEOFLOW_CONTROL_PLANE_ADDR?",
        )
    if depth is None:
        return None
    if depth == 0 and all_told and queued_seconds > policy.lost_message_seconds:
        return Verdict(
            FailureReason.LAUNCH_LOST,
            f"queued for {queued_seconds:.0f} s while queue {queue!r} is empty: its message is lost",
        )
    if policy.queued_timeout_seconds and queued_seconds > policy.queued_timeout_seconds:
        return Verdict(
            FailureReason.QUEUED_TIMEOUT,
            f"queued for {queued_seconds:.0f} s behind {depth} messages in {queue!r} "
            f"(limit {policy.queued_timeout_seconds:.0f} s); "
            + (f"is the worker of {bound_to} running?" if bound_to else "is a worker consuming it?"),
        )
    return None


def cancel_overdue(seconds_since_cancel: float, requested_grace_seconds: float | None, policy: ReapPolicy) -> bool:
    """Whether a cancelled holder had its time to stop: what its request asks for, and ours to say so."""
    return seconds_since_cancel > (requested_grace_seconds or 0) + policy.cancel_grace_seconds


def unplaced_verdict(queued_seconds: float, staging_claim: str) -> Verdict:
    """On an attempt that nobody could send: its staging volume needs a Docker host, and none is there."""
    return Verdict(
        FailureReason.UNSCHEDULABLE,
        f"queued for {queued_seconds:.0f} s: staging volume {staging_claim!r} needs a Docker host, and no docker "
        "worker has announced itself; start one (celery -A leoflow_celery.workers.docker worker)",
    )
