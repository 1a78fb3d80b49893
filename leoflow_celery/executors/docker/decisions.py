"""``classify``: what an ended container means, from the Engine's word and from what its agent left behind."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.quantity import format_bytes
from leoflow_celery.domain.reasons import FailureReason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.termination import TerminationRecord
from leoflow_celery.executors.docker.errors import refused_program
from leoflow_celery.executors.docker.parse_container import End

_SIGNAL_BASE = 128
_KILLED, _TERMINATED, _INTERRUPTED = 137, 143, 130
#: The Engine's own: it lost sight of the container.
_LOST = 255


@dataclass(frozen=True, slots=True)
class Report:
    """An outcome nobody reported; ``return_value`` is JSON text that the control plane does not have."""

    outcome: Outcome
    return_value: str | None = None


def classify(
    end: End,
    record: TerminationRecord | None,
    deadline_seconds: int = 0,
    *,
    claimed: bool = False,
    log_tail: Sequence[str] = (),
) -> Report | None:
    """What to report of an ended container, or None: its agent has reported, or was not to run anything.

    The agent's own word comes first, except that it cannot know why it was interrupted. ``claimed``: some agent had the
    claim, one that leaves no record perhaps. ``log_tail`` is the last of the container's output.
    """
    if record is not None and (record.reported or record.state is TaskState.NONE):
        return None
    if record is not None and record.ended and record.reason != FailureReason.INTERRUPTED:
        return Report(record.outcome(), record.return_value)
    if _over_deadline(end, deadline_seconds):
        return _failed(FailureReason.TIMEOUT, f"stopped at its deadline of {deadline_seconds} s", end)
    if record is not None and record.ended:
        return Report(record.outcome())
    if record is None and not claimed and (refusal := refused_program(log_tail)) and end.exit_code:
        return _failed(*refusal, end)
    reason, what = _by_engine(end, record, claimed)
    return _failed(reason, what, end)


def vanished(name: str, host: str) -> Report:
    """What to report of a container that was started and is not there."""
    message = f"container {name} is gone from host {host}: somebody removed it"
    return Report(Outcome.failed(FailureReason.CONTAINER_LOST, message))


def _over_deadline(end: End, deadline_seconds: int) -> bool:
    return 0 < deadline_seconds <= end.seconds and end.exit_code != 0


def _by_engine(end: End, record: TerminationRecord | None, claimed: bool) -> tuple[FailureReason, str]:
    """With a record or a claim an agent was in it and told no end, so its exit code says nothing of the task."""
    if end.oom_killed and end.exit_code != 0:
        limit = f"its limit of {format_bytes(end.memory_limit)}" if end.memory_limit else "the memory of the host"
        return FailureReason.OOM_KILLED, f"the container was killed: it needed more memory than {limit}"
    if end.started_at is None:
        return FailureReason.CONTAINER_CREATE_FAILED, f"the container could not be started: {end.error or 'no reason'}"
    if end.exit_code == 0 and record is None and not claimed:
        return (
            FailureReason.INVALID_IMAGE,
            "image: the container ended with exit code 0, and no agent in it ever called the gateway; is leoflow-agent "
            "the image's entrypoint?",
        )
    if end.exit_code == 0:
        return FailureReason.CONTAINER_LOST, "the container ended with exit code 0 and without a report"
    if end.exit_code in (_TERMINATED, _INTERRUPTED):
        return FailureReason.INTERRUPTED, f"the container was stopped ({_how(end)})"
    if record is not None or claimed or end.exit_code in (_KILLED, _LOST):
        return FailureReason.CONTAINER_LOST, f"the container ended without a report: {_how(end)}"
    return FailureReason.NON_ZERO_EXIT, f"the container ended with {_how(end)}"


def _how(end: End) -> str:
    text = f"exit code {end.exit_code}"
    if _SIGNAL_BASE < end.exit_code < _LOST:
        with contextlib.suppress(ValueError):
            text += f", {signal.Signals(end.exit_code - _SIGNAL_BASE).name}"
    return f"{text}: {end.error}" if end.error else text


def _failed(reason: FailureReason, message: str, end: End) -> Report:
    return Report(Outcome.failed(reason, message, end.exit_code, last_event=end.error))
