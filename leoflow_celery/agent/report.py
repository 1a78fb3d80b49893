"""Handing over the outcome: termination log, return value, final state."""

from __future__ import annotations

import logging
import os

from leoflow_celery.agent.client import ControlPlane, retried
from leoflow_celery.agent.deadline import Deadline
from leoflow_celery.domain.outcome import Outcome
from leoflow_celery.domain.reasons import FailureReason, parse_reason
from leoflow_celery.domain.states import TaskState
from leoflow_celery.domain.termination import TerminationRecord, encode, fits
from leoflow_celery.domain.xcom import JSON_CONTENT_TYPE, RETURN_VALUE
from leoflow_celery.errors import ClaimRefused, Fenced, LeoflowError
from leoflow_celery.protocol import agent_pb2 as pb
from leoflow_celery.protocol.service import REASON_KEY

log = logging.getLogger(__name__)

_WIRE_STATE = {
    TaskState.RUNNING: pb.TASK_STATE_RUNNING,
    TaskState.SUCCESS: pb.TASK_STATE_SUCCESS,
    TaskState.FAILED: pb.TASK_STATE_FAILED,
    TaskState.SKIPPED: pb.TASK_STATE_SKIPPED,
    TaskState.UP_FOR_RESCHEDULE: pb.TASK_STATE_UP_FOR_RESCHEDULE,
}


class TerminationLog:
    """The file an executor reads when the agent could not report. An empty path writes nothing."""

    def __init__(self, path: str, attempt: str) -> None:
        self._path, self._attempt = path, attempt
        self._written = 0

    def nothing_ran(self, message: str) -> None:
        """The claim was refused: there is no outcome, and that is in order."""
        self._write(TerminationRecord(self._attempt, TaskState.NONE, message=message, reported=True))

    def claimed(self) -> None:
        """The attempt is ours. Should nothing follow, whoever reads it knows that it died running."""
        self._write(TerminationRecord(self._attempt, TaskState.RUNNING))

    def never_claimed(self, outcome: Outcome) -> None:
        """Nothing ran: whether the attempt is ours was never said."""
        reason = outcome.reason.value if outcome.reason else None
        self._write(
            TerminationRecord(
                self._attempt, outcome.state, None, reason, outcome.message, reported=False, claimed=False
            )
        )

    def record(self, outcome: Outcome, return_value: bytes | None = None, reported: bool = False) -> None:
        """The outcome as it stands. ``return_value`` is one that the control plane does not have."""
        reason = outcome.reason.value if outcome.reason else None
        text = return_value.decode() if return_value is not None else None
        record = TerminationRecord(
            self._attempt, outcome.state, outcome.exit_code, reason, outcome.message, reported, text
        )
        self._write(record if fits(record) else self._lost(record))

    def _lost(self, record: TerminationRecord) -> TerminationRecord:
        """A success whose value cannot be kept is none: what comes next would run without it."""
        size = len(record.return_value or "")
        message = f"the task succeeded, but its return value ({size} characters) never reached the control plane"
        return TerminationRecord(
            self._attempt, TaskState.FAILED, record.exit_code, FailureReason.AGENT_LOST.value, message
        )

    def _write(self, record: TerminationRecord) -> None:
        if not self._path:
            return
        data = encode(record)
        # One write over the whole old text, padded with blanks: a kill in between leaves the old or the new record.
        padded = data.ljust(self._written)
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | (0 if self._written else os.O_TRUNC), 0o600)
            try:
                os.pwrite(descriptor, padded, 0)
            finally:
                os.close(descriptor)
        except OSError as error:
            log.warning("termination log %s: %s", self._path, error.strerror)
        self._written = len(padded)


async def push_return_value(plane: ControlPlane, value: bytes, deadline: Deadline) -> Outcome | None:
    """Push the return value; a failed outcome when it was refused, None when it was taken.

    Raises:
        LeoflowError: the control plane stayed away for too long, or the attempt is no longer ours.
    """
    request = pb.PushXComRequest(key=RETURN_VALUE, value=value, content_type=JSON_CONTENT_TYPE)
    answer = await retried(lambda: plane.call("PushXCom", request), deadline)
    if answer.accepted:
        return None
    reason = parse_reason(answer.rejection_reason, FailureReason.INVALID_XCOM)
    return Outcome.failed(
        reason, f"the return value ({len(value)} bytes) was refused: {answer.rejection_reason}", exit_code=0
    )


async def report_state(plane: ControlPlane, outcome: Outcome, deadline: Deadline) -> pb.ReportStateResponse:
    """Report a state, retried while there is deadline.

    Raises:
        LeoflowError: the control plane stayed away for too long, or refuses the report.
    """
    request = pb.ReportStateRequest(
        state=_WIRE_STATE[outcome.state], exit_code=outcome.exit_code or 0, error_message=outcome.message
    )
    request.occurred_at.GetCurrentTime()
    if outcome.reschedule_at is not None:
        request.reschedule_at.FromMicroseconds(int(outcome.reschedule_at * 1e6))
    metadata = [(REASON_KEY, outcome.reason.value)] if outcome.reason else []
    answer: pb.ReportStateResponse = await retried(lambda: plane.call("ReportState", request, metadata), deadline)
    return answer


async def report_end(plane: ControlPlane, outcome: Outcome, deadline: Deadline) -> bool:
    """Report the final state; True when the control plane knows it, or knows better."""
    try:
        answer = await report_state(plane, outcome, deadline)
    except (Fenced, ClaimRefused) as error:
        log.info("the report was refused, the attempt is no longer ours: %s", error)
        return True
    except LeoflowError as error:
        log.error("the outcome could not be reported: %s", error)  # noqa: TRY400 - the sentence says it all
        return False
    if not answer.acknowledged:
        log.info("the control plane did not take the report: it has another outcome")
    return True
